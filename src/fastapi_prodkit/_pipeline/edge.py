"""What stands around the app, Starlette's own middleware included."""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import RawHeaders
from fastapi_prodkit._pipeline.layers import Layer, LayerStack

__all__ = ["Edge"]


class Edge:
    """Let a request through the edge once, and let its dependencies find the pieces.

    An app of ours that is mounted in another one finds the key in the scope and serves without an edge of its own; its
    dependencies find its own pieces first.
    """

    def __init__(self, app: ASGIApp, layers: Sequence[Layer], pieces: Mapping[str, Any]) -> None:
        self.app = app
        self.layers = layers
        self._stacks = {
            kind: LayerStack([layer for layer in layers if kind in layer.scope_types], app)
            for kind in ("http", "websocket")
        }
        self._pieces = pieces

    def close_connections(self) -> None:
        """Have every response from now on say that its connection is closed; it costs nothing before."""
        hooks = self._stacks["http"].hooks
        for starting in (hooks.on_response_start, hooks.on_plain_response_start):
            starting.append(_close_connection)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        stack = self._stacks.get(scope["type"])
        if stack is None:  # lifespan
            return self.app(scope, receive, send)
        outer = scope.get(_scope.INSTALLED)
        if outer is not None:
            scope[_scope.INSTALLED] = {**outer, **self._pieces}
            return self.app(scope, receive, send)
        scope[_scope.INSTALLED] = self._pieces
        return stack(scope, receive, send)


def _close_connection(exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
    """Say `Connection: close` (RFC 9112 section 9.6), which HTTP/2 forbids and does otherwise."""
    if exchange.scope["http_version"] < "2" and b"connection" not in present:
        headers.append((b"connection", b"close"))
