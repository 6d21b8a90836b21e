"""A time for the head of a request, which uvicorn lacks: without it a few slow clients hold every connection."""

from asyncio import BaseTransport, TimerHandle
from typing import Any

from fastapi_prodkit import _extras

_extras.require("httptools", extra="standard")

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # noqa: E402 - a hint, not a traceback

__all__ = ["PatientProtocol"]


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose next request has begun and has no head in time.

    The time, `config.header_timeout` in seconds, runs from the connection, and again from the first byte of each later
    request; in between it is uvicorn's keep-alive.
    """

    _head: TimerHandle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Expect a request on the new connection."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's own signature is narrower
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect no more."""
        self._have_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Expect the rest of the head."""
        super().on_message_begin()
        if self._head is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Be content: what follows is the body, which the app waits for."""
        self._have_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        config: Any = self.config
        self._head = self.loop.call_later(config.header_timeout, self.transport.close)

    def _have_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = None
