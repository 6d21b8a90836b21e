"""Limits of the head of a request, which uvicorn lacks: a time, a size, and a number of lines.

Without a time a few slow clients hold every connection. Without a size one endless header line stops the event loop:
httptools joins the parts of a line anew with each part that comes.
"""

import json
import logging
import sys
from asyncio import BaseTransport, TimerHandle
from typing import Any, Final

from fastapi_prodkit import _extras

_extras.require("httptools", extra="standard")

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # noqa: E402 - a hint, not a traceback

from fastapi_prodkit.sections import LimitsSettings  # noqa: E402

__all__ = ["PatientProtocol"]

_LINGER: Final = 1.0  # seconds in which a client that is refused can read why, while what it still sends is dropped
_MOST_DROPPED: Final = 1_048_576  # bytes of it
_BODY: Final = json.dumps(
    {
        "type": "about:blank",
        "title": "Request Header Fields Too Large",
        "status": 431,
        "detail": "The head of the request is too large, or has too many lines.",
    }
).encode()
_REFUSAL: Final = (  # RFC 6585 section 5
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/problem+json\r\n"
    b"cache-control: no-store\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_BODY), _BODY)
)

_logger = logging.getLogger("fastapi_prodkit.serve")


class _HeadTooLargeError(Exception):
    """The head has too many lines; raised through the parser, which stops."""


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which limits the head of a request.

    `config.header_timeout`, in seconds, runs from the connection, and again from the first byte of each later request;
    in between it is uvicorn's keep-alive. A head that is not there in time closes the connection.

    `config.limits` has `max_head_size` and `max_headers`. A head beyond one of them is a 431 and the end of the
    connection; so are more bytes than `max_head_size` in a body that bring nothing of it, such as endless trailers.
    """

    _head: TimerHandle | None = None
    _refused = False
    _dropped = 0  # bytes that have come since
    _progress = False  # the head is complete, or something of a body has come, since this was last set to False

    def connection_made(self, transport: BaseTransport) -> None:
        """Expect a request on the new connection."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's own signature is narrower
        config: Any = self.config
        limits: LimitsSettings | None = config.limits
        self._max_size = (limits and limits.max_head_size) or sys.maxsize
        self._max_lines = (limits and limits.max_headers) or sys.maxsize
        self._left = self._max_size  # bytes that may come without progress
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect no more."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, at most as much at a time as a head may have; or drop it."""
        while data and not self.transport.is_closing():
            if self._refused:
                self._drop(len(data))
                return
            part, data = data[: self._left], data[self._left :]
            self._progress = False
            super().data_received(part)
            self._left = self._max_size if self._progress else self._left - len(part)
            if not self._left:
                self._refuse(f"larger than LIMITS_MAX_HEAD_SIZE={self._max_size}")

    def on_message_begin(self) -> None:
        """Expect the rest of the head."""
        super().on_message_begin()
        if self._head is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Expect no more of the head: what follows is the body, which the app waits for."""
        self._have_head()
        self._progress = True
        if len(self.headers) > self._max_lines:
            raise _HeadTooLargeError
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note that something of the body has come."""
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count anew."""
        self._progress = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read, or was told to stop at."""
        if len(self.headers or ()) > self._max_lines:
            self._refuse(f"more lines than LIMITS_MAX_HEADERS={self._max_lines}")
        else:
            super().send_400_response(msg)

    def _refuse(self, reason: str) -> None:
        """Answer 431, and close the connection when the client has had time to read that.

        Without an answer if an earlier request has none yet: the client would take the 431 for it.
        """
        self._refused = True
        _logger.warning("the head of a request of %s is refused: %s", self.client and self.client[0], reason)
        self._have_head()
        if getattr(self.cycle, "response_complete", True):  # there is no cycle before the first request
            self.transport.write(_REFUSAL)
            self._head = self.loop.call_later(_LINGER, self.transport.close)
        else:
            self.transport.close()

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > _MOST_DROPPED:
            self.transport.close()

    def _expect_head(self) -> None:
        config: Any = self.config
        self._head = self.loop.call_later(config.header_timeout, self.transport.close)

    def _have_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = None
