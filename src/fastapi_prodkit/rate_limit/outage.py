"""What happens while a store fails: it is left alone, and asked now and then whether it is back.

A store that refuses, stays silent or is slow costs the requests that find out its time-out, and the later ones
nothing: who asks whether it is back is a task of its own.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from fastapi_prodkit._instruments import instrument
from fastapi_prodkit.rate_limit.time_limit import TimeLimit

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Outage"]

_logger = logging.getLogger("fastapi_prodkit.rate_limit")

INTERVAL = 1.0  # seconds between two questions


class Outage:
    """Know whether the store fails, and tell of each change once: a log line and the metric `rate_limit_storage_up`.

    Args:
        policy: What is done meanwhile; the log line names it.
        timeout: Longest time that the store may take to answer, once it has a connection, to be back, seconds.
        registry: Where the metrics are shown.

    Attributes:
        on: The store fails.
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
            multiprocess_mode="livemin",  # of several workers: not all of them reach it
        )
        self._up.set(1)
        self._decisions = instrument(
            Counter,
            "rate_limit_storage_missed_total",
            "Requests that were decided upon without the rate limit's store.",
            ["policy"],
            registry=registry,
        ).labels(policy)
        self.on = False
        self._ask_at = 0.0
        self._question: asyncio.Task[None] | None = None

    def begin(self, error: Exception) -> None:
        """Take note that the store has failed."""
        if not self.on:
            self.on = True
            self._ask_at = time.monotonic() + INTERVAL
            self._up.set(0)
            reason = str(error) if isinstance(error, OSError) and error.errno else type(error).__name__
            _logger.warning("the rate limit's store fails (%s); until it is back: %s", reason, self._policy)

    def is_on(self, storage: Any) -> bool:
        """Say whether the store is to be left alone; have it asked if it is time to."""
        if not self.on:
            return False
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + INTERVAL
            self._question = asyncio.create_task(self._ask(storage))
        return True

    def decided(self) -> None:
        """Count a request that was decided upon without the store."""
        self._decisions.inc()

    def stop(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
            self._question = None

    async def _ask(self, storage: Any) -> None:
        try:
            # It may have to connect first, which takes several round trips, and no request waits for it.
            with TimeLimit(INTERVAL):
                answered = await storage.check()
            with TimeLimit(self._timeout):
                answered = answered and await storage.check()
        except Exception:  # noqa: BLE001 - whatever it is, the store is not back
            return
        if answered and self.on:
            self.on = False
            self._up.set(1)
            _logger.info("the rate limit's store is back")
