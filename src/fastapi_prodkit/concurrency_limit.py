"""Limit how many requests are served at a time.

An overloaded process serves no request in time: all requests wait for each other, and clients time out and retry. Here
up to `max_concurrent` requests are served, as many wait in a queue for a moment, and the others are refused at once
with 503 and Retry-After (RFC 9110 section 15.6.4).
"""

import asyncio
import math
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Collection
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Reason
from fastapi_prodkit._instruments import instrument
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import LimitsSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["ConcurrencyLimitMiddleware"]


class ConcurrencyLimitKeywords(TypedDict, total=False):
    """Fields of `LimitsSettings`."""

    max_concurrent: int
    queue_timeout: float | None


class ConcurrencyLimitMiddleware(Layer):
    """Serve at most `max_concurrent` requests at a time; let as many wait in a queue, and refuse the rest with 503.

        app.add_middleware(ConcurrencyLimitMiddleware, max_concurrent=100)

    A request waits for at most `queue_timeout`, first come, first served. It leaves the queue if its client
    disconnects.

    A request counts until the app returns: a stream until its end, background tasks too. WebSockets neither count nor
    wait, because they are open for long and idle most of the time. Each process counts separately.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        exempt: Paths relative to the app, without trailing slash, that neither count nor wait.
        registry: Where the metrics are shown; prometheus_client's default registry unless given.

    Keyword Args:
        max_concurrent: Most requests that are served at a time. Required.
        queue_timeout: Longest wait in the queue, seconds; None refuses at once. Default: 1.0.

    Raises:
        ConfigurationError: There is no `max_concurrent`; or a keyword does not exist, or its value cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: LimitsSettings | None = None,
        *,
        exempt: Collection[str] = frozenset(),
        registry: "CollectorRegistry | None" = None,
        **keywords: Unpack[ConcurrencyLimitKeywords],
    ) -> None:
        accepted = ConcurrencyLimitKeywords.__optional_keys__
        settings = with_keywords(self, settings or LimitsSettings(), keywords, accepted)
        if settings.max_concurrent is None:
            raise ConfigurationError("LIMITS_MAX_CONCURRENT is not set: set how many requests are served at a time")
        self.app = app
        self._most = settings.max_concurrent
        self._timeout = settings.queue_timeout
        self._queue_size = self._most if self._timeout is not None else 0
        self.exempt = checked_exempt(exempt)
        self._active = 0  # slots in use
        self._queue: deque[Future[None]] = deque()
        self._meter = _Meter(registry)
        seconds = str(math.ceil(self._timeout or 1.0))
        problem = ProblemError(503, "The service is at its limit; try again later.", headers={"Retry-After": seconds})
        served = f"{self._most} requests are being served (LIMITS_MAX_CONCURRENT)"
        full = f"{served}, and as many wait" if self._queue_size else served
        self._queue_full = Refusal(problem, Reason("queue_full", full))
        late = f"{served}, for more than {self._timeout} s (LIMITS_QUEUE_TIMEOUT)"
        self._queue_timeout = Refusal(problem, Reason("queue_timeout", late))

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Serve the request if a slot is free; otherwise let it wait, or refuse it."""
        if self._active < self._most:  # then the queue is empty: `_release` passes each slot on to it
            return partial(self._serve, exchange)
        if len(self._queue) < self._queue_size:
            return partial(self._wait, exchange)
        self._meter.count_refusal("queue_full")
        return self._queue_full

    async def _serve(self, exchange: Exchange, _scope: Scope, receive: Receive, send: Send) -> None:
        self._active += 1
        await self._serve_in_slot(exchange, receive, send)

    async def _wait(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        client = _WaitingClient(receive)
        slot: Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(slot)
        try:
            await self._meter.while_waiting(client.wait_for(slot, self._timeout))
        except BaseException:
            self._withdraw(slot)
            raise
        if client.disconnected:
            self._withdraw(slot)
        elif slot.done():
            await self._serve_in_slot(exchange, client.receive, send)
        else:
            self._withdraw(slot)
            self._meter.count_refusal("queue_timeout")
            await self._queue_timeout(scope, receive, send)

    async def _serve_in_slot(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        try:
            await exchange.call_inner(receive, send)
        finally:
            self._release()

    def _withdraw(self, slot: "Future[None]") -> None:
        """Leave the queue; release the slot if it was given at the same moment."""
        if slot.done():
            self._release()
        else:
            self._queue.remove(slot)

    def _release(self) -> None:
        """Give the slot to the request that has waited longest, or free it."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._active -= 1


class _WaitingClient:
    """Detect that the client disconnects while its request waits, and keep its messages for the app.

    At most one part of a body is kept, to bound the memory of waiting requests. If the body has more parts, a
    disconnect is detected later.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self.disconnected = False

    async def wait_for(self, slot: "Future[None]", timeout: float | None) -> None:  # noqa: ASYNC109 - of `asyncio.wait`
        """Wait until the slot is given, the client has disconnected, or the time-out has expired."""
        disconnect: Future[None] = slot.get_loop().create_future()
        watching = asyncio.create_task(self._watch(disconnect))
        try:
            await asyncio.wait({slot, disconnect}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            await asyncio.wait([watching])  # until then no other task may receive from the server
        if not watching.cancelled():
            watching.result()  # raises an error of the server in the request

    async def receive(self) -> Message:
        """Return the messages that were kept, then those of the server."""
        return self._kept.popleft() if self._kept else await self._receive()

    async def _watch(self, disconnect: "Future[None]") -> None:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
                disconnect.set_result(None)
                return
            self._kept.append(message)
            more = not message.get("more_body")


class _Meter:
    """Count requests that wait or are refused; other requests cost nothing."""

    def __init__(self, registry: "CollectorRegistry | None") -> None:
        from prometheus_client import Counter, Gauge  # noqa: PLC0415 - on first use

        self._refused = instrument(
            Counter,
            "http_server_shed_requests_total",
            "Requests that were refused because too many were being served.",
            ["reason"],
            registry=registry,
        )
        self._queued = instrument(
            Gauge, "http_server_queued_requests", "Requests that wait to be served.", registry=registry
        )

    def count_refusal(self, reason: str) -> None:
        """Count a refusal: `queue_full` or `queue_timeout`."""
        self._refused.labels(reason).inc()

    async def while_waiting(self, waiting: Awaitable[None]) -> None:
        """Count one more request in the queue until `waiting` has ended."""
        with self._queued.track_inprogress():
            await waiting
