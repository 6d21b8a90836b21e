"""A circuit breaker for the shared store: while the store fails it is skipped, and probed once a second.

Only the requests during which a store fails or is slow wait for its time-out. Later requests skip the store at once. A
background task probes the store, independent of requests.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from fastapi_prodkit._instruments import instrument
from fastapi_prodkit.rate_limit.remote import reason_about_key
from fastapi_prodkit.rate_limit.time_limit import TimeLimit

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["StoreOutage"]

_logger = logging.getLogger("fastapi_prodkit.rate_limit")

INTERVAL: Final = 1.0  # seconds from one probe to the next
_LOG_INTERVAL: Final = 60.0  # seconds between two log lines about keys that the store cannot count

Probe = Callable[[], Awaitable[None]]


class StoreOutage:
    """Track whether the store fails; each change writes one log line and sets the metric `rate_limit_storage_up`.

    Args:
        policy: How requests are decided during an outage; for the log line.
        timeout: The store is back if it answers on an open connection within this time, seconds.
        registry: Registry of the metrics.

    Attributes:
        active: Whether the store fails and has to be skipped.
    """

    def __init__(self, policy: str, *, timeout: float, registry: "CollectorRegistry | None" = None) -> None:
        from prometheus_client import Counter, Gauge  # noqa: PLC0415 - on first use

        self._policy = policy
        self._timeout = timeout
        self._up = instrument(
            Gauge,
            "rate_limit_storage_up",
            "Whether the rate limit's store works.",
            registry=registry,
            multiprocess_mode="livemin",  # 0 if one of several workers does not reach the store
        )
        self._up.set(1)
        self._decisions = instrument(
            Counter,
            "rate_limit_storage_missed_total",
            "Requests that were decided without the rate limit's store.",
            ["policy"],
            registry=registry,
        ).labels(policy)
        self.active = False
        self._probe_at = 0.0
        self._key_logged_at = -_LOG_INTERVAL
        self._task: asyncio.Task[None] | None = None

    def report(self, error: Exception) -> None:
        """Begin an outage because of an error; if the error is about the value of one key, log it only."""
        reason = reason_about_key(error)
        if reason is not None:
            self._log_key_error(reason)
        elif not self.active:
            self.active = True
            self._probe_at = time.monotonic() + INTERVAL
            self._up.set(0)
            reason = str(error) if isinstance(error, OSError) and error.errno else type(error).__name__
            _logger.warning("the rate limit's store fails (%s); until it is back: %s", reason, self._policy)

    def probe_until_back(self, probe: Probe) -> None:
        """During an outage, start the task that probes the store once a second, unless one is running.

        Args:
            probe: Probes the store; raises if the store fails.
        """
        if self.active and (self._task is None or self._task.done()):  # a task ends with its event loop
            self._task = asyncio.create_task(self._probe_until_back(probe))

    def count_fallback(self) -> None:
        """Count a request that was decided without the store, in the metric."""
        self._decisions.inc()

    def close(self) -> None:
        """Stop probing."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _probe_until_back(self, probe: Probe) -> None:
        while self.active:
            await asyncio.sleep(self._probe_at - time.monotonic())
            self._probe_at = time.monotonic() + INTERVAL
            await self._probe(probe)

    async def _probe(self, probe: Probe) -> None:
        try:
            # The first probe may have to connect, which takes several round trips; no request waits for it.
            with TimeLimit(INTERVAL):
                await probe()
            with TimeLimit(self._timeout):
                await probe()
        except Exception as error:  # noqa: BLE001 - the store still fails, unless the error is about one key
            if reason_about_key(error) is None:
                return
        self.active = False
        self._up.set(1)
        _logger.info("the rate limit's store is back")

    def _log_key_error(self, reason: str) -> None:
        """Log why a request was decided without the store, at most once a minute: its key will fail again."""
        now = time.monotonic()
        if now >= self._key_logged_at + _LOG_INTERVAL:
            self._key_logged_at = now
            _logger.warning(
                "the rate limit's store cannot count a key (%s); for its requests: %s", reason, self._policy
            )
