"""Bytes and times of a response that is sent in several parts: a stream."""

from collections.abc import Iterable
from time import perf_counter

from starlette.types import Send

__all__ = ["ResponseStream"]

_FRAMING = frozenset({b"content-length", b"content-encoding"})  # with either, no chunk can be added


class ResponseStream:
    """Record the bytes and times of a stream whose response has started.

    Args:
        headers: The headers of the response.
        send: Passes a message to the server.

    Attributes:
        open_ended: Chunks may be added, and the stream may end after any of them: it has no Content-Length and is not
            compressed.
        size: Bytes that have been sent.
        first_byte_at: When the first chunk was sent, on the clock of `perf_counter`; None before.
        active_at: When the app sent its last chunk, not counting comments of an event stream, such as heartbeats.
        sent_at: When the last chunk was sent, heartbeats included.
    """

    __slots__ = ("_has_comments", "_send", "active_at", "first_byte_at", "open_ended", "sent_at", "size")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], send: Send) -> None:
        self._send = send
        names = dict(headers)
        self.open_ended = _FRAMING.isdisjoint(names)
        self._has_comments = names.get(b"content-type", b"").startswith(b"text/event-stream")
        self.size = 0
        self.first_byte_at: float | None = None
        self.sent_at = self.active_at = perf_counter()

    def count(self, chunk: bytes) -> None:
        """Count a chunk that the app has sent."""
        self.sent_at = now = perf_counter()
        if self.first_byte_at is None:
            self.first_byte_at = now
        self.size += len(chunk)
        if not self._has_comments or bytes(chunk[:1]) != b":":
            self.active_at = now

    async def add(self, chunk: bytes) -> None:
        """Send a chunk between those of the app."""
        active_at = self.active_at
        self.count(chunk)
        self.active_at = active_at
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
