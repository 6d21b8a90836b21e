"""Limit the head of a request, which uvicorn does not: its time, its size, and its number of header lines.

Without a time-out, a few slow clients can occupy all connections. Without a maximum size, one endless header line
blocks the event loop, because httptools joins all parts of a line again for each part that arrives.

A request that is refused here never reaches the app. The app's edge still sends the response, so that it has the same
headers, access log line and metrics as other refusals.
"""

import sys
from asyncio import BaseTransport, TimerHandle
from typing import Any, Final, Literal
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope, Send

from fastapi_prodkit import _extras

_extras.require("httptools", extra="standard")

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade  # noqa: E402 - after the check above
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol  # noqa: E402 - after the check above

from fastapi_prodkit._context import Code, Reason  # noqa: E402
from fastapi_prodkit._pipeline.edge import Edge  # noqa: E402
from fastapi_prodkit._pipeline.exchange import Exchange  # noqa: E402
from fastapi_prodkit._problem import Refusal  # noqa: E402
from fastapi_prodkit.access_log import AccessLogMiddleware  # noqa: E402
from fastapi_prodkit.exceptions import ProblemError  # noqa: E402
from fastapi_prodkit.sections import LimitsSettings  # noqa: E402

__all__ = ["HeadLimitProtocol"]

_LINGER: Final = 1.0  # seconds before close, for the client to read the response; data it still sends is dropped
_MAX_DROPPED: Final = 1_048_576  # bytes; beyond it the connection is closed at once
_DETAILS: Final = {
    400: "The request is not valid HTTP.",
    408: "The head of the request did not arrive in time.",
    431: "The head of the request is too large, or has too many lines.",  # RFC 6585 section 5
}


class _TooManyLinesError(Exception):
    """The head has too many header lines; raised through the parser to stop it."""


class HeadLimitProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits for the head of a request.

    `config.header_timeout`, in seconds, runs from the start of the connection, and from the first byte of each later
    request; between requests uvicorn's keep-alive time-out applies. An incomplete head after this time is answered by
    408; a connection without any data is closed.

    `config.limits` has `max_head_size` and `max_headers`. A head that exceeds one of them is answered by 431, and the
    connection is closed. The same happens for more than `max_head_size` bytes of a body without content, such as
    endless trailers. Trailers are dropped, because uvicorn would add them to the headers.
    """

    _reading: Literal["nothing", "head", "body"] = "nothing"
    _head: TimerHandle | None = None
    _refused = False
    _dropped = 0  # bytes received since the refusal
    _progress = False  # whether a head was completed or body data arrived since this was last set to False

    def connection_made(self, transport: BaseTransport) -> None:
        """Start the header time-out of a new connection."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's own signature is narrower
        config: Any = self.config
        limits: LimitsSettings | None = config.limits
        self._max_size = (limits and limits.max_head_size) or sys.maxsize
        self._max_lines = (limits and limits.max_headers) or sys.maxsize
        self._left = self._max_size  # bytes that may still arrive without progress
        self._max_time: float = config.header_timeout
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the header time-out."""
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received data in parts of at most the maximum head size; drop data after a refusal."""
        self._unset_keepalive_if_required()
        while data and not self.transport.is_closing():
            if self._refused:
                self._drop(len(data))
                return
            part, data = data[: self._left], data[self._left :]
            self._progress = False
            self._parse(part)
            self._left = self._max_size if self._progress else self._left - len(part)
            if not self._left and not self._refused:
                what = "trailers or chunk extensions" if self._reading == "body" else "head"
                self._refuse(431, "head_too_large", f"{what} larger than LIMITS_MAX_HEAD_SIZE={self._max_size}")

    def on_message_begin(self) -> None:
        """Start the header time-out if it is not running."""
        super().on_message_begin()
        self._reading = "head"
        if self._head is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        """Cancel the header time-out: the head is complete."""
        if len(self.headers) > self._max_lines:
            raise _TooManyLinesError
        super().on_headers_complete()
        if not self.parser.should_upgrade():  # an upgrade has no trailers, and needs the headers
            self.headers = []  # a list for trailers: uvicorn would append them to the app's headers
        self._cancel_head_timer()
        self._progress = True
        self._reading = "body"

    def on_body(self, body: bytes) -> None:
        """Record that body data has arrived."""
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Reset the limits for the next request."""
        self._progress = True
        self._reading = "nothing"
        super().on_message_complete()

    def _parse(self, data: bytes) -> None:
        """Parse the data as uvicorn does, and refuse a request that is malformed or has too many header lines."""
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._unsupported_upgrade_warning()
        except HttpParserError as error:
            if isinstance(error.__context__, _TooManyLinesError):
                self._refuse(431, "head_too_large", f"more header lines than LIMITS_MAX_HEADERS={self._max_lines}")
            else:
                # Messages of the parser do not repeat the client's data; those of callbacks do.
                wrong = "the target cannot be read" if isinstance(error, HttpParserCallbackError) else error
                self._refuse(400, "malformed_request", f"not valid HTTP: {wrong}")

    def _refuse(self, status: int, code: Code, text: str) -> None:
        """Send a refusal in place of the app's response, and stop parsing."""
        self._refused = True
        self._cancel_head_timer()
        refusal = Refusal(ProblemError(status, _DETAILS[status]), Reason(code, text))
        if self._reading == "body":
            self.loop.call_soon(self._refuse_body, refusal)  # after the app's task has started
        else:
            self._refuse_head(refusal)

    def _refuse_head(self, refusal: Refusal) -> None:
        """Send the refusal of a request that the app has not seen; close after the client had time to read it.

        If an earlier request has no response yet, close without a response: the client would mistake it for that one.
        """
        edge = getattr(self.app, "middleware_stack", None)
        app = edge.around_refusal(refusal) if isinstance(edge, Edge) else AccessLogMiddleware(refusal)
        send: Send = _nothing
        if getattr(self.cycle, "response_complete", True):  # None before the first request
            send = self._write
            self._head = self.loop.call_later(_LINGER, self.transport.close)
        else:
            self.transport.close()
        task = self.loop.create_task(_serve(app, self._scope_of_head(), send))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _refuse_body(self, refusal: Refusal) -> None:
        """Send the refusal in place of an app that waits for the body; if its response has started, close."""
        self.cycle.keep_alive = False
        scope: Any = self.cycle.scope
        exchange = Exchange.innermost(scope)
        if exchange is None or exchange.task is None or not exchange.interrupt(refusal):
            self.transport.close()

    def _scope_of_head(self) -> Scope:
        """Return a scope with what is known of a refused request; its method is None if it is unknown."""
        begun = self._reading == "head"
        target = self.url if begun and self.url.startswith(b"/") else b""
        path = target.partition(b"?")[0]
        return {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.parser.get_method().decode() if target else None,
            "scheme": self.scheme,
            "path": self.root_path + unquote(path.decode("latin-1")),
            "raw_path": self.root_path.encode() + path,
            "query_string": b"",
            "root_path": self.root_path,
            "headers": [*self.headers] if begun else [],
            "client": self.client,
            "server": self.server,
            "state": self.app_state.copy(),
            "app": self.app,  # for the route template of the path
        }

    async def _write(self, message: Message) -> None:
        """Write a message of the refusal to the connection."""
        if message["type"] == "http.response.start":
            headers = [*self.server_state.default_headers, *message["headers"], (b"connection", b"close")]
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[message["status"]] + lines + b"\r\n")
        else:
            self.transport.write(message["body"])

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > _MAX_DROPPED:
            self.transport.close()

    def _start_head_timer(self) -> None:
        self._head = self.loop.call_later(self._max_time, self._miss_head)

    def _miss_head(self) -> None:
        """Called when the header time-out expires: refuse an incomplete head, or close a connection without data."""
        if self._reading == "head":
            self._refuse(408, "head_timeout", f"head not complete after --header-timeout={self._max_time:g} s")
        else:
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = None


async def _serve(app: ASGIApp, scope: Scope, send: Send) -> None:
    await app(scope, _nothing, send)


async def _nothing(message: Message | None = None) -> Any:
    """Receive or send nothing: for a connection that is no longer used."""
