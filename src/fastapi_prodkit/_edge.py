"""What stands around the app, Starlette's own middleware included."""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit._exchange import Exchange, RawHeaders
from fastapi_prodkit._rescue import Rescue
from fastapi_prodkit._stack import Piece, Stack

__all__ = ["PIECES", "Edge"]

PIECES = "fastapi_prodkit"  # scope key and app.state attribute: what dependencies find


class Edge:
    """Let a request through the edge once, and let its dependencies find the pieces.

    An app of ours that is mounted in another one finds the key in the scope and serves without an edge of its own; its
    dependencies find its own pieces first.
    """

    def __init__(self, app: ASGIApp, layers: Sequence[Piece], pieces: Mapping[str, Any]) -> None:
        self.app = app
        self.layers = layers
        rescued = Rescue(app)
        self._stacks = {
            kind: Stack([layer for layer in layers if kind in layer.scope_types], rescued)
            for kind in ("http", "websocket")
        }
        self._pieces = pieces

    def close_connections(self) -> None:
        """Have every response from now on say that its connection is closed; it costs nothing before."""
        stack = self._stacks["http"]
        for starting in (stack.starting, stack.starting_usual):
            starting.append(_close_connection)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        stack = self._stacks.get(scope["type"])
        if stack is None:  # lifespan
            return self.app(scope, receive, send)
        outer = scope.get(PIECES)
        if outer is not None:
            scope[PIECES] = {**outer, **self._pieces}
            return self.app(scope, receive, send)
        scope[PIECES] = self._pieces
        return stack(scope, receive, send)


def _close_connection(exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
    """Say `Connection: close` (RFC 9112 section 9.6), which HTTP/2 forbids and does otherwise."""
    if exchange.scope["http_version"] < "2" and b"connection" not in present:
        headers.append((b"connection", b"close"))
