"""One app served both ways: by FastAPI's own router, and by the index of routes."""

import asyncio
from typing import Any, NamedTuple

from fastapi import Request, WebSocket
from fastapi.telemetry._api import _RequestTelemetry

from fastapi_prodkit import _scope
from fastapi_prodkit._routing.ahead import ask_index
from fastapi_prodkit.routing import index_routes


class Answer(NamedTuple):
    """What a client and the layers around the app see of one request."""

    messages: list[Any]
    scope: dict[str, Any]
    error: str | None

    @property
    def status(self):
        return self.messages[0].get("status") if self.messages else None

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages).decode()

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}


class BothWays:
    """Serve each request by the router and by the index, and compare what they do.

    Attributes:
        left: How many requests the index has left to the router.
    """

    def __init__(self, app):
        index_routes(app)
        self.app = app
        self.left = 0
        self._index = vars(app.router)[_scope.ROUTER_INDEX]
        self._router = self._index.app
        self._index.app = self._count

    async def _count(self, scope, receive, send):
        self.left += 1
        await self._router(scope, receive, send)

    async def ask(self, method, path, *, ahead=False, **options) -> Answer:
        """Return the answer to a request, which must be the same both ways, also if the index is asked ahead."""
        by_index = await ask(self.app, method, path, ahead=ahead, **options)
        left = self.left
        self._index.find = lambda _scope: None  # leave it to the router
        by_router = await ask(self.app, method, path, **options)
        del self._index.find
        self.left = left
        assert by_index == by_router
        return by_index

    async def ask_index(self, method, path, **options) -> Answer:
        """Return the answer to a request, which the index must not leave to the router."""
        left = self.left
        answer = await self.ask(method, path, **options)
        assert self.left == left, f"{method} {path} was left to the router"
        return answer

    async def ask_router(self, method, path, **options) -> Answer:
        """Return the answer to a request, which the index must leave to the router."""
        left = self.left
        answer = await self.ask(method, path, **options)
        assert self.left == left + 1, f"{method} {path} was not left to the router"
        return answer


async def ask(
    app, method, path, *, headers=(), host="api.test", body=b"", query=b"", root_path="", ahead=False
) -> Answer:
    """Call an app once. The method `WS` opens a WebSocket. With `ahead` the index of the app is asked before."""
    kind = "websocket" if method == "WS" else "http"
    telemetry = _RequestTelemetry(span=None, span_method=method)
    scope = {
        "type": kind,
        "path": path,
        "root_path": root_path,
        "query_string": query,
        "scheme": "ws" if kind == "websocket" else "http",
        "server": ("api.test", 80),
        "headers": [(b"host", host.encode()), *headers],
        "fastapi.telemetry": telemetry,
        **({"method": method} if kind == "http" else {"subprotocols": []}),
    }
    incoming = [{"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": body}]
    messages = []

    async def receive():
        return incoming.pop() if incoming else await asyncio.Event().wait()  # the client stays

    async def send(message):
        messages.append(message)

    error = None
    try:
        if ahead:
            ask_index(app, scope)
        await app(scope, receive, send)
    except Exception as raised:
        error = repr(raised)
    left_behind = {name: value for name, value in scope.items() if not name.startswith(("fastapi_", "starlette."))}
    left_behind["fastapi"] = scope.get("fastapi") or {}  # the router makes an empty one when it asks in vain
    left_behind["fastapi.telemetry"] = telemetry.route
    return Answer(messages, left_behind, error)


def echo(name, *marks):
    """Return an endpoint that tells its name, and what has reached it."""

    async def endpoint(request: Request):
        scope = request.scope
        return {
            "name": name,
            "marks": [mark(scope) for mark in marks],
            "path_params": {key: repr(value) for key, value in request.path_params.items()},
            "root_path": scope["root_path"],
            "path": scope["path"],
            "router": scope["router"] is scope["app"].router,
            "route": getattr(scope.get("route"), "path", None),
        }

    endpoint.__name__ = name
    return endpoint


def talk(name):
    """Return the endpoint of a WebSocket that tells its name and parameters."""

    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text(f"{name} {websocket.path_params} {websocket.scope['root_path']}")
        await websocket.close()

    endpoint.__name__ = name
    return endpoint
