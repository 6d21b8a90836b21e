"""Read what Starlette and FastAPI put into a scope, search routes, and read raw headers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastapi.routing import RouteContext, iter_route_contexts
from starlette.middleware import body_limit
from starlette.routing import BaseRoute, Match, Mount, Route, Router
from starlette.types import Scope

from fastapi_prodkit import _scope

UNMATCHED = "_unmatched"
_NO_MATCH = Match.NONE  # looking up a member of an enumeration costs as much as several calls of methods
LONGEST_LOGGED_PATH = 2048  # characters; otherwise only the server limits the length of a path

# The exception that Starlette's body limit raises in `send` after it has sent its own 413 in place of the response. It
# is private, like all exceptions of that module.
REPLACED_BY_LIMIT: tuple[type[Exception], ...] = tuple(
    kind for name, kind in vars(body_limit).items() if name == "_RequestBodyLimitResponseSent"
)

_BODY_COUNTER = "starlette._body_limit_responder"  # private: the scope key of the object that counts a limited body

Headers = Iterable[tuple[bytes, bytes]]


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first value of the header `name`, which is in lower case as ASGI requires."""
    for key, value in headers:
        if key == name:
            return value
    return None


def exceeded_body_limit(scope: Scope) -> int | None:
    """Return the body limit of Starlette that the request has exceeded, bytes; None if it has exceeded none."""
    counter: Any = scope.get(_BODY_COUNTER)
    if counter is None or max(counter.total_size, counter.content_length or 0) <= counter.max_body_size:
        return None
    limit: int = counter.max_body_size
    return limit


def route_path(scope: Scope) -> str:
    """Return the path relative to the app that the scope is for, without a trailing slash; "/" for the root."""
    return path_in_app(scope).removesuffix("/") or "/"


def path_in_app(scope: Scope) -> str:
    """Return the path relative to the app that the scope is for, which is what its routes match."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if not root_path or not path.startswith(root_path):
        return path
    below = path[len(root_path) :]
    return below if below[:1] in ("", "/") else path


def route_template(scope: Scope, root_path: str) -> str:
    """Return the template of the route that served the request, such as `/items/{item_id}`.

    Called after the app, because routing stores the matched route in the scope. The result is from a bounded set, never
    the request's own path: without a matched route it is `_unmatched`.

    Args:
        scope: The scope that was passed to the app.
        root_path: `scope["root_path"]` as it was before the call; mounts lengthen it.
    """
    route = scope.get("route")
    if route is None or isinstance(route, Mount):
        return UNMATCHED
    # FastAPI stores the full template of a route in nested included routers under a key of its own. The entry stays
    # when a mounted app matches another route later, so it is used only if it is about the route matched last.
    found = scope.get("fastapi")
    if found and (context := found.get("effective_route_context")) is not None and context.original_route is route:
        route = context.starlette_route or context
    template: str | None = getattr(route, "path_format", None)
    if template is None or scope.get("root_path", "") == root_path:
        return template or UNMATCHED
    mounted = scope["root_path"][len(root_path) :]
    return mounted + template if mounted in mount_prefixes(scope["router"]) else UNMATCHED


def route_dependencies(scope: Scope) -> Iterator[Any]:
    """Yield the dependencies of the matched route, in the order in which FastAPI calls them."""
    yield from walk_dependencies(getattr(chosen_route(scope), "dependant", None))


def chosen_route(scope: Scope) -> Any:
    """Return the matched route, or FastAPI's context of it if a router includes it; None if no route has matched."""
    route = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    return context if context is not None and context.original_route is route else route


def walk_dependencies(dependant: Any) -> Iterator[Any]:
    """Yield the dependencies of a route with this `dependant`, in the order in which FastAPI calls them."""
    for each in getattr(dependant, "dependencies", ()):
        yield from walk_dependencies(each)
        yield each.call


def mount_prefixes(router: Router) -> frozenset[str]:
    """Return the paths that mounts can add to root_path, except paths with parameters, which add raw values.

    The result is cached on the router, which cannot be hashed, until the number of its routes changes.
    """
    count = len(router.routes)
    known: tuple[int, frozenset[str]] | None = vars(router).get(_scope.ROUTER_MOUNTS)
    if known is None or known[0] != count:
        paths = (path for path, each in walk_routes(router.routes) if isinstance(each.original_route, Mount))
        known = vars(router)[_scope.ROUTER_MOUNTS] = (count, frozenset(path for path in paths if "{" not in path))
    return known[1]


def walk_routes(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, RouteContext]]:
    """Yield each route with its path; those of a mounted app come after their mount."""
    for context in iter_route_contexts(routes):
        path = f"{prefix}{context.path or ''}"  # "" is the path of a mount at the root
        yield path, context
        if isinstance(context.original_route, Mount):
            yield from walk_routes(routes_inside(context.original_route), path)


def routes_inside(route: BaseRoute) -> Sequence[BaseRoute]:
    """Return the routes of the app in a mount or host.

    Empty if the app is of another framework, whose attribute `routes` may be anything.
    """
    routes = getattr(route, "routes", None)
    return [each for each in routes if isinstance(each, BaseRoute)] if isinstance(routes, list) else ()


class LabelledRoute(Route):
    """A Starlette route that stores itself in the scope when it matches, as FastAPI's routes do.

    Routing calls `matches` for every request, so the regular expression is tried only if the request's path contains
    the route's path up to its first parameter.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._beginning = path.partition("{")[0]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the route matches, and what `Route.matches` adds to the scope, with the route."""
        if self._beginning not in scope["path"]:
            return _NO_MATCH, {}
        match, found = super().matches(scope)
        return match, found if match is _NO_MATCH else {**found, "route": self}
