"""What will serve a request, before routing: the index of the app is asked, or every route if it does not know."""

from collections.abc import Sequence
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import routes_inside
from fastapi_prodkit._routing.index import Found, RouteIndex

__all__ = ["ask_index", "endpoint_of", "find_route", "is_routed"]


def find_route(scope: Scope) -> Any:
    """Return the route that will serve a request, before its handler is called and its body is read.

        route = find_route(scope)

    For a route of an included router it is FastAPI's context of it, which has the whole path, and the dependencies of
    all routers on the way. A route that matches except for its method is returned, too. The router does not search
    again for what is found here.

    Returns:
        None if no route matches, if the app in the scope has no index, or if only its router can tell.
    """
    app = scope.get("app")
    found = ask_index(app, scope) if isinstance(app, Starlette) else None
    return found and found[0] and found[0].chosen


def ask_index(app: Starlette, scope: Scope) -> Found | None:
    """Return what the index of an app finds for a request. None if there is no index, or if only the router can."""
    index: RouteIndex | None = vars(app.router).get(_scope.ROUTER_INDEX)
    return None if index is None else index.find_ahead(scope)


def is_routed(app: Starlette, scope: Scope) -> bool:
    """Return whether a route matches the path and the method of a request."""
    found = ask_index(app, scope)
    if found is not None:
        return found[2]
    scope = {**scope, "fastapi": {}}  # matching writes into this entry; the app's scope must not change
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def endpoint_of(app: Starlette, scope: Scope) -> Any:
    """Return the endpoint that will serve a request: that of the first route that matches, or None.

    For a mounted app without routes, it is the app.
    """
    found = ask_index(app, scope)
    if found is None:
        return _endpoint_among(app.routes, scope)
    entry, child_scope, matches = found
    return _endpoint_in(entry.asked, scope, child_scope) if entry and matches else None


def _endpoint_among(routes: Sequence[BaseRoute], scope: Scope) -> Any:
    scope = {**scope, "fastapi": {}}  # as above
    for context in iter_route_contexts(routes):
        match, child_scope = context.matches(scope)
        if match is Match.FULL:
            return _endpoint_in(context.original_route, scope, child_scope)
    return None


def _endpoint_in(route: Any, scope: Scope, child_scope: Scope) -> Any:
    """Return the endpoint of a route that matches, which may be that of a route in the app that it mounts."""
    inside = routes_inside(route)
    return _endpoint_among(inside, {**scope, **child_scope}) if inside else child_scope.get("endpoint")
