"""One request and the index: find its route, and call it as FastAPI's router would."""

from collections.abc import Awaitable, Sequence
from copy import copy
from typing import Final

from fastapi.routing import APIRouter
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import path_in_app
from fastapi_prodkit._routing.fastapi_routes import Entry, RouteTable, merge_form_limits

__all__ = ["Found", "RouteIndex"]

_KINDS: Final = ("http", "websocket")
_DECISIVE: Final = ("type", "method", "path", "root_path", "path_params", "headers")  # for a route, in a scope
_FULL, _NONE = Match.FULL, Match.NONE  # looking up a member of an enumeration costs as much as several calls

# The route, or None if none matches; what matching it adds to the scope; whether its methods match, too.
Found = tuple[Entry | None, Scope, bool]

_Remembered = tuple[RouteTable | None, list[object], Found | None]  # the table, what it was asked, and what was found
_NOTHING: Final[_Remembered] = (None, [], None)


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

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        if scope["type"] not in _KINDS:
            return self.app(scope, receive, send)
        return self.serve(self.search(scope), scope, receive, send)

    def search(self, scope: Scope) -> Found | None:
        """Begin to serve one request: find its route, unless `find_ahead` has found it."""
        router = self._router
        scope.setdefault("router", router)
        if limits := getattr(router, "form_limits", None):  # FastAPI 0.164 has none
            merge_form_limits(scope, limits)
        return self.find_ahead(scope) if _scope.ROUTE in scope else self.find(scope)

    def serve(self, found: Found | None, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request for which `search` has returned this."""
        if found is None:
            return self.app(scope, receive, send)
        entry, child_scope, _ = found
        handle = self._router.default if entry is None else entry.enter(scope, child_scope)
        return handle(scope, receive, send)

    def find(self, scope: Scope) -> Found | None:
        """Find the route of a request. None if only the router itself can."""
        path = path_in_app(scope)
        if "\n" in path:  # `$` in a regular expression matches in front of a last line break, too
            return None
        table = self._current_table()
        other_method = None
        for entry in table.find(path):
            if entry.asked is None:
                return None
            match, child_scope = entry.asked.matches(scope)
            if match is _FULL:
                return entry, child_scope, True
            if match is not _NONE and other_method is None:
                other_method = entry, child_scope, False
        return other_method or self._find_nothing(table, path, scope)

    def find_ahead(self, scope: Scope) -> Found | None:
        """Find the route of a request before the router is called, which then does not search again.

        What is found is in the scope, and is used only for the same request: middleware may change the scope meanwhile.
        """
        asked = [copy(scope.get(name)) for name in _DECISIVE]
        remembered: _Remembered = scope.get(_scope.ROUTE, _NOTHING)
        table, asked_before, found = remembered
        if table is None or table is not self._table or not table.is_current() or asked_before != asked:
            found = self.find(scope)
            scope[_scope.ROUTE] = self._table, asked, found
        return found

    def mounts(self) -> Sequence[Entry]:
        """Return the mounts, one of which may serve a request for which `find` knew nothing."""
        return self._current_table().mounts

    def redirects(self, scope: Scope) -> bool:
        """Return whether the router redirects a request for which `find` knew nothing, so that no route serves it."""
        path, table = path_in_app(scope), self._table
        if "\n" in path or table is None or table.has_fallbacks:
            return False
        known = all(entry.asked is not None for entry in table.find(path))
        return known and self._has_twin(table, path, scope)

    def _current_table(self) -> RouteTable:
        table = self._table
        if table is None or not table.is_current():
            table = self._table = RouteTable(self._router)
        return table

    def _find_nothing(self, table: RouteTable, path: str, scope: Scope) -> Found | None:
        """Return that no route matches. None if the router may have a redirect or a file of a front end instead."""
        return None if table.has_fallbacks or self._has_twin(table, path, scope) else (None, {}, False)

    def _has_twin(self, table: RouteTable, path: str, scope: Scope) -> bool:
        """Return whether a route may match the path with a slash more or less, to which the router redirects."""
        if scope["type"] != "http" or not self._router.redirect_slashes or path == "/":
            return False
        twin = {**scope, "path": scope["path"].rstrip("/") if path.endswith("/") else f"{scope['path']}/"}
        entries = table.find(path_in_app(twin))
        return any(entry.asked is None or entry.asked.matches(twin)[0] is not _NONE for entry in entries)
