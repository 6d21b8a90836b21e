"""One request and its response, as the pieces see it; and what all middleware here has in common.

A piece says what it does when a request enters, when its response starts and when it is over, and `Stack` calls it.
That is what a chain of ASGI middleware does, at half its price: one look at each message for all of them, the
request's headers parsed once, and no wrapper around a wrapper. A piece that has to wait, or to wrap the app, does so
for the requests that need it. Alone, each piece is an ASGI middleware like any other.
"""

import asyncio
from asyncio import CancelledError, Task
from collections.abc import Awaitable, Container, Mapping, Sequence
from contextvars import Token
from functools import cached_property
from time import perf_counter
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit import _context
from fastapi_prodkit._asgi import route_path, route_template
from fastapi_prodkit._interruption import Interruption

LOGGED: Final = "__prodkit_logged__"  # attribute of an exception of which the server need not tell again
CLIENT_LEFT: Final = 499  # nginx's name for it; no client ever sees the status
_KEY: Final = "fastapi_prodkit.exchange"
_READS: Final = frozenset({"GET", "HEAD"})
_TO_TRIM: Final = ("/", "")  # how a path ends that is not the one to compare

RawHeaders = list[tuple[bytes, bytes]]


class Exchange:
    """Watch the messages of one request.

    Attributes:
        scope: The request.
        path: Its path relative to the app, without a trailing slash; "/" for the root.
        headers: Its headers; of several lines with one name the last.
        repeats: Some header has several lines, which is rare; `lines` has them all.
        context: What every log line about the request carries.
        response_headers: What the response will carry, in place of headers of the same names that the app sets.
        complete: The last message of the response has been sent.
        left: The client went away before that.
        status: Once it is over: what the client saw; 499 if it left early, 101 for an open WebSocket.
        duration: Once it is over: seconds until the response was complete; a background task does not count.
        route: Once it is over: the template of the route that served it.
    """

    duration: float
    route: str
    complete = False
    left = False
    status = 0
    interruption: Interruption | None = None

    def __init__(self, stack: "Stack", outer: "Exchange | None", scope: Scope, receive: Receive, send: Send) -> None:
        raw: list[tuple[bytes, bytes]] = scope["headers"]
        path: str = scope["path"]
        self.scope = scope
        self.root_path = root_path = scope.get("root_path", "")  # mounts lengthen it
        self.path = route_path(scope) if root_path or path[-1:] in _TO_TRIM else path
        self.headers: dict[bytes, bytes] = dict(raw)
        self.repeats = len(self.headers) != len(raw)
        self.context: dict[str, Any] = {} if outer is None else outer.context
        self.response_headers: dict[bytes, bytes] = {}
        self.starting = stack.starting
        self.leaving = stack.leaving
        self.failing = stack.failing
        self._entering = iter(stack.entering)
        self._app = stack.app
        self._receive = receive
        self._send = send
        self._start = perf_counter()

    def is_exempt(self, exempt: Container[str]) -> bool:
        """Say whether this is a request for one of these paths: a GET or HEAD, which is what probes send.

        A piece that asks for every request looks at `path` first, which saves the call.
        """
        return self.path in exempt and self.scope.get("method") in _READS

    @staticmethod
    def of(scope: Scope) -> "Exchange | None":
        """Return the exchange that a piece has opened for this request, if one has."""
        return scope.get(_KEY)

    @classmethod
    def current(cls, scope: Scope) -> "Exchange | None":
        """Return the exchange of exactly this request and app.

        One that was opened outside of a mount is another app's, and one of another scope speaks of another request.
        """
        exchange = cls.of(scope)
        if exchange is None or exchange.scope is not scope or exchange.root_path != scope.get("root_path", ""):
            return None
        return exchange

    def lines(self, name: bytes) -> list[bytes]:
        """Return every line of a header of the request."""
        return [value for key, value in self.scope["headers"] if key == name]

    def proceed(self, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request with what is further in: the pieces that have not seen it yet, and then the app."""
        for enter in self._entering:
            answer = enter(self)
            if answer is not None:
                return answer(self.scope, receive, send)
        return self._app(self.scope, receive, send)

    def join(self, piece: "Piece", alone: "Stack") -> None:
        """Let in a piece that stands further in than the exchange was opened."""
        self.starting = [*alone.starting, *self.starting]
        self.leaving = [*alone.leaving, *self.leaving]
        if _does(piece, "fail"):
            self.failing = piece.fail
        self._entering = iter(alone.entering)
        self._app = alone.app

    def interrupt(self, task: "Task[Any]", answer: ASGIApp) -> None:
        """Cancel the task that serves the request, and have this answer it at once, unless a response has started.

        What the app still sends goes nowhere, however long it takes to end.
        """
        if self.status or self.interruption is not None:
            return
        self.interruption = Interruption(task, answer(self.scope, self.receive, self.send), self.context)
        task.cancel()

    async def settle(self) -> bool:
        """Wait for what answers in place of the app; say whether that, and nobody else, has cancelled the request."""
        return self.interruption is not None and await self.interruption.end()

    async def receive(self) -> Message:
        """Pass a message to the app."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Pass a message to the server."""
        if self.interruption is not None and not self.interruption.answers():
            await asyncio.sleep(0)  # not nothing at all: an app that does not stop would stop all others
            return
        kind: str = message["type"]
        if kind == "http.response.start":
            message = self._begin_response(message["status"], message)
        elif kind != "http.response.body":
            message = self._note(kind, message)
        try:
            await self._send(message)
        except OSError:  # ASGI 2.4: the server says so when the client has gone
            self.left |= not self.complete
            raise
        if kind == "http.response.body" and not message.get("more_body"):
            self.complete = True
            self.duration = perf_counter() - self._start

    def end(self) -> None:
        """Settle what came of the request, and tell the pieces that want to know."""
        if not self.complete:
            self.duration = perf_counter() - self._start
        self.status = CLIENT_LEFT if self.left else self.status or 500
        self.route = route_template(self.scope, self.root_path)
        for leave in self.leaving:
            leave(self)

    def _begin_response(self, status: int, message: Message) -> Message:
        self.status = status
        ours, starting = self.response_headers, self.starting
        if not ours and not starting:
            return message
        headers = list(message.get("headers", ()))
        present = dict(headers)
        if not b"-".join(present).islower():  # ASGI asks for lower case, and not every app minds
            headers = [(name.lower(), value) for name, value in headers]
            present = dict(headers)
        if not ours.keys().isdisjoint(present):
            headers = [pair for pair in headers if pair[0] not in ours]
        for start in starting:
            start(self, headers, present)
        headers += ours.items()
        return {**message, "headers": headers}  # the app may send its own again

    def _note(self, kind: str, message: Message) -> Message:
        if kind == "websocket.accept":
            return self._begin_response(101, message)
        if kind == "websocket.http.response.start" and not self.status:
            return self._begin_response(message["status"], message)
        if kind == "websocket.close":
            self.status = self.status or 403  # closed before it was accepted: servers answer 403
        elif kind == "http.response.pathsend":
            self.complete = True
            self.duration = perf_counter() - self._start
        return message


class Piece:
    """The base of every middleware. Whatever of the four it does not need, it leaves out, and it costs nothing."""

    app: ASGIApp
    scope_types: frozenset[str] = frozenset({"http"})
    interrupts = False  # it may interrupt the app, and so needs an exchange that is opened where it stands

    def enter(self, exchange: Exchange) -> ASGIApp | None:
        """Begin a request. Return what serves it instead, if anything does: a refusal, or what calls `proceed`."""

    def start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Change the headers of a response that starts, in place; `present` is what the app has set."""

    def leave(self, exchange: Exchange) -> None:
        """Take note of a request that is over."""

    def fail(self, exchange: Exchange, error: Exception) -> bool:  # noqa: ARG002 - for pieces that override it
        """Take note of an exception, and say whether that is the end of it; the innermost piece that does is asked."""
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in self.scope_types:
            await self.app(scope, receive, send)
            return
        exchange = None if self.interrupts else Exchange.current(scope)
        if exchange is None:
            await self._alone(scope, receive, send)
            return
        exchange.join(self, self._alone)
        await exchange.proceed(receive, send)

    @cached_property
    def _alone(self) -> "Stack":
        return Stack([self], self.app)


class Stack:
    """Pieces around an app, outermost first.

    A piece that answers a request ends its way in. The pieces further in than the first that may do so have nothing
    to do with responses: they have no `start`, and a `leave` only if they can tell that they have not been entered.
    """

    def __init__(self, pieces: Sequence[Piece], app: ASGIApp) -> None:
        self.app = app
        self.entering = [piece.enter for piece in pieces if _does(piece, "enter")]
        self.starting = [piece.start for piece in reversed(pieces) if _does(piece, "start")]
        self.leaving = [piece.leave for piece in reversed(pieces) if _does(piece, "leave")]
        self.failing = next((piece.fail for piece in reversed(pieces) if _does(piece, "fail")), Piece().fail)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        outer: Exchange | None = scope.get(_KEY)
        scope[_KEY] = exchange = Exchange(self, outer, scope, receive, send)
        token: Token[Any] | None = _context.begin(exchange.context)
        try:
            await exchange.proceed(exchange.receive, exchange.send)
        except CancelledError as cancelled:
            if not await exchange.settle():
                # Before the end of the response: some servers say so of a client that has left.
                exchange.left |= not exchange.complete
                vars(cancelled)[LOGGED] = True  # a stream that ends with the process is no error to be traced
                raise
        except Exception as error:
            await exchange.settle()
            if not exchange.failing(exchange, error):
                if LOGGED not in vars(error):
                    token = None  # the context stays: the server logs the exception after this call
                raise
        else:
            if exchange.interruption is not None:
                await exchange.settle()
        finally:
            if exchange.leaving:  # otherwise nobody asks what came of it
                exchange.end()
            scope[_KEY] = outer  # not this one: it refers to the scope, a cycle that only the garbage collector ends
            if token is not None:
                _context.end(token)


def _does(piece: Piece, role: str) -> bool:
    return getattr(type(piece), role) is not getattr(Piece, role)
