"""List the routes of an app, with those of mounted apps."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute, APIRouter
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router, WebSocketRoute

from fastapi_prodkit import _scope
from fastapi_prodkit._pipeline.edge import Edge
from fastapi_prodkit._route_list.access import Guards, rule_text
from fastapi_prodkit._route_list.limits import Limits
from fastapi_prodkit._route_list.row import ListedRoute
from fastapi_prodkit._route_list.source import source_of
from fastapi_prodkit._routing.fastapi_routes import Entry, entries_of, frontends_of
from fastapi_prodkit.auth.rules import Rule

__all__ = ["defaults_of", "list_routes"]

_ANY: Final = "ANY"
_PUBLIC: Final = Rule(public=True, required=(), caller="ignored")


def list_routes(app: Starlette) -> list[ListedRoute]:
    """Return the routes of an app by path and method; routes of the same path and method in the order of the router.

    The app need not have started: the routes that it adds at start-up are not there before.

    Raises:
        ConfigurationError: A middleware that was added to the app cannot be made.
    """
    return sorted(_app(app, _Place(apps=(app,))), key=lambda each: (each.path, each.method))


def defaults_of(app: Starlette) -> str:
    """Return what `default` stands for in the list of an app."""
    return Limits().inside(app, "").defaults


@dataclass(frozen=True)
class _Place:
    """Where a router is, and what is on the way to it.

    An app that is mounted inside of itself has no end, so `apps` has those that are on the way.
    """

    prefix: str = ""
    apps: tuple[Any, ...] = ()
    guards: Guards = field(default_factory=Guards)
    limits: Limits = field(default_factory=Limits)
    has_schema: bool = False
    by_settings: bool = False

    def row(  # noqa: PLR0913 - keywords
        self, method: str, path: str, route: Any, rule: Rule, *, endpoint: Any, note: str = ""
    ) -> ListedRoute:
        text, explicit = rule_text(route, rule, self.guards)
        path = f"{self.prefix}{path}"
        is_websocket = method == "WEBSOCKET"
        return ListedRoute(
            method=method,
            path=path,
            rule=text,
            limit=self.limits.rate_text(route, endpoint, method, path),
            deadline="" if is_websocket else self.limits.deadline_text(route, method, path),
            body="" if is_websocket else self.limits.body_text(route),
            in_schema=self.has_schema and _includes(route) is True,
            hidden=_includes(route) is False,
            note=note,
            explicit=explicit,
            by_settings=self.by_settings or _scope.BY_SETTINGS in getattr(route, "__dict__", {}),
            source=source_of(endpoint),
        )


def _app(app: Starlette, place: _Place) -> Iterator[ListedRoute]:
    yield from _management(app, place)
    guards = place.guards.at(app.router)
    has_schema = isinstance(app, FastAPI) and app.openapi_url is not None
    limits = place.limits.inside(app, place.prefix)
    yield from _router(app.router, replace(place, guards=guards, limits=limits, has_schema=has_schema))


def _management(app: Starlette, place: _Place) -> Iterator[ListedRoute]:
    """Yield the routes that the edge of an app serves, in front of the guard of the app."""
    edge = Edge.of(app)
    if edge is None:
        return
    limits = place.limits.inside(app, place.prefix, management=True)
    place = replace(place, guards=replace(place.guards, auth=None), limits=limits, by_settings=True)
    for route, methods in edge.management.list_served():
        for method in _methods(methods) if methods else ():
            yield place.row(method, route.path, route, _PUBLIC, endpoint=route.endpoint)


def _router(router: Router, place: _Place) -> Iterator[ListedRoute]:
    found = True  # whether the index of routes finds the route: not what comes after one that it does not know
    for entry in entries_of(router.routes):
        found = found and entry.asked is not None
        route = entry.asked or entry.chosen
        rule = place.guards.decide(route, entry.routers, found=found)
        if isinstance(route, Mount | Host):
            yield from _mount(entry, rule, place, found=found)
        else:
            yield from _route(entry, rule, place)
    for path, route in frontends_of(router) if isinstance(router, APIRouter) else ():
        rule = place.guards.decide(route, (), found=False)
        yield place.row("GET", f"{path}/*", route, rule, endpoint=None, note="frontend")
    if router.default != router.not_found:
        rule = place.guards.decide(router, (), found=False)
        yield place.row(_ANY, "/*", router, rule, endpoint=router.default, note="default app")


def _route(entry: Entry, rule: Rule, place: _Place) -> Iterator[ListedRoute]:
    route = entry.asked or entry.chosen
    original = getattr(route, "original_route", route)
    endpoint = getattr(route, "endpoint", original)
    note = "" if entry.asked else f"class {type(getattr(original, 'original_router', original)).__name__}"
    methods = ["WEBSOCKET"] if isinstance(original, WebSocketRoute) else _methods(getattr(route, "methods", None))
    for method in methods:
        yield place.row(method, entry.path, route, rule, endpoint=endpoint, note=note)


def _mount(entry: Entry, rule: Rule, place: _Place, *, found: bool) -> Iterator[ListedRoute]:
    mount = entry.asked or entry.chosen
    here = replace(place, prefix=_prefix(mount, place.prefix), has_schema=False)
    app = _innermost(mount.app)
    is_inside = any(app is each for each in place.apps)  # by identity: routers with equal routes are equal
    if _may_answer(mount.app) or is_inside:
        yield here.row(_ANY, "/*", mount, rule, endpoint=mount.app, note=f"app {type(mount.app).__name__}")
    if app is None or is_inside:
        return
    guards = place.guards.inside(mount, entry.routers, rule, found=found)
    inside = replace(here, guards=guards, apps=(*place.apps, app))
    yield from _router(app, inside) if isinstance(app, Router) else _app(app, inside)


def _prefix(mount: Any, prefix: str) -> str:
    return f"//{mount.host}{prefix}" if isinstance(mount, Host) else f"{prefix}{mount.path}"


def _innermost(app: Any) -> Starlette | Router | None:
    """Return what is inside of the middleware of a mount, if its routes can be read."""
    while app is not None and not isinstance(app, Starlette | Router):
        app = getattr(app, "app", None)
    return app


def _may_answer(app: Any) -> bool:
    """Return whether an app may answer in another way than by its routes, such as middleware, or a class of its own."""
    by_routes = isinstance(app, FastAPI) or type(app).__call__ in (Starlette.__call__, Router.__call__)
    return not by_routes and getattr(app, _scope.APP_EDGE, None) is None


def _methods(methods: Collection[str] | None) -> list[str]:
    """Return the methods of a route, without HEAD where GET includes it."""
    if not methods:
        return [_ANY]
    return sorted(set(methods) - ({"HEAD"} if "GET" in methods else set()))


def _includes(route: Any) -> bool | None:
    """Return `include_in_schema` of a route; None if it is of a kind that no schema has."""
    is_operation = isinstance(getattr(route, "original_route", route), APIRoute)
    return bool(route.include_in_schema) if is_operation else None
