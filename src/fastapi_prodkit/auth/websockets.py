"""WebSockets of browsers, which cannot send an `Authorization` line with a handshake (WHATWG, WebSockets standard).

A token comes among the subprotocols of the handshake, or in the first message:

    new WebSocket(url, ["bearer", token])       // any route; further subprotocols may follow
    socket.send(`Bearer ${token}`)              // a public route that calls `authenticate_first_message`

Either becomes an `Authorization` line, so that one and the same code reads, verifies and refuses it. The marker and the
token are two subprotocols, in place of one as in Kubernetes, because a browser fails a handshake if the server selects
none of the subprotocols that were offered: so the response selects the marker, and never repeats the token.
"""

import asyncio
import math
import weakref
from contextlib import suppress
from typing import Final

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._context import Reason
from fastapi_prodkit._problem import raisable
from fastapi_prodkit.auth.caller import note_caller
from fastapi_prodkit.auth.rules import Requirement, auth_of
from fastapi_prodkit.auth.user import User
from fastapi_prodkit.exceptions import ProblemError

__all__ = ["GuardedWebSocket", "authenticate_first_message"]

_MARKER: Final = "bearer"
_PROTOCOLS: Final = b"sec-websocket-protocol"
_LONGEST_MESSAGE: Final = 10_000  # characters that are read; a token of this length is refused, as it has over 8 KiB
_CLOSE_TIME: Final = 1.0  # seconds that a client may take to read what was sent before it is closed
_UNAUTHORIZED: Final = 3000  # IANA's registry of WebSocket close codes
_EXPIRED: Final = {"code": _UNAUTHORIZED, "reason": "The token or key has expired."}


async def authenticate_first_message(
    websocket: WebSocket,
    *required: Requirement,
    timeout: float = 10.0,  # noqa: ASYNC109 - the time of a client, not of the caller
) -> User:
    """Return the caller, from the first message of a public WebSocket, which is as an `Authorization` header would be.

        @app.websocket("/events")
        @public
        async def events(websocket: WebSocket) -> None:
            user = await authenticate_first_message(websocket, require_scopes("events:read"))

    The WebSocket is accepted, unless it is already.

    Args:
        websocket: Of the handler.
        required: What the caller must have.
        timeout: Longest time until the message is received, seconds.

    Raises:
        WebSocketException: The caller is refused, and the WebSocket closed: with 3000 for a 401, 3003 for a 403, 3008
            after the time-out, else as an open WebSocket is by any `ProblemError`.
        WebSocketDisconnect: The client has disconnected.
        ConfigurationError: The app has no authentication.
    """
    auth = auth_of(websocket)
    GuardedWebSocket.of(websocket)  # before it is accepted
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept()
    try:
        line = b"authorization", await _receive_text(websocket, timeout)
        scope = {**websocket.scope, "headers": [*websocket.scope["headers"], line]}
        user: User = await auth.current_user(HTTPConnection(scope))
        note_caller(websocket.scope, auth, user)
        for requirement in required:
            requirement.check(user)
    except ProblemError as problem:
        refusal = raisable(websocket, problem)
    else:
        return user
    raise refusal  # outside of `except`, so that it has no other exception as its context


async def _receive_text(websocket: WebSocket, seconds: float) -> bytes:
    """Return the first message; nothing if it is not text."""
    try:
        async with asyncio.timeout(seconds):
            message = await websocket.receive()
    except TimeoutError:
        _context.refuse(Reason("request_timeout", f"no first message within {seconds:g} seconds"))
        raise ProblemError(408) from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"], message.get("reason"))
    return (message.get("text") or "")[:_LONGEST_MESSAGE].encode(errors="replace")


class GuardedWebSocket:
    """The messages of one WebSocket, which is closed when the token or key of its caller expires.

    The token among its subprotocols becomes an `Authorization` line. So no handler can select it.

    Args:
        scope: Of the handshake, which has not been accepted yet; it is changed.
        receive: Returns the next message of the server.
        send: Passes a message to the server.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._is_marked = _move_token(scope)
        self._is_open = False
        self._expires_at = math.inf  # on the clock of the event loop
        self._timer: asyncio.TimerHandle | None = None
        self._is_expired = False
        self._waiting: asyncio.Timeout | None = None
        self._closing: asyncio.Task[None] | None = None
        scope[_scope.WEBSOCKET] = self

    @classmethod
    def of(cls, connection: HTTPConnection) -> "GuardedWebSocket | None":
        """Return that of a connection, and guard a WebSocket that no guard has seen; None for other connections."""
        scope = connection.scope
        known: GuardedWebSocket | None = scope.get(_scope.WEBSOCKET)
        if known is not None or not isinstance(connection, WebSocket):
            return known
        guarded = cls(scope, connection._receive, connection._send)  # noqa: SLF001 - no dependency can wrap the messages
        guarded._is_open = connection.application_state is WebSocketState.CONNECTED
        connection._receive, connection._send = guarded.receive, guarded.send  # noqa: SLF001 - as above
        vars(connection).pop("_headers", None)  # those that were read before the token was moved
        weakref.finalize(connection, guarded.end)
        return guarded

    def close_in(self, seconds: float) -> None:
        """Close the WebSocket after this time, if it is open; the shortest of several times counts."""
        self._expires_at = min(self._expires_at, asyncio.get_running_loop().time() + seconds)
        self._start_timer()

    def end(self) -> None:
        """Cancel the timer: the WebSocket is closed."""
        if self._timer is not None:
            self._timer.cancel()

    async def receive(self) -> Message:
        """Return the next message of the server; a disconnect if the caller's token has expired. Called by the app."""
        if self._timer is None:
            return await self._receive()
        if not self._is_expired:
            try:
                async with asyncio.timeout(None) as self._waiting:
                    message = await self._receive()
            except TimeoutError:
                if not self._is_expired:
                    raise
            finally:
                self._waiting = None
        if self._is_expired:
            return {"type": "websocket.disconnect", **_EXPIRED}
        if message["type"] == "websocket.disconnect":
            self.end()
        return message

    async def send(self, message: Message) -> None:
        """Pass a message to the server. Called by the app.

        Raises:
            OSError: The caller's token has expired; ASGI 2.4 has this error for a client that has disconnected.
        """
        if self._is_expired:
            raise OSError("the WebSocket is closed: the token or key of the caller has expired")
        opens = message["type"] == "websocket.accept"
        if opens and self._is_marked and not message.get("subprotocol"):
            message = {**message, "subprotocol": _MARKER}
        elif message["type"] == "websocket.close":
            self.end()
        await self._send(message)
        if opens:
            self._is_open = True
            self._start_timer()

    def _start_timer(self) -> None:
        if self._is_open and self._expires_at < math.inf:
            self.end()
            self._timer = asyncio.get_running_loop().call_at(self._expires_at, self._expire)

    def _expire(self) -> None:
        self._is_expired = True
        _context.explain_end("token_expired")
        self._closing = asyncio.get_running_loop().create_task(self._close())

    async def _close(self) -> None:
        """Close the WebSocket, then end the app's wait for a message."""
        with suppress(OSError, RuntimeError, TimeoutError):  # it is closed already, or the client does not read
            async with asyncio.timeout(_CLOSE_TIME):
                await self._send({"type": "websocket.close", **_EXPIRED})
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())


def _move_token(scope: Scope) -> bool:
    """Make an `Authorization` line of the token among the subprotocols; return whether the marker is among them.

    What cannot be one token becomes an empty line or several lines, which are refused.
    """
    offered = scope.get("subprotocols") or ()
    if _MARKER not in offered:
        return False
    names, others, tokens = iter(offered), [], []
    for name in names:
        if name == _MARKER:
            tokens.append(next(names, ""))
        else:
            others.append(name)
    moved = frozenset(tokens)
    tokens += [name for name in others if name in moved]
    scope["subprotocols"] = others = [name for name in others if name not in moved]
    lines = [(b"authorization", f"Bearer {token}") for token in tokens]
    if others:
        lines.append((_PROTOCOLS, ", ".join(others)))
    encoded = [(name, value.encode("latin-1", "replace")) for name, value in lines]
    scope["headers"] = [pair for pair in scope["headers"] if pair[0] != _PROTOCOLS] + encoded
    return True
