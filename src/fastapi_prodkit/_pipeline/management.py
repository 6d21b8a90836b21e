"""Serve management routes, such as probes, in the edge, so that `app.routes` holds the app's own routes only."""

import logging
from collections.abc import Collection, Iterator

from fastapi.routing import RouteContext
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import Message, Scope, Send

from fastapi_prodkit._asgi import walk_routes
from fastapi_prodkit._routing.ahead import is_routed

__all__ = ["ManagementRoutes"]

_OVERRIDDEN = "%s %s: the app's own route %r answers in place of the management route %r"

_logger = logging.getLogger("fastapi_prodkit")


class ManagementRoutes:
    """Which requests the management app of an edge serves, in place of the app inside: those for its routes.

    Middleware, dependencies, exception handlers, mounts and catch-all routes of the app inside do not apply to these
    requests. A route of the app inside wins if it has the same path, with or without a trailing slash, and the same
    method; a GET route wins for HEAD as well (RFC 9110 section 9.3.2). The path of a route in a mounted app includes
    the path of the mount. A mount at exactly the path wins for every method.

    The routes of the app inside are read once: at the end of start-up or, if no lifespan runs, at the first request
    for a management path. Until then the app may change its routes.

    Args:
        management: The app that serves the requests. Its routes must have no path parameters; its mounts are ignored.

    Attributes:
        app: As given.
        app_inside: The app whose routes win; None if it is not known.
    """

    app_inside: Starlette | None = None

    def __init__(self, management: Starlette) -> None:
        self.app = management
        self._methods: dict[str, set[str]] = {}
        self._names: dict[str, str] = {}
        for route in management.routes:
            if isinstance(route, Route):
                path = _without_slash(route.path)
                self._methods.setdefault(path, set()).update(route.methods or ())
                self._names.setdefault(path, route.name)
        self._overridden: frozenset[tuple[str, str]] | None = None  # paths and methods

    @property
    def paths(self) -> Collection[str]:
        """The paths of the management routes, without a trailing slash."""
        return self._methods.keys()

    def serves(self, scope: Scope, path: str) -> bool:
        """Return whether the management app serves an HTTP request.

        Args:
            scope: The request.
            path: Its path relative to the app, without a trailing slash.
        """
        method = scope["method"]
        if path not in self._methods or self.is_overridden(path, method):
            return False
        # A method that no management route has is refused, unless a route of the app inside matches.
        return method in self._methods[path] or self.app_inside is None or not is_routed(self.app_inside, scope)

    def is_overridden(self, path: str, method: str | None) -> bool:
        """Return whether a route of the app inside answers in place of a management route."""
        if self._overridden is None:
            self._overridden = frozenset(self._read_routes())
        return (path, method) in self._overridden

    def read_routes_after_startup(self, send: Send) -> Send:
        """Return a `send` for a lifespan, which reads the routes of the app inside when start-up is complete."""

        async def send_and_read_routes(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._overridden = frozenset(self._read_routes())
            await send(message)

        return send_and_read_routes

    def list_served(self) -> Iterator[tuple[Route, set[str]]]:
        """Yield each management route with its methods, without those that a route of the app inside overrides now."""
        overridden = {(path, method) for path, methods, _ in self._find_overridden() for method in methods}
        for route in self.app.routes:
            if isinstance(route, Route) and (route.path == "/" or not route.path.endswith("/")):
                yield route, {each for each in route.methods or () if (route.path, each) not in overridden}

    def _read_routes(self) -> Iterator[tuple[str, str]]:
        """Yield path and method of each management route that is overridden, and log which route overrides it."""
        for path, methods, own in self._find_overridden():
            name = own.name or type(own.original_route).__name__
            _logger.warning(_OVERRIDDEN, ", ".join(methods), path, name, self._names[path])
            yield from ((path, method) for method in methods)

    def _find_overridden(self) -> Iterator[tuple[str, list[str], RouteContext]]:
        """Yield each path with the methods that a route of the app inside overrides, and this route."""
        for place, own in walk_routes([] if self.app_inside is None else self.app_inside.routes):
            path = _without_slash(place)
            methods = sorted(_overridden_methods(self._methods.get(path, set()), own))
            if methods:
                yield path, methods, own


def _without_slash(path: str) -> str:
    return path if path == "/" else path.removesuffix("/")


def _overridden_methods(methods: set[str], own: RouteContext) -> set[str]:
    """Return the methods of a management route that a route of the same path overrides."""
    if not isinstance(own.original_route, Route | Mount):  # the route of a WebSocket, or of an unknown kind
        return set()
    if own.methods is None:
        return methods
    return methods & (own.methods | ({"HEAD"} if "GET" in own.methods else set()))
