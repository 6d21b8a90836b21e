"""One request and the index: find its route, and call it as FastAPI's router would."""

from typing import Any, Final

from fastapi.routing import APIRouter
from starlette.applications import Starlette
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import path_in_app
from fastapi_prodkit._routing.fastapi_routes import Entry, RouteTable, apply_form_limits

__all__ = ["RouteIndex", "find_route", "index_of"]

_KINDS: Final = ("http", "websocket")
_FULL, _NONE = Match.FULL, Match.NONE  # looking up a member of an enumeration costs as much as several calls

_Found = tuple[Entry | None, Scope]  # the route, or None if none matches, and what matching it adds to the scope
_NOTHING: Final[_Found] = (None, {})


class RouteIndex:
    """Serve the requests of a router, in place of `router.app`.

    Args:
        router: The router. Its routes are read at the first request, and again after each change.
        app: Serves what the index leaves to the router.
    """

    def __init__(self, router: APIRouter, app: ASGIApp) -> None:
        self.app = app
        self._router = router
        self._table: RouteTable | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in _KINDS:
            await self.app(scope, receive, send)
            return
        router = self._router
        scope.setdefault("router", router)
        apply_form_limits(scope, router)
        found = self.find(scope)
        if found is None:
            await self.app(scope, receive, send)
            return
        entry, child_scope = found
        handle = router.default if entry is None else entry.enter(scope, child_scope)
        await handle(scope, receive, send)

    def find(self, scope: Scope) -> _Found | None:
        """Find the route of a request. None if only the router itself can."""
        path = path_in_app(scope)
        if "\n" in path:  # `$` in a regular expression matches in front of a last line break, too
            return None
        table = self._table
        if table is None or not table.is_current():
            table = self._table = RouteTable(self._router)
        found = _ask(table, path, scope)
        if found is not _NOTHING:
            return found
        if table.has_fallbacks:
            return None
        if scope["type"] == "http" and self._router.redirect_slashes and path != "/":
            twin = {**scope, "path": scope["path"].rstrip("/") if path.endswith("/") else f"{scope['path']}/"}
            entries = table.find(path_in_app(twin))
            if any(entry.asked is None or entry.asked.matches(twin)[0] is not _NONE for entry in entries):
                return None  # the router redirects to it
        return _NOTHING


def _ask(table: RouteTable, path: str, scope: Scope) -> _Found | None:
    """Return the first route that matches, or else the first that matches but for its method."""
    other_method = _NOTHING
    for entry in table.find(path):
        if entry.asked is None:
            return None
        match, child_scope = entry.asked.matches(scope)
        if match is _FULL:
            return entry, child_scope
        if match is not _NONE and other_method is _NOTHING:
            other_method = entry, child_scope
    return other_method


def index_of(scope: Scope) -> RouteIndex | None:
    """Return the index of the app that serves the request; None if it has none."""
    app = scope.get("app")
    return vars(app.router).get(_scope.ROUTER_INDEX) if isinstance(app, Starlette) else None


def find_route(scope: Scope) -> Any:
    """Return the route that will serve a request, before its handler is called and its body is read.

        route = find_route(scope)

    For a route of an included router it is FastAPI's context of it, which has the whole path, and the dependencies of
    all routers on the way. A route that matches except for its method is returned, too.

    Returns:
        None if no route matches, if the app in the scope has no index, or if only its router can tell.
    """
    index = index_of(scope)
    entry, _ = (index and index.find(scope)) or _NOTHING
    return entry and entry.chosen
