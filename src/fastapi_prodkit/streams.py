"""End streams at shutdown or when they are idle, and keep them open with heartbeats: event streams (SSE) and others.

A stream that never ends delays the end of the process until the grace is over, and is then closed in the middle. So a
route says what happens to its streams when the process ends, and when nothing is sent for a while:

    @app.get("/events", dependencies=[Depends(Stream("end", heartbeat=15, idle_timeout=300))])
    async def events() -> StreamingResponse:
        return StreamingResponse(read_events(), media_type="text/event-stream")
"""

import asyncio
import math
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from time import perf_counter
from typing import Any, Literal, cast, get_args

from starlette.requests import HTTPConnection

from fastapi_prodkit import _scope
from fastapi_prodkit._pipeline.cancellation import cancellable_exchange, cut
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.interruption import Interruption
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["Stream"]

AtShutdown = Literal["finish", "end", "cut"]
_LAST_TIME = 1.0  # seconds that a client may take to read the last chunk of a stream that is ended
_START_TIME = 0.05  # seconds between two checks whether a response has started


class Stream:
    """Say how the streams of a route or router end: `Depends(Stream("end", heartbeat=15))`.

    Each chunk of the app must be complete in itself, such as a whole event, because a heartbeat may follow it. A stream
    that has a Content-Length or is compressed gets neither heartbeats nor a last chunk, and `end` has no effect on it.

    Args:
        at_shutdown: What happens when the drain is over: `finish` lets the stream use the grace, `end` completes the
            response at once, so that the client connects to another process, `cut` closes the connection at once.
        last: The last chunk of a stream that is ended, such as the result of `fastapi.sse.format_sse_event`.
        heartbeat: Send `heartbeat_chunk` when nothing has been sent for this time, seconds; None sends none.
        heartbeat_chunk: By default a comment, which every client of an event stream ignores.
        idle_timeout: End the stream when the app has sent nothing for this time, seconds; heartbeats do not count.

    Raises:
        ConfigurationError: A value cannot be used; or, during a request, no layer can cancel the app.
    """

    def __init__(
        self,
        at_shutdown: AtShutdown = "finish",
        *,
        last: bytes = b"",
        heartbeat: float | None = None,
        heartbeat_chunk: bytes = b": heartbeat\n\n",
        idle_timeout: float | None = None,
    ) -> None:
        if at_shutdown not in get_args(AtShutdown):
            raise ConfigurationError(f"Stream({at_shutdown!r}): use finish, end or cut")
        for name, seconds in {"heartbeat": heartbeat, "idle_timeout": idle_timeout}.items():
            if seconds is not None and not 0 < seconds < math.inf:
                raise ConfigurationError(f"Stream({name}={seconds}): use a positive number of seconds, or None")
        self._at_shutdown = at_shutdown
        self._last = last
        self._heartbeat = math.inf if heartbeat is None else heartbeat
        self._heartbeat_chunk = heartbeat_chunk
        self._idle_timeout = math.inf if idle_timeout is None else idle_timeout

    async def __call__(self, connection: HTTPConnection) -> AsyncIterator[None]:
        """Apply the options to the stream of this request. Called by FastAPI, before the handler."""
        scope = connection.scope
        exchange = cancellable_exchange(scope)
        if exchange is None or scope["type"] != "http":
            if scope["type"] == "http" and _scope.installed(scope) is None:
                raise ConfigurationError("Stream has no effect here: add DeadlineMiddleware to the app")
            yield
            return
        shutdown = (_scope.installed(scope) or {}).get("shutdown")
        watching = asyncio.create_task(self._watch(exchange))
        ending = _Ending(exchange, self._at_shutdown, self._last)
        try:
            with nullcontext() if shutdown is None else shutdown.at_stop(ending.begin):
                yield
        finally:
            watching.cancel()
            ending.cancel()

    async def _watch(self, exchange: Exchange) -> None:
        """Send heartbeats, and end the stream when it has been idle for `idle_timeout`."""
        if math.isinf(min(self._heartbeat, self._idle_timeout)):
            return
        interval = min(_START_TIME, self._heartbeat, self._idle_timeout)
        while not exchange.status:  # noqa: ASYNC110 - setting an event would cost every response
            await asyncio.sleep(interval)
        await asyncio.sleep(interval)  # by now a response in one part is complete, and not a stream
        while not exchange.complete and exchange.interruption is None:
            now, stream = perf_counter(), exchange.open_stream()
            idle_at = stream.active_at + self._idle_timeout
            beat_at = (stream.sent_at if stream.open_ended else now) + self._heartbeat
            if now >= idle_at:
                _end(exchange, self._last, "idle_timeout")
                return
            if now >= beat_at:
                with suppress(OSError):  # the client has disconnected, or does not read until the stream is idle
                    async with asyncio.timeout(None if math.isinf(idle_at) else idle_at - now):
                        await stream.add(self._heartbeat_chunk)
            else:
                await asyncio.sleep(min(idle_at, beat_at) - now)


class _Ending:
    """End one stream when the drain is over: at once, or when its response starts."""

    def __init__(self, exchange: Exchange, at_shutdown: AtShutdown, last: bytes) -> None:
        self._exchange = exchange
        self._at_shutdown = at_shutdown
        self._last = last
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """End the stream as `at_shutdown` says. Called when the drain is over."""
        exchange = self._exchange
        if self._at_shutdown == "finish" or exchange.complete or exchange.interruption is not None:
            return
        if not exchange.status:
            self._timer = asyncio.get_running_loop().call_later(_START_TIME, self.begin)
        elif self._at_shutdown == "cut":
            exchange.open_stream()
            cut(exchange, "shutdown")
        elif exchange.open_stream().open_ended:
            _end(exchange, self._last, "shutdown")

    def cancel(self) -> None:
        """Cancel the timer: the stream has ended."""
        if self._timer is not None:
            self._timer.cancel()


def _end(exchange: Exchange, last: bytes, reason: str) -> None:
    """Cancel the app and complete its stream with a last chunk; close the connection if that is impossible."""
    if not exchange.open_stream().open_ended:
        cut(exchange, reason)
        return
    exchange.context.end_reason = reason
    task = cast("Task[Any]", exchange.task)
    exchange.interruption = Interruption(task, _complete(exchange, last), exchange.context)
    task.cancel()


async def _complete(exchange: Exchange, last: bytes) -> None:
    with suppress(OSError, TimeoutError):  # the client has disconnected, or does not read
        async with asyncio.timeout(_LAST_TIME):
            await exchange.send({"type": "http.response.body", "body": last})
