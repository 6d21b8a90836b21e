"""Prometheus metrics of HTTP requests, named by OpenTelemetry's semantic conventions.

A client cannot increase the number of series: the label `route` is the template of the route, or `_unmatched`; an
unknown method is `_OTHER`. The status of a request whose client disconnected is 499.

The numbers are plain integers and floats, which a custom collector reads at each scrape. Recording takes less than 1 us
per request; prometheus_client's own histogram takes about 4.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fastapi_prodkit import _scope
from fastapi_prodkit._bearer import BearerToken
from fastapi_prodkit._context import Reason
from fastapi_prodkit._instruments import collector, instrument
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import MetricsSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["MetricsMiddleware", "metrics_router"]

# Seconds; OpenTelemetry semantic conventions, HTTP metrics, http.server.request.duration.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_MAX_PENDING = 100  # durations of a series that are collected, then counted together in about 10 us
_THREADS = 2  # for rendering, separate from the app's 40
# RFC 9110 section 9, and PATCH (RFC 5789).
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})


class MetricsMiddleware(Layer):
    """Measure each request: `http_server_request_duration_seconds` and `http_server_active_requests`.

        app.add_middleware(MetricsMiddleware, exempt={"/metrics"})

    `http_server_refusals_total` counts refused requests by reason. WebSocket connections are not measured, because they
    last much longer than requests; refused handshakes are counted.

    Args:
        app: The app to serve.
        exempt: Paths relative to the app, without trailing slash, that are not measured. Refusals with a reason, such
            as a wrong token, are counted there as well.
        registry: Registry of the metrics. Default: prometheus_client's default registry. The numbers of several apps
            with one registry are added up.
    """

    scope_types = frozenset({"http", "websocket"})
    may_answer = False

    def __init__(
        self,
        app: ASGIApp,
        *,
        exempt: Collection[str] = frozenset(),
        registry: "CollectorRegistry | None" = None,
    ) -> None:
        self.app = app
        self.exempt = checked_exempt(exempt)
        self._metrics = collector(_HttpMetrics, registry)
        self._refusals = _Refusals(registry)
        self.where_exempt = self._refusals

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if the outer layer uses the same registry: a request must not be measured twice."""
        return None if isinstance(outer, MetricsMiddleware) and outer._metrics is self._metrics else self  # noqa: SLF001 - of the class

    def on_request(self, exchange: Exchange) -> None:
        """Count the request as active."""
        if exchange.scope["type"] == "http":
            self._metrics.active.append(None)

    def on_end(self, exchange: Exchange) -> None:
        """Measure the request, and count its refusal."""
        if exchange.refusal is not None:
            self._refusals.count(exchange.refusal)
        if exchange.scope["type"] == "websocket":
            return
        recorded, key = self._metrics, (exchange.scope["method"], exchange.route, exchange.status)
        histogram = recorded.durations.get(key)
        if histogram is None or len(histogram.pending) >= _MAX_PENDING:
            histogram = recorded.count(*key)
        histogram.pending.append(exchange.duration)
        recorded.active.pop()


class _Refusals(Layer):
    """Count refusals. As a layer, only those with a reason: a failing probe's 503 is not a refusal."""

    def __init__(self, registry: "CollectorRegistry | None") -> None:
        self._registry = registry

    def on_end(self, exchange: Exchange) -> None:
        if exchange.refusal is not None and exchange.refusal is exchange.context.reason:
            self.count(exchange.refusal)

    def count(self, reason: Reason) -> None:
        from prometheus_client import Counter  # noqa: PLC0415 - on first use

        name, text = "http_server_refusals_total", "Requests that were refused, and why."
        instrument(Counter, name, text, ["reason"], registry=self._registry).labels(reason.code).inc()


def metrics_router(
    settings: MetricsSettings | None = None, *, registry: "CollectorRegistry | None" = None
) -> APIRouter:
    """Return a router with `GET /metrics`, in Prometheus's text format or OpenMetrics, as the client accepts.

    It answers 404 unless the settings allow access: by `public`, or by `token`, which clients send as
    `Authorization: Bearer <token>`. Separate threads render the metrics, so it answers even if the app's threads are
    all blocked.

    With several worker processes, each of them shows the numbers of all, after the router's lifespan has started.
    """
    from prometheus_client import REGISTRY  # noqa: PLC0415 - on first use: an app without metrics does not load it
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

    from fastapi_prodkit.metrics.aggregation import Collectors  # noqa: PLC0415
    from fastapi_prodkit.metrics.multiprocess import Workers  # noqa: PLC0415

    settings = settings or MetricsSettings()
    own = registry or REGISTRY
    workers = Workers.of(own)
    shown = cast("CollectorRegistry", workers or Collectors(own))  # only `collect` is called
    token = None if settings.token is None else BearerToken(settings.token, registry=registry)
    threads = CapacityLimiter(_THREADS)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:  # noqa: ARG001 - the signature of a lifespan
        with nullcontext() if workers is None else workers.joined():
            yield

    router = APIRouter(lifespan=lifespan)

    # With HEAD, like all our GET routes.
    @router.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    async def metrics(request: Request) -> Response:
        if not settings.public:
            if token is None:
                raise ProblemError(404)
            token.authorize(request)
        try:
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
        except TypeError:  # raised for a version that is not a number
            encode, media_type = choose_encoder("")
        return Response(await to_thread.run_sync(encode, shown, limiter=threads), media_type=media_type)

    if not settings.public:
        vars(metrics)[_scope.ENDPOINT_ACCESS] = "METRICS_TOKEN"
    return router


class _HttpMetrics:
    """The numbers of both metrics, and their collector."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.active: list[None] = []  # its length is the number of active requests: append and pop need no lock
        self.durations: dict[tuple[str, str, int], _Histogram] = {}

    def count(self, method: str, route: str, status: int) -> "_Histogram":
        """Return the histogram of these labels, creating it if needed, with pending durations counted."""
        key = (method if method in _METHODS else "_OTHER", route, status)
        with self.lock:
            histogram = self.durations.setdefault(key, _Histogram())
            histogram.count()
        return histogram

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily  # noqa: PLC0415 - on first use

        labels = ["http_request_method", "http_route", "http_response_status_code"]
        durations = HistogramMetricFamily(
            "http_server_request_duration_seconds", "Duration of HTTP server requests.", labels=labels
        )
        with self.lock:
            active = len(self.active)
            for each in self.durations.values():
                each.count()
            histograms = [(key, list(each.counts), each.sum) for key, each in self.durations.items()]
        for (method, route, status), counts, total in histograms:
            durations.add_metric([method, route, str(status)], list(_cumulate(counts)), total)
        yield durations
        yield GaugeMetricFamily(
            "http_server_active_requests", "Number of active HTTP server requests.", value=float(active)
        )


class _Histogram:
    """Counts by bucket, and pending durations in a deque, whose append needs no lock."""

    __slots__ = ("counts", "pending", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0
        self.pending: deque[float] = deque()

    def count(self) -> None:
        for _ in range(len(self.pending)):
            duration = self.pending.popleft()
            self.counts[bisect_left(BUCKETS, duration)] += 1
            self.sum += duration


def _cumulate(counts: list[int]) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
        total += count
        yield bound, float(total)
