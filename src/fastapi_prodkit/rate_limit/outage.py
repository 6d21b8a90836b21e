"""What happens while a store fails: it is left alone, and asked once a second whether it is back.

A store that refuses, stays silent or is slow costs the requests that find out its time-out, and the later ones
nothing: a task of its own asks whether the store is back, whether requests come or not.
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

INTERVAL: Final = 1.0  # seconds from one question to the next
_BETWEEN_LINES: Final = 60.0  # seconds between two log lines about keys that the store cannot count

Ask = Callable[[], Awaitable[None]]


class StoreOutage:
    """Know whether the store fails, and tell of each change once: a log line and the metric `rate_limit_storage_up`.

    Args:
        policy: What is done meanwhile; the log line names it.
        timeout: Longest time that the store may take to answer, once it has a connection, to be back, seconds.
        registry: Where the metrics are shown.

    Attributes:
        active: The store fails.
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
        self.active = False
        self._ask_at = 0.0
        self._told_of_key_at = -_BETWEEN_LINES
        self._question: asyncio.Task[None] | None = None

    def report(self, error: Exception) -> None:
        """Take note of an error: an outage begins, unless the store has answered and the error is about one key."""
        reason = reason_about_key(error)
        if reason is not None:
            self._tell_of_key(reason)
        elif not self.active:
            self.active = True
            self._ask_at = time.monotonic() + INTERVAL
            self._up.set(0)
            reason = str(error) if isinstance(error, OSError) and error.errno else type(error).__name__
            _logger.warning("the rate limit's store fails (%s); until it is back: %s", reason, self._policy)

    def ask_until_back(self, ask: Ask) -> None:
        """Have the store asked once a second, in a task of this event loop unless that of another asks already.

        Args:
            ask: Asks the store, and raises if it fails.
        """
        if self.active and (self._question is None or self._question.done()):  # it ends with its event loop
            self._question = asyncio.create_task(self._ask_until_back(ask))

    def count_fallback(self) -> None:
        """Count a request that was decided upon without the store."""
        self._decisions.inc()

    def close(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
            self._question = None

    async def _ask_until_back(self, ask: Ask) -> None:
        while self.active:
            await asyncio.sleep(self._ask_at - time.monotonic())
            self._ask_at = time.monotonic() + INTERVAL
            await self._ask(ask)

    async def _ask(self, ask: Ask) -> None:
        try:
            # It may have to connect first, which takes several round trips, and no request waits for it.
            with TimeLimit(INTERVAL):
                await ask()
            with TimeLimit(self._timeout):
                await ask()
        except Exception as error:  # noqa: BLE001 - whatever it is, the store is not back unless it answers about a key
            if reason_about_key(error) is None:
                return
        self.active = False
        self._up.set(1)
        _logger.info("the rate limit's store is back")

    def _tell_of_key(self, reason: str) -> None:
        """Log why a request was decided without the store, at most once a minute: others of its key will follow."""
        now = time.monotonic()
        if now >= self._told_of_key_at + _BETWEEN_LINES:
            self._told_of_key_at = now
            _logger.warning(
                "the rate limit's store cannot count a key (%s); for its requests: %s", reason, self._policy
            )
