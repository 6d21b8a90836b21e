"""Observe the database: metrics of pool and queries, counts in the access log, slow and repeated statements.

Values are never logged: statements are logged with their placeholders.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.pool import QueuePool

from fastapi_prodkit import _context
from fastapi_prodkit._instruments import collector, instrument
from fastapi_prodkit.sections import DatabaseSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Histogram
    from prometheus_client.core import Metric

__all__ = ["observe"]

# Seconds; OpenTelemetry semantic conventions, database metrics, db.client.operation.duration.
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
_LONGEST = 2_000  # characters of a statement in a log line
_REMEMBERED = 100  # requests whose statements are counted; beyond it the oldest is dropped

_logger = logging.getLogger("fastapi_prodkit.database")


def observe(
    engine: Engine, settings: DatabaseSettings, *, pool: str, registry: "CollectorRegistry | None" = None
) -> None:
    """Measure and log the statements of an engine.

    Args:
        engine: The synchronous engine inside of an AsyncEngine.
        settings: Thresholds for slow and repeated statements, and whether statements get a comment with the request id.
        pool: The value of the label `pool`.
        registry: Registry of the metrics. Default: prometheus_client's default registry.
    """
    from prometheus_client import Histogram  # noqa: PLC0415 - on first use: an app without a database does not load it

    durations = instrument(
        Histogram,
        "db_client_operation_duration_seconds",
        "Duration of database operations.",
        ["pool"],
        registry=registry,
        buckets=BUCKETS,
    ).labels(pool)
    watch = _Watch(settings, durations)
    event.listen(engine, "before_cursor_execute", watch.before, retval=True)
    event.listen(engine, "after_cursor_execute", watch.after)
    event.listen(engine, "handle_error", watch.failed)
    observe_waits(engine, pool=pool, registry=registry)
    collector(_Pools, registry).engines[engine] = pool


def observe_waits(engine: Engine, *, pool: str, registry: "CollectorRegistry | None" = None) -> None:
    """Measure how long callers wait for a connection of the engine, and how many are waiting."""
    from prometheus_client import Histogram  # noqa: PLC0415 - on first use

    waits = instrument(
        Histogram,
        "db_client_connections_wait_time_seconds",
        "Time it took to obtain a connection from the pool.",
        ["pool"],
        registry=registry,
        buckets=BUCKETS,
    ).labels(pool)
    waiting = collector(_Pools, registry).waiting
    connect = engine.raw_connection

    def timed() -> Any:
        waiting[pool] += 1
        started = perf_counter()
        try:
            return connect()
        finally:
            waiting[pool] -= 1
            waits.observe(perf_counter() - started)

    engine.raw_connection = timed  # type: ignore[method-assign]  # the pool has no event before a checkout


class _Watch:
    """Listener that measures each statement."""

    def __init__(self, settings: DatabaseSettings, durations: "Histogram") -> None:
        self._slow = settings.slow_query
        self._repeats = settings.n_plus_one
        self._comment = settings.sql_comment
        self._durations = durations
        # Key: id() of the request's context, which the entry keeps alive. A ContextVar would count per task.
        self._counts: OrderedDict[int, tuple[dict[str, Any], Counter[str]]] = OrderedDict()

    def before(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        rest[0].prodkit_started = perf_counter()  # the execution's context
        if self._comment:
            statement += _comment(_context.current() or {})
        return statement, parameters

    def after(self, _connection: Any, _cursor: Any, statement: str, _parameters: Any, *rest: Any) -> None:
        self._log_slow(statement, perf_counter() - rest[0].prodkit_started)

    def failed(self, context: Any) -> None:
        """Measure a statement that failed, most often by a time-out."""
        started = getattr(context.execution_context, "prodkit_started", None)
        if started is not None and context.statement is not None:  # None if fetching rows failed
            self._log_slow(context.statement, perf_counter() - started)

    def _log_slow(self, statement: str, seconds: float) -> None:
        self._durations.observe(seconds)
        request = _context.current()
        if request is not None:
            request["db_query_count"] = request.get("db_query_count", 0) + 1
            request["db_time_ms"] = round(request.get("db_time_ms", 0.0) + seconds * 1000, 3)
            if self._repeats is not None:
                self._count(request, statement, self._repeats)
        if self._slow is not None and seconds >= self._slow:
            _logger.warning(
                "slow query", extra={"db_statement": statement[:_LONGEST], "db_duration_ms": round(seconds * 1000, 3)}
            )

    def _count(self, request: dict[str, Any], statement: str, most: int) -> None:
        known = self._counts.get(id(request))
        if known is None:
            known = self._counts[id(request)] = request, Counter()
            if len(self._counts) > _REMEMBERED:
                self._counts.popitem(last=False)
        counts = known[1]
        counts[statement] += 1
        if counts[statement] == most + 1:
            _logger.warning(
                "the same statement more than %d times in one request: load related rows by one statement",
                most,
                extra={"db_statement": statement[:_LONGEST]},
            )


class _Pools:
    """Collector of the pools' state at each scrape."""

    def __init__(self) -> None:
        self.engines: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()
        self.waiting: Counter[str] = Counter()

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - on first use

        usage = GaugeMetricFamily("db_client_connections_usage", "Connections by state.", labels=["pool", "state"])
        most = GaugeMetricFamily("db_client_connections_max", "Connections that the pool may open.", labels=["pool"])
        over = GaugeMetricFamily(
            "db_client_connections_overflow", "Connections beyond the pool's size.", labels=["pool"]
        )
        pending = GaugeMetricFamily(
            "db_client_connections_pending_requests", "Callers that wait for a connection.", labels=["pool"]
        )
        for name, numbers in self._sums().items():
            used, idle, maximum, overflow = numbers
            usage.add_metric([name, "used"], used)
            usage.add_metric([name, "idle"], idle)
            most.add_metric([name], maximum)
            over.add_metric([name], overflow)
            pending.add_metric([name], self.waiting[name])
        yield from (usage, most, over, pending)

    def _sums(self) -> dict[str, tuple[int, ...]]:
        """Return the sums of pools with equal names: each of several apps may have one."""
        sums: dict[str, tuple[int, ...]] = {}
        for engine, name in list(self.engines.items()):
            pool: Any = engine.pool
            if not isinstance(pool, QueuePool):
                continue  # other pools have no counts
            numbers = (pool.checkedout(), pool.checkedin(), pool.size() + pool._max_overflow, max(0, pool.overflow()))  # noqa: SLF001 - not public
            sums[name] = tuple(map(sum, zip(numbers, sums.get(name, (0, 0, 0, 0)), strict=True)))
        return sums


def _comment(request: dict[str, Any]) -> str:
    """Return a comment in SQLCommenter's format; values are escaped, so that no value can end the comment."""
    pairs = [f"{name}='{quote(str(request[name]), safe='')}'" for name in ("request_id", "trace_id") if name in request]
    return f" /*{','.join(pairs)}*/" if pairs else ""
