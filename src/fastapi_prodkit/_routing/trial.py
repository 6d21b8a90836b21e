"""Serve a few requests with FastAPI's router and with the index, before the index is trusted with this FastAPI."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, cast

from fastapi.routing import APIRoute, APIRouter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._routing.index import RouteIndex

__all__ = ["fastapi_is_known"]

_REQUESTS: Final = (
    ("GET", "/direct/1"),
    ("GET", "/outer/inner/1"),
    ("PUT", "/outer/inner/1"),  # another method than that of the route
    ("GET", "/outer/inner/plain/1"),
    ("GET", "/unknown"),
)


@cache
def fastapi_is_known() -> bool:
    """Return whether FastAPI's router and the index leave the same scope behind, for each kind of route."""
    try:
        return all(by_router == by_index for by_router, by_index in _trials())
    except Exception:  # noqa: BLE001 - whatever it is: this FastAPI is not the one that the index knows
        return False


class _Route(APIRoute):
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class _Plain:
    """An endpoint that Starlette takes for an ASGI app."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def _endpoint() -> None: ...


def _trials() -> Iterator[tuple[Scope, Scope]]:
    """Yield what the router and the index make of the scope of each request."""
    router, outer, inner = APIRouter(), APIRouter(), APIRouter(route_class=_Route)
    router.add_api_route("/direct/{number}", _endpoint, route_class_override=_Route)
    router.include_router(outer, prefix="/outer")
    outer.include_router(inner, prefix="/inner")
    inner.add_api_route("/{number}", _endpoint)
    inner.add_route("/plain/{number}", cast("Any", _Plain()))
    index = RouteIndex(router, _unused)
    for method, path in _REQUESTS:
        yield _serve(router.app, method, path), _serve(index, method, path)
    inner.add_api_route("/added/{number}", _endpoint)
    yield _serve(router.app, "GET", "/outer/inner/added/1"), _serve(index, "GET", "/outer/inner/added/1")


def _serve(app: ASGIApp, method: str, path: str) -> Scope:
    """Run an app that does not wait for anything, and return the scope that it leaves behind."""
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": []}
    try:
        app(scope, _unused, _send).send(None)  # type: ignore[attr-defined]  # it is a coroutine
    except StopIteration:
        return {name: value for name, value in scope.items() if value != {}}
    raise RuntimeError("the router waits for something")


async def _unused(*_: Any) -> Any:
    """Stand for what a router of this table neither calls nor receives."""
    raise RuntimeError("the router or the index has called what it does not call in the FastAPI that is known")


async def _send(message: Message) -> None: ...
