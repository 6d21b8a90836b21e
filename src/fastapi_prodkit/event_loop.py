"""Monitor the event loop: measure its delay, and log what blocks it while it is blocked.

One call of a blocking function in an `async def` delays every request of the process, including the probes, and nothing
names that function. Here a timer on the event loop measures how late it fires, and a thread checks whether it fires. If
it does not fire for longer than the limit, the thread logs the stack of the callback that blocks the loop. The line is
written while the loop is blocked, even if the process hangs for ever.

There is no cost per request; the timer and the thread wake four times in each limit.
"""

import asyncio
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi_prodkit._instruments import instrument
from fastapi_prodkit.sections import EventLoopSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["EventLoop"]

_TICKS = 4  # how often the timer fires in each limit
_MINUTE = 60.0  # seconds; the usual interval of scrapes, so that no scrape misses the longest delay
_DEEPEST = 40  # innermost calls of the stack

_logger = logging.getLogger(__name__)


class EventLoop:
    """Monitor the event loop of the running app: `FastAPI(lifespan=event_loop.lifespan)`.

    Args:
        settings: When the loop counts as blocked.
        registry: Where the metrics are shown; prometheus_client's default registry unless given.
        clock: Seconds, as `time.monotonic` counts them; decides how long a block is remembered.
    """

    def __init__(
        self,
        settings: EventLoopSettings | None = None,
        *,
        registry: "CollectorRegistry | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = (settings or EventLoopSettings()).limit
        self._meter = _Meter(registry, clock)
        self._clock = clock
        self._forget_at = -math.inf
        self._blocked_for = 0.0

    def warning(self) -> str | None:
        """Return a text if the loop was blocked in the last minute: `health_router(warning=event_loop.warning)`."""
        if self._clock() >= self._forget_at:
            return None
        return f"the event loop was blocked for {self._blocked_for:.1f} s"

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Monitor the event loop while the app runs."""
        monitor = _Monitor(self._limit, self._measure)
        watch = threading.Thread(target=monitor.watch, name="event loop watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            monitor.stop()
            watch.join(1.0)  # not longer: the thread may be writing to a pipe that nothing reads

    def _measure(self, lag: float, blocked: bool) -> None:  # noqa: FBT001 - called in one place, which names it
        self._meter.measure(lag)
        if blocked:
            _logger.warning("the event loop was blocked for %.1f s", lag)
            self._meter.blocks.inc()
            self._blocked_for, self._forget_at = lag, self._clock() + _MINUTE


class _Monitor:
    """The timer on one event loop, and the check of this timer in a thread."""

    def __init__(self, limit: float, measure: Callable[[float, bool], None]) -> None:
        self._limit = limit
        self._interval = limit / _TICKS
        self._measure = measure
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stopped = threading.Event()
        self._ticks = 0
        self._blocked_at = -1  # the tick after which the thread has found the loop blocked
        self._due = time.monotonic()
        self._busy = time.thread_time()
        self._depth = 0  # outer calls that all stacks of the loop's thread have in common
        self._timer: asyncio.Handle = self._loop.call_soon(self.tick)

    def tick(self) -> None:
        """Measure how late this tick is, and schedule the next. Called by the event loop."""
        now, busy = time.monotonic(), time.thread_time()
        lag = max(0.0, now - self._due)
        # A process that was paused, or got no CPU time, is late, but was not blocked. Code that holds the GIL blocks
        # the thread as well, but uses CPU time all the while.
        blocked = self._blocked_at == self._ticks or min(lag, busy - self._busy) > self._limit
        self._measure(lag, blocked)
        if not self._ticks:
            self._depth = len(traceback.extract_stack()) - 1
        self._ticks += 1
        self._due, self._busy = now + self._interval, busy
        self._timer = self._loop.call_later(self._interval, self.tick)

    def watch(self) -> None:
        """Check for a tick in each interval, and log once for each block what blocks the loop. Runs in the thread."""
        seen = missed = 0
        while not self._stopped.wait(self._interval):
            # Checks are counted, not seconds: while the whole process is paused, there are none.
            missed = missed + 1 if self._ticks == seen else 0
            seen = self._ticks
            if missed > _TICKS and self._blocked_at != seen:
                self._blocked_at = seen
                self._report()

    def stop(self) -> None:
        """Stop the timer and the thread."""
        self._stopped.set()
        self._timer.cancel()

    def _report(self) -> None:
        frame = sys._current_frames().get(self._thread)  # noqa: SLF001 - documented, for debuggers and profilers
        if frame is None:  # the thread has ended without ending the lifespan
            self._stopped.set()
        elif _logger.isEnabledFor(logging.WARNING):
            every = traceback.extract_stack(frame)
            stack = every[self._depth :] or every
            file, line, name, _ = stack[-1]
            text = "Stack (most recent call last):\n" + "".join(traceback.format_list(stack[-_DEEPEST:])).rstrip()
            message = "the event loop is blocked, for more than %g s already, in %s (%s:%s)"
            arguments = (self._limit, name, file, line)
            # Not by Logger.warning: only a record that is made here can have the stack of another thread.
            _logger.handle(
                _logger.makeRecord(
                    _logger.name, logging.WARNING, file, line or 0, message, arguments, None, name, sinfo=text
                )
            )


class _Meter:
    """The metrics of the loop: the longest delay of the last minute, because most delays are between two scrapes."""

    def __init__(self, registry: "CollectorRegistry | None", clock: Callable[[], float]) -> None:
        from prometheus_client import Counter, Gauge  # noqa: PLC0415 - on first use

        self._lag = instrument(
            Gauge,
            "event_loop_lag_seconds",
            "Longest delay of a timer on the event loop in the last minute.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.blocks = instrument(
            Counter, "event_loop_blocks_total", "How often the event loop was blocked.", registry=registry
        )
        self._clock = clock
        self._minute_ends = clock() + _MINUTE
        self._before = self._worst = 0.0

    def measure(self, lag: float) -> None:
        """Set the gauge to the longest delay of this minute and the one before."""
        if self._clock() >= self._minute_ends:
            self._minute_ends = self._clock() + _MINUTE
            self._before, self._worst = self._worst, 0.0
        self._worst = max(self._worst, lag)
        self._lag.set(max(self._worst, self._before))
