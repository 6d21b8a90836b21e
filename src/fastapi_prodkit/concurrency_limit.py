"""How many requests are served at a time, and what becomes of the others.

A process that takes on more than it can do serves nobody in time: every request waits for every other one, clients
give up and ask again. Here as many as can be served are served, about as many wait for a moment, and the rest hear at
once that they should come back later (RFC 9110 section 15.6.4).
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

    A request waits for at most `queue_timeout`, first come, first served; if its client disconnects it
    leaves the queue.
    A request counts until the app is done with it: streams for as long as they last, background tasks too. WebSockets
    do not count, nor wait: they live long and are idle most of the time. Each process counts for itself.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        exempt: Paths relative to the app, without trailing slash, that neither count nor wait.
        registry: Where the metrics are shown; prometheus_client's default registry unless given.

    Keyword Args:
        max_concurrent: Most requests that are served at a time. Required.
        queue_timeout: Longest wait for a place among them, seconds; None refuses at once. Default: 1.0.

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
            raise ConfigurationError("LIMITS_MAX_CONCURRENT is not set: say how many requests are served at a time")
        self.app = app
        self._most = settings.max_concurrent
        self._patience = settings.queue_timeout
        self._longest_line = self._most if self._patience is not None else 0
        self.exempt = checked_exempt(exempt)
        self._inside = 0
        self._line: deque[Future[None]] = deque()
        self._meter = _Meter(registry)
        seconds = str(math.ceil(self._patience or 1.0))
        problem = ProblemError(503, "The service is at its limit; try again later.", headers={"Retry-After": seconds})
        served = f"{self._most} requests are being served (LIMITS_MAX_CONCURRENT)"
        full = f"{served}, and as many wait" if self._longest_line else served
        self._queue_full = Refusal(problem, Reason("queue_full", full))
        late = f"{served}, for more than {self._patience} s (LIMITS_QUEUE_TIMEOUT)"
        self._queue_timeout = Refusal(problem, Reason("queue_timeout", late))

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Serve the request if there is room; otherwise let it wait, or refuse it."""
        if self._inside < self._most:  # then nobody waits: who leaves hands the place on
            return partial(self._serve, exchange)
        if len(self._line) < self._longest_line:
            return partial(self._wait, exchange)
        self._meter.count_refusal("queue_full")
        return self._queue_full

    async def _serve(self, exchange: Exchange, _scope: Scope, receive: Receive, send: Send) -> None:
        self._inside += 1
        await self._serve_in_place(exchange, receive, send)

    async def _wait(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(receive)
        place: Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await self._meter.while_waiting(client.wait_for(place, self._patience))
        except BaseException:
            self._withdraw(place)
            raise
        if client.left:
            self._withdraw(place)
        elif place.done():
            await self._serve_in_place(exchange, client.receive, send)
        else:
            self._withdraw(place)
            self._meter.count_refusal("queue_timeout")
            await self._queue_timeout(scope, receive, send)

    async def _serve_in_place(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        try:
            await exchange.call_inner(receive, send)
        finally:
            self._hand_on()

    def _withdraw(self, place: "Future[None]") -> None:
        """Leave the line; or the place, if it came in the same moment."""
        if place.done():
            self._hand_on()
        else:
            self._line.remove(place)

    def _hand_on(self) -> None:
        """Give a place to whoever waits longest."""
        if self._line:
            self._line.popleft().set_result(None)
        else:
            self._inside -= 1


class _Client:
    """Notice that the client leaves while its request waits, and keep what it sends meanwhile for the app.

    At most one part of a body is kept, so that waiting takes no memory; if there is more, that the client has left is
    found out later.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self.left = False

    async def wait_for(self, place: "Future[None]", patience: float | None) -> None:
        """Wait until the place is there, the client has left, or so many seconds are over."""
        gone: Future[None] = place.get_loop().create_future()
        watching = asyncio.create_task(self._watch(gone))
        try:
            await asyncio.wait({place, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            await asyncio.wait([watching])  # nobody else may ask the server for messages before
        if not watching.cancelled():
            watching.result()  # an error of the server's is the request's

    async def receive(self) -> Message:
        """Return what was kept, then what comes."""
        return self._kept.popleft() if self._kept else await self._receive()

    async def _watch(self, gone: "Future[None]") -> None:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.left = True
                gone.set_result(None)
                return
            self._kept.append(message)
            more = not message.get("more_body")


class _Meter:
    """Count what does not get through at once; the others cost nothing."""

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
        """Show one more in line for as long as this takes."""
        with self._queued.track_inprogress():
            await waiting
