"""The state of one request and its response, shared by all layers, so that each message is inspected once."""

import asyncio
from asyncio import Task
from collections.abc import Awaitable
from time import perf_counter
from typing import Any, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import REPLACED_BY_LIMIT, UNMATCHED, route_path, route_template
from fastapi_prodkit._context import Reason, RequestContext
from fastapi_prodkit._pipeline.hooks import Hooks, RawHeaders
from fastapi_prodkit._pipeline.interruption import Interruption
from fastapi_prodkit._pipeline.listener import DisconnectListener
from fastapi_prodkit._pipeline.stream import ResponseStream
from fastapi_prodkit._pipeline.timers import Deadline
from fastapi_prodkit._routing.requested_template import requested_template

__all__ = ["CLIENT_DISCONNECTED", "Exchange"]

CLIENT_DISCONNECTED: Final = 499  # nginx's status for a client that has disconnected; for logs and metrics only
_FORBIDDEN: Final = 403  # the status that servers send if an app closes a handshake before it accepts it
_TO_NORMALIZE: Final = ("/", "")  # last characters of a path that `route_path` changes
_PLAIN: Final = frozenset({b"content-length", b"content-type"})  # no layer's header replaces or depends on these


class Exchange:
    """Pass the messages of one request between server and app, and call the hooks of the layers.

    Attributes:
        scope: The request.
        path: Its path relative to the app, without a trailing slash; "/" for the root.
        root_path: The scope's root_path when the exchange was opened; mounts further in lengthen the scope's.
        headers: Its headers by name; of a repeated header, the last value.
        has_repeated_headers: Some header has several lines; `header_values` returns all of them.
        context: The fields of every log line about the request, and further facts for its access line.
        response_headers: Headers to add to the response; they replace headers of the same names that the app sets. All
            exchanges of a request share them, and the outermost adds them. If two layers set one, the inner layer wins.
        complete: The server has taken the last message of the response.
        client_disconnected: The client disconnected before the response was complete.
        send_failed: Sending a message of the app has failed, in the server or in a layer.
        body_received: Bytes of the request's body that have been received.
        request_complete: The last message of the request's body has been received.
        exempt: The path is in `exempt` of some layer, whose hooks are not called.
        started_at: When the request arrived, on the clock of `perf_counter`.
        task: The task that serves the request; set before an app that a layer has returned is called, and before the
            app itself if a layer may cancel it.
        hooks: The hooks of the layers that handle the request.
        app: The app that serves the request after the layers; a layer may replace it.
        listener: Listens for the disconnect of the client, if a layer or a route asks for it.
        deadline: The time-out of the request, if a layer has started one; it counts from `waiting_since`.
        waiting_since: When `on_wait` was called, or the request arrived, on the clock of `perf_counter`.
        interruption: The answer that is sent in place of the app's, if the app was cancelled.
        receive_from_server: Returns the next message of the server; a layer may wrap it.
        stream: What has been sent so far of a response in several parts.
        outer: The exchange around this one: of an app around this app, or of a layer around a copied scope.
        status: The status of the response; 0 before it starts. From `on_end` on it is 499 if the client has
            disconnected early, and 101 for an open WebSocket.
        duration: From `on_end` on: seconds until the response was complete, without background tasks.
        route: From `on_end` on: the template of the route that served the request, or that would have served it if
            the request was refused before routing.
        refusal: From `on_end` on: why the request was refused, if it was.
    """

    duration: float
    route: str
    complete = False
    client_disconnected = False
    send_failed = False
    body_received = 0
    request_complete = False
    exempt = False
    status = 0
    refusal: Reason | None = None
    interruption: Interruption | None = None
    deadline: Deadline | None = None
    waiting_since: float | None = None
    listener: DisconnectListener | None = None
    task: "Task[Any] | None" = None
    stream: ResponseStream | None = None
    _start: Message  # the first message of the response, as the app has sent it
    _held = False  # a layer has returned an app, which may delay the request before it calls `call_inner`

    def __init__(  # noqa: PLR0913, PLR0917 - called for every request: keywords cost
        self,
        hooks: "Hooks[Exchange]",
        app: ASGIApp,
        outer: "Exchange | None",
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        raw: RawHeaders = scope["headers"]
        path: str = scope["path"]
        self.scope = scope
        self.outer = outer
        self.root_path = root_path = scope.get("root_path", "")
        self.path = route_path(scope) if root_path or path[-1:] in _TO_NORMALIZE else path
        self.headers: dict[bytes, bytes] = dict(raw)
        self.has_repeated_headers = len(self.headers) != len(raw)
        self.context: RequestContext = RequestContext() if outer is None else outer.context
        self.response_headers: dict[bytes, bytes] = {} if outer is None else outer.response_headers
        self.hooks = hooks
        self._remaining = iter(hooks.on_request)
        self.app = app
        self.receive_from_server = receive
        self._send = send
        self.started_at = perf_counter()

    @staticmethod
    def innermost(scope: Scope) -> "Exchange | None":
        """Return the exchange that was opened last for this request, if a layer has opened one."""
        return scope.get(_scope.EXCHANGE)

    @classmethod
    def for_this_app(cls, scope: Scope) -> "Exchange | None":
        """Return the exchange of exactly this request and app.

        None for an exchange that was opened by an outer app, which has another root_path, or for another scope.
        """
        exchange = cls.innermost(scope)
        if exchange is None or exchange.scope is not scope or exchange.root_path != scope.get("root_path", ""):
            return None
        return exchange

    def header_values(self, name: bytes) -> list[bytes]:
        """Return the value of every line of a request header."""
        return [value for key, value in self.scope["headers"] if key == name]

    def set_request_header(self, name: bytes, value: bytes) -> None:
        """Set a header of the request, in place of all its lines, for everything further in."""
        headers = self.scope["headers"]
        if name in self.headers:
            headers = [pair for pair in headers if pair[0] != name]
        self.headers[name] = value
        self.scope["headers"] = [*headers, (name, value)]

    def call_inner(self, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request with the layers that have not seen it yet, and then the app.

        Called by the stack, and by the app that a layer has returned from `on_request`.
        """
        for on_request in self._remaining:
            answer = on_request(self)
            if answer is not None:
                self._held = True
                self.task = asyncio.current_task()  # the app may read the body, which has a time-out
                return answer(self.scope, receive, send)
        if self.hooks.may_cancel_app and self.waiting_since is None:
            # A delay by such an app does not count.
            self.start_deadlines(perf_counter() if self._held else self.started_at)
        return self.app(self.scope, receive, send)

    def replace_hooks(self, hooks: "Hooks[Exchange]") -> None:
        """Serve the request with other hooks. Called before any hook was called."""
        self.hooks = hooks
        self._remaining = iter(hooks.on_request)

    def add_layers(self, hooks: "Hooks[Exchange]", app: ASGIApp) -> None:
        """Add a layer found below this open exchange: `hooks` has its hooks and those of the outer layers."""
        self.replace_hooks(hooks)
        self.app = app

    def start_deadlines(self, started_at: float) -> None:
        """Call `on_wait` of each layer, immediately before the app is called; deadlines count from `started_at`.

        Must be called from the task that serves the request, because a deadline cancels the calling task.
        """
        self.waiting_since = started_at
        self.task = asyncio.current_task()
        for on_wait in self.hooks.on_wait:
            on_wait(self, started_at)

    def interrupt(self, answer: ASGIApp) -> bool:
        """Cancel the task that serves the request and send this answer, unless a response has started.

        What the app sends from now on is dropped, however long it takes to end. Returns whether the task is cancelled.
        """
        if self.status or self.interruption is not None:
            return False
        task = cast("Task[Any]", self.task)
        self.interruption = Interruption(task, answer(self.scope, self.receive, self.send), self.context)
        task.cancel()
        return True

    async def finish_interruption(self) -> bool:
        """Wait until the answer is sent; return True if only the interruption has cancelled the request."""
        if self.interruption is None:
            return False
        alone = self.interruption.withdraw_cancellation()
        await self.interruption.wait_closed()
        return alone

    async def receive(self) -> Message:
        """Return the next message of the server. Called by the app."""
        message = await self.receive_from_server()
        if message["type"] == "http.disconnect":
            self.client_disconnected |= not self.complete
            return message
        self.body_received += len(message.get("body", b""))
        if not message.get("more_body"):
            self.request_complete = True
        return message

    async def send(self, message: Message) -> None:
        """Pass a message to the server. Called by the app."""
        if self.interruption is not None and not self.interruption.is_current_task():
            await asyncio.sleep(0)  # an app that was cancelled and keeps sending must not starve other requests
            return
        kind: str = message["type"]
        before = self.status
        try:
            if kind == "http.response.start":
                message = self._start_response(message["status"], message)
            elif kind != "http.response.body":
                message = self._start_websocket_response(kind, message)
            await self._send(message)
        except Exception as error:
            if not isinstance(error, REPLACED_BY_LIMIT):
                self.status = before  # the server has not taken the message, so the client does not see it
                self.send_failed = True
            # ASGI 2.4: a server raises an OSError if the client has disconnected.
            self.client_disconnected |= isinstance(error, OSError) and not self.complete
            raise
        if kind == "http.response.body":
            last = not message.get("more_body")
            if not last or self.stream is not None:
                (self.stream or self.open_stream()).count(message.get("body", b""))
        else:
            last = kind == "http.response.pathsend"
        if last:
            self.complete = True
            self.duration = perf_counter() - self.started_at

    def open_stream(self) -> ResponseStream:
        """Return the `ResponseStream` of a response that has started; the first call creates it."""
        if self.stream is None:
            self.stream = ResponseStream(self._start.get("headers", ()), self._send)
        return self.stream

    def finish(self) -> None:
        """Set status, duration and route of a finished request, and call `on_end`."""
        if self.deadline is not None:
            self.deadline.cancel(self)
        if self.listener is not None:
            self.listener.close()
            self.listener = None  # the listener refers to this exchange
        on_end = self.hooks.on_end
        if not on_end:
            return
        if not self.complete:
            self.duration = perf_counter() - self.started_at
            self.status = self.status or 500
        if self.client_disconnected:
            self.status = CLIENT_DISCONNECTED
        self.route = route_template(self.scope, self.root_path)
        if self.status >= 400:  # noqa: PLR2004 - the first status of an error
            self.refusal = self.context.refusal(self.status, self.scope["type"])
            if self.refusal is not None and self.route == UNMATCHED:  # it was refused before routing
                self.route = requested_template(self.scope, self.root_path)
        for hook in on_end:
            hook(self)

    def _start_response(self, status: int, message: Message) -> Message:
        self.status = status
        self._start = message
        hooks = self.hooks
        ours = self.response_headers if self.outer is None else {}  # the outermost exchange adds them
        if not ours and not hooks.on_response_start:
            return message
        headers = list(message.get("headers", ()))
        present = dict(headers)
        if present.keys() <= _PLAIN:
            for hook in hooks.on_plain_response_start:
                hook(self, headers, present)
        else:
            headers = self._merge_headers(headers, present, ours)
        headers += ours.items()
        return {**message, "headers": headers}  # a copy: the app may send its message again

    def _merge_headers(self, headers: RawHeaders, present: dict[bytes, bytes], ours: dict[bytes, bytes]) -> RawHeaders:
        if not b"-".join(present).islower():  # ASGI requires lower-case names; some apps violate this
            headers = [(name.lower(), value) for name, value in headers]
            present = dict(headers)
        for hook in self.hooks.on_response_start:
            hook(self, headers, present)
        return [pair for pair in headers if pair[0] not in ours]

    def _start_websocket_response(self, kind: str, message: Message) -> Message:
        if kind == "websocket.accept":
            return self._start_response(101, message)
        if kind == "websocket.http.response.start" and not self.status:
            self.context.explain_handshake(message["status"], f"the app has answered it with {message['status']}")
            return self._start_response(message["status"], message)
        if kind == "websocket.close":
            self.refusal = self.context.explain_close(message, is_open=self.status > 0)
            self.status = self.status or _FORBIDDEN
        return message
