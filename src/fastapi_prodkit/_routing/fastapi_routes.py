"""The routes of a FastAPI router in one tree: the only module that reads private parts of FastAPI's routing.

In FastAPI a router that another one includes is one route of that other router. It asks its own routes when it is asked
whether it matches, and again when it serves the request. `RouteTable` has an entry for each of them instead. An entry
matches once, and changes the scope as the routers on the way to it would have done.
"""

from collections.abc import Iterator
from contextlib import suppress
from operator import is_, itemgetter
from typing import Any, Final

from fastapi import routing
from fastapi.routing import APIRoute, APIRouter, APIWebSocketRoute
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Scope

from fastapi_prodkit._asgi import LabelledRoute
from fastapi_prodkit._routing.path_tree import ANYWHERE, PathTree, Place, place_of
from fastapi_prodkit._scope import ROUTER_INDEX

__all__ = ["Entry", "RouteTable", "entries_of", "fallbacks_of", "frontends_of", "merge_form_limits", "seam"]

# None where FastAPI has them no more: then the trial fails, and the index is left out.
_IncludedRouter: Final[Any] = getattr(routing, "_IncludedRouter", None)
_route_selected: Final[Any] = getattr(routing, "_route_selected", None)
_with_body_limit: Final[Any] = getattr(routing, "wrap_app_with_body_limit", None)
_version: Final = itemgetter("_routes_version")

_ROUTERS_KEY: Final = "fastapi"  # the scope key for what routers tell each other
# Routes of these classes match nothing but what their regular expression matches, or their host.
_KNOWN: Final = (Route, APIRoute, WebSocketRoute, APIWebSocketRoute, Mount, Host, LabelledRoute)


class Entry:
    """One route of the router itself.

    Attributes:
        order: Its place among all routes.
        asked: What is asked whether it matches; None if only the router can ask it.
        chosen: The route, or FastAPI's context of it if a router includes it.
        template: The path, such as `/items/{item_id}`; None if the route has none.
        is_final: Whether no further route follows, as those in a mount do.
        routers: The routers that are included on the way to it, outermost first.
    """

    __slots__ = ("_is_mount", "asked", "chosen", "is_final", "order", "template")

    routers: tuple[APIRouter, ...] = ()

    def __init__(self, order: int, chosen: Any, asked: Any, template: str | None) -> None:
        self.order = order
        self.chosen = chosen
        self.asked = asked
        self.template = template
        self.is_final = not isinstance(self.route, Mount | Host)
        self._is_mount = isinstance(asked, Mount)

    @property
    def route(self) -> Any:
        """What is asked, or the route itself if only the router can ask it."""
        return self.asked or getattr(self.chosen, "original_route", self.chosen)

    @property
    def place(self) -> Place:
        """Its place in the tree."""
        asked = self.asked
        if asked is None or isinstance(asked, Host):
            return ANYWHERE
        path = f"{asked.path}/{{path:path}}" if self._is_mount else asked.path
        return place_of(path, asked.path_regex, asked.param_convertors)

    @property
    def path(self) -> str:
        """The path as it was declared; with `/*` for a router whose routes cannot be read, or without a path."""
        if isinstance(self.chosen, _IncludedRouter):
            return f"{self.chosen.include_context.prefix}/*"
        path: str | None = getattr(self.asked or self.chosen, "path", None)
        return "/*" if path is None else path

    def enter(self, scope: Scope, child_scope: Scope) -> ASGIApp:
        """Change the scope as the router does if this route has matched, and return what serves the request."""
        scope.update(child_scope)
        _route_selected(scope=scope, path=self.template, mount=self._is_mount)
        handle: ASGIApp = self.chosen.handle
        return handle


class _IncludedEntry(Entry):
    """One route of a router that another router includes."""

    __slots__ = ("_form_limits", "_innermost", "routers")

    def __init__(self, order: int, context: Any, inclusions: tuple[Any, ...]) -> None:
        made = context.starlette_route  # the context of one of FastAPI's own routes has none, and matches by itself
        template = getattr(made, "path_format", None) or context.path_format
        asked = made or context if _is_known(made or context.original_route) else None
        super().__init__(order, context, asked, template)
        self._innermost = inclusions[-1]
        self.routers = tuple(each.original_router for each in inclusions)
        limits = (getattr(each.include_context, "form_limits", None) for each in inclusions)  # FastAPI 0.164 has none
        self._form_limits = tuple(filter(None, limits))

    def enter(self, scope: Scope, child_scope: Scope) -> ASGIApp:
        """Change the scope as the routers on the way do, and return what serves the request."""
        for limits in self._form_limits:
            merge_form_limits(scope, limits)
        told = scope.setdefault(_ROUTERS_KEY, {})
        told["included_router"] = innermost = self._innermost
        told["effective_route_context"] = context = self.chosen
        scope.update(child_scope)
        _route_selected(scope=scope, path=self.template, mount=self._is_mount)
        handle: ASGIApp
        if self.asked is context:
            scope["route"] = context.original_route
            handle = context.original_route.handle
        else:
            handle = _with_body_limit(self.asked.handle, innermost.include_context.max_body_size)
        return handle


class RouteTable:
    """The routes of a router at one time.

    Attributes:
        find: Returns the entries that can match a path, in their order.
        mounts: The entries of mounts, also of those that only the router can ask.
        has_fallbacks: Some routes, those of `app.frontend()`, are asked after all others.
    """

    def __init__(self, router: APIRouter) -> None:
        self._counted: list[dict[str, Any]] = []  # the attributes of this router, and of all that are included
        self._version = 0  # the sum of their versions
        self._lists: list[tuple[APIRouter, list[BaseRoute]]] = []  # the routes of those that include others
        routes = self._watch(router)  # before they are read: what another thread adds meanwhile is noticed
        tree: PathTree[Entry] = PathTree()
        entries = list(entries_of(routes))
        for entry in entries:
            tree.add(entry.place, entry)
        self.mounts = [entry for entry in entries if not entry.is_final]
        self.find = tree.find
        self.has_fallbacks = next(fallbacks_of(router), None) is not None

    def is_current(self) -> bool:
        """Return whether the router still has these routes.

        A router counts its changes, but not those of the list of its routes by hand, such as `app.mount`. They matter
        in the list of the router itself, and where included routers are removed.
        """
        for router, routes in self._lists:
            # By identity: routes with the same path, endpoint and methods are equal, whatever they depend on.
            if len(router.routes) != len(routes) or not all(map(is_, router.routes, routes)):
                return False
        current: int = sum(map(_version, self._counted))
        return current == self._version

    def _watch(self, router: APIRouter) -> list[BaseRoute]:
        """Note the version of a router and of those that it includes, and return its routes."""
        self._version += _version(vars(router))
        routes = list(router.routes)
        included = [route.original_router for route in routes if isinstance(route, _IncludedRouter)]
        if included or not self._counted:
            self._lists.append((router, routes))
        self._counted.append(vars(router))
        for each in included:
            self._watch(each)
        return routes


def entries_of(routes: list[Any]) -> Iterator[Entry]:
    """Yield an entry for each of these routes, and for each route of the routers that they include, in their order."""
    for order, (route, inclusions) in enumerate(_flatten(routes)):
        if inclusions:
            yield _IncludedEntry(order, route, inclusions)
        else:
            yield Entry(order, route, route if _is_known(route) else None, getattr(route, "path_format", None))


def fallbacks_of(router: APIRouter) -> Iterator[Any]:
    """Yield the routes that are asked after all others: those of `app.frontend()`, or FastAPI's contexts of them."""
    yield from router._iter_low_priority_routes()  # noqa: SLF001 - see the module


def _flatten(routes: list[Any], inclusions: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield each route, or FastAPI's context of it, with the inclusions on the way to it, outermost first.

    An included router is a route, too, and not one that is known. It is yielded if its routes cannot be read: then the
    router serves the requests that reach it, and raises the error.
    """
    for route in routes:
        if not isinstance(route, _IncludedRouter):
            yield route, inclusions
            continue
        candidates = None
        if _has_methods_of((APIRouter,), route.original_router, "matches", "handle"):
            with suppress(Exception):  # such as two parameters of one name
                candidates = route.effective_candidates()
        if candidates is None:
            yield route, ()
        else:
            yield from _flatten(candidates, (*inclusions, route))


def merge_form_limits(scope: Scope, limits: Any) -> None:
    """Merge the form limits of a router, or of its inclusion, into the scope."""
    if scope["type"] == "http":
        told = scope.setdefault(_ROUTERS_KEY, {})
        told["form_limits"] = {**told.get("form_limits", {}), **limits}


def frontends_of(router: APIRouter) -> Iterator[tuple[str, Any]]:
    """Yield the path of each `app.frontend()`, and its route, or FastAPI's context of it."""
    for route in fallbacks_of(router):
        prefix = getattr(route, "frontend_prefix", "")
        for each in getattr(route, "original_route", route).routes:
            yield f"{prefix}{each.path}".rstrip("/"), route


def seam(router: APIRouter) -> tuple[Any, str] | None:
    """Return the object that calls `router.app`, and the name of its attribute: the router, or its body limit.

    None if the router's `app` is not FastAPI's, or if something unknown is around it.
    """
    around: Any = router
    name = "middleware_stack"
    while around is not None and _has_methods_of((APIRouter,), router, "app"):
        called = getattr(around, name, None)
        if called == router.app or (called is not None and called is vars(router).get(ROUTER_INDEX)):
            return around, name
        around, name = called, "app"
    return None


def _is_known(route: Any) -> bool:
    return _has_methods_of(_KNOWN, route, "matches")


def _has_methods_of(classes: tuple[type, ...], owner: Any, *names: str) -> bool:
    """Return whether an object has these methods of one of the classes, and not others of its class or of its own."""
    return not any(
        name in vars(owner) or getattr(type(owner), name) not in {getattr(each, name) for each in classes}
        for name in names
    )
