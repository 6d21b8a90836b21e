"""One request and its response, as the pieces see it: each message is looked at once, for all of them."""

import asyncio
from asyncio import Task
from collections.abc import Awaitable, Callable, Container, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._asgi import route_path, route_template
from fastapi_prodkit._interruption import Interruption

if TYPE_CHECKING:
    from fastapi_prodkit._stack import Stack

LOGGED: Final = "__prodkit_logged__"  # attribute of an exception of which the server need not tell again
CLIENT_LEFT: Final = 499  # nginx's name for it; no client ever sees the status
KEY: Final = "fastapi_prodkit.exchange"  # where the scope has it
_READS: Final = frozenset({"GET", "HEAD"})
_TO_TRIM: Final = ("/", "")  # how a path ends that is not the one to compare
_USUAL: Final = frozenset({b"content-length", b"content-type"})  # with these alone nothing has to give way to anything

RawHeaders = list[tuple[bytes, bytes]]
Enter = Callable[["Exchange"], ASGIApp | None]


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
        begun: When the request came, on the clock of `perf_counter`.
        task: What serves it; there once it has waited for something, if some piece may interrupt it then.
        stack: The pieces that have to do with it.
        from_server: Where the app's messages come from; a piece may put itself in between.
        outer: The exchange around this one: of an app around this app, or of a piece around a copied scope.
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
    deadline: Any = None  # what watches over its time while it lasts, and belongs to `deadline`
    task: "Task[Any] | None" = None
    _entering: Iterator[Enter]
    _app: ASGIApp

    def __init__(self, stack: "Stack", outer: "Exchange | None", scope: Scope, receive: Receive, send: Send) -> None:
        raw: list[tuple[bytes, bytes]] = scope["headers"]
        path: str = scope["path"]
        self.scope = scope
        self.outer = outer
        self.root_path = root_path = scope.get("root_path", "")  # mounts lengthen it
        self.path = route_path(scope) if root_path or path[-1:] in _TO_TRIM else path
        self.headers: dict[bytes, bytes] = dict(raw)
        self.repeats = len(self.headers) != len(raw)
        self.context: dict[str, Any] = {} if outer is None else outer.context
        self.response_headers: dict[bytes, bytes] = {}
        self.stack = stack
        self.from_server = receive
        self._send = send
        self.begun = perf_counter()

    def is_exempt(self, exempt: Container[str]) -> bool:
        """Say whether this is a request for one of these paths: a GET or HEAD, which is what probes send.

        A piece that asks for every request looks at `path` first, which saves the call.
        """
        return self.path in exempt and self.scope.get("method") in _READS

    @staticmethod
    def of(scope: Scope) -> "Exchange | None":
        """Return the exchange that a piece has opened for this request, if one has."""
        return scope.get(KEY)

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
        """Serve the request with what is further in: the pieces that have not seen it yet, and then the app.

        For a piece that did not let it pass at once.
        """
        for enter in self._entering:
            answer = enter(self)
            if answer is not None:
                return answer(self.scope, receive, send)
        self.watch(perf_counter())  # it may have waited already
        return self._app(self.scope, receive, send)

    def watch(self, since: float) -> None:
        """Tell the pieces that want to know that the app waits, or may from now on; it has had the request since then.

        The last to call it before others run has to be the task that serves the request.
        """
        if not self.stack.interrupts:
            return
        self.task = asyncio.current_task()
        for wait in self.stack.waiting:
            wait(self, since)

    def join(self, alone: "Stack") -> None:
        """Let in a piece that stands further in than the exchange was opened."""
        self.stack = alone.within(self.stack)
        self.stop_at(iter(alone.entering), alone.app)

    def stop_at(self, entering: Iterator[Enter], app: ASGIApp) -> None:
        """Note where `proceed` goes on."""
        self._entering = entering
        self._app = app

    def interrupt(self, answer: ASGIApp) -> None:
        """Cancel the task that serves the request, and have this answer it at once, unless a response has started.

        What the app still sends goes nowhere, however long it takes to end.
        """
        if self.status or self.interruption is not None:
            return
        task = cast("Task[Any]", self.task)
        self.interruption = Interruption(task, answer(self.scope, self.receive, self.send), self.context)
        task.cancel()

    async def settle(self) -> bool:
        """Wait for what answers in place of the app; say whether that, and nobody else, has cancelled the request."""
        return self.interruption is not None and await self.interruption.end()

    async def receive(self) -> Message:
        """Pass a message to the app."""
        message = await self.from_server()
        if message["type"] == "http.disconnect" and not self.complete:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Pass a message to the server."""
        if self.interruption is not None and not self.interruption.answers():
            await asyncio.sleep(0)  # not nothing at all: an app that does not stop would stop all others
            return
        kind: str = message["type"]
        if kind == "http.response.body":
            last = not message.get("more_body")
        elif kind == "http.response.start":
            last = False
            message = self._begin_response(message["status"], message)
        else:
            last = kind == "http.response.pathsend"
            message = self._note(kind, message)
        try:
            await self._send(message)
        except OSError:  # ASGI 2.4: the server says so when the client has gone
            self.left |= not self.complete
            raise
        if last:
            self.complete = True
            self.duration = perf_counter() - self.begun

    def end(self) -> None:
        """Settle what came of the request, and tell the pieces that want to know."""
        if self.deadline is not None:
            self.deadline.pop(self, None)
        leaving = self.stack.leaving
        if not leaving:
            return
        if not self.complete:
            self.duration = perf_counter() - self.begun
            self.status = self.status or 500
        if self.left:
            self.status = CLIENT_LEFT
        self.route = route_template(self.scope, self.root_path)
        for leave in leaving:
            leave(self)

    def _begin_response(self, status: int, message: Message) -> Message:
        self.status = status
        ours, stack = self.response_headers, self.stack
        if not ours and not stack.starting:
            return message
        headers = list(message.get("headers", ()))
        present = dict(headers)
        if present.keys() <= _USUAL:
            for start in stack.starting_usual:
                start(self, headers, present)
        else:
            headers = self._merge(headers, present)
        headers += ours.items()
        return {**message, "headers": headers}  # the app may send its own again

    def _merge(self, headers: RawHeaders, present: dict[bytes, bytes]) -> RawHeaders:
        if not b"-".join(present).islower():  # ASGI asks for lower case, and not every app minds
            headers = [(name.lower(), value) for name, value in headers]
            present = dict(headers)
        for start in self.stack.starting:
            start(self, headers, present)
        return [pair for pair in headers if pair[0] not in self.response_headers]

    def _note(self, kind: str, message: Message) -> Message:
        if kind == "websocket.accept":
            return self._begin_response(101, message)
        if kind == "websocket.http.response.start" and not self.status:
            return self._begin_response(message["status"], message)
        if kind == "websocket.close":
            self.status = self.status or 403  # closed before it was accepted: servers answer 403
        return message
