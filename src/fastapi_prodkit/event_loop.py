"""Watch the event loop: how late it is, and what blocks it, while it blocks it.

One call of a blocking function in an `async def` holds up every request of the process, the probes included, and
nothing says which function it was. Here a timer on the loop measures how late it runs, and a thread beside the loop
looks whether it runs at all: if it does not for longer than the limit, one line of the log has the stack of the
callback that is in the way. It is written while the loop is blocked, so that a process that hangs for ever leaves it.

A request costs nothing; the timer and the thread wake four times in each limit.
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

_BEATS = 4  # in each limit
_MINUTE = 60.0  # seconds; the usual interval of scrapes, so that none of them misses the worst
_DEEPEST = 40  # innermost calls of the stack

_logger = logging.getLogger(__name__)


class EventLoop:
    """Watch the event loop of the app that runs: `FastAPI(lifespan=event_loop.lifespan)`.

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
        """Say that the loop was blocked in the last minute: `health_router(warning=event_loop.warning)`."""
        if self._clock() >= self._forget_at:
            return None
        return f"the event loop was blocked for {self._blocked_for:.1f} s"

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Watch while the app runs."""
        heart = _Heart(self._limit, self._measure)
        watch = threading.Thread(target=heart.watch, name="event loop watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            heart.stop()
            watch.join(1.0)  # not longer: it may be writing to a pipe that nobody reads

    def _measure(self, lag: float, blocked: bool) -> None:  # noqa: FBT001 - called in one place, which names it
        self._meter.measure(lag)
        if blocked:
            _logger.warning("the event loop was blocked for %.1f s", lag)
            self._meter.blocks.inc()
            self._blocked_for, self._forget_at = lag, self._clock() + _MINUTE


class _Heart:
    """The timer of one run of a loop, which beats, and the watch that another thread keeps over it."""

    def __init__(self, limit: float, measure: Callable[[float, bool], None]) -> None:
        self._limit = limit
        self._interval = limit / _BEATS
        self._measure = measure
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stopped = threading.Event()
        self._beats = 0
        self._caught = -1  # the beat after which the watch found the loop blocked
        self._due = time.monotonic()
        self._busy = time.thread_time()
        self._depth = 0  # calls that every stack of the thread begins with, until the loop calls back
        self._timer: asyncio.Handle = self._loop.call_soon(self.beat)

    def beat(self) -> None:
        """Measure how late this beat is, and arrange for the next."""
        now, busy = time.monotonic(), time.thread_time()
        lag = max(0.0, now - self._due)
        # A process that was paused, or had no processor, is late without having been blocked. Code that keeps the
        # interpreter's lock blocks the watch as well, and has used the processor all the while.
        blocked = self._caught == self._beats or min(lag, busy - self._busy) > self._limit
        self._measure(lag, blocked)
        if not self._beats:
            self._depth = len(traceback.extract_stack()) - 1
        self._beats += 1
        self._due, self._busy = now + self._interval, busy
        self._timer = self._loop.call_later(self._interval, self.beat)

    def watch(self) -> None:
        """Look again and again whether the heart has beaten, and say once for each block what is in the way."""
        seen = silent = 0
        while not self._stopped.wait(self._interval):
            # Looks are counted, not seconds: while the whole process is paused, there are none.
            silent = silent + 1 if self._beats == seen else 0
            seen = self._beats
            if silent > _BEATS and self._caught != seen:
                self._caught = seen
                self._report()

    def stop(self) -> None:
        """End the beat and the watch."""
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
            # By hand, because only this way a record has the stack of another thread.
            _logger.handle(
                _logger.makeRecord(
                    _logger.name, logging.WARNING, file, line or 0, message, arguments, None, name, sinfo=text
                )
            )


class _Meter:
    """What is shown of the loop: the worst of its last minute, because a scrape comes too seldom to see it happen."""

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
        self._turn = clock() + _MINUTE
        self._before = self._worst = 0.0

    def measure(self, lag: float) -> None:
        """Show the delay if none in this minute and the one before was longer."""
        if self._clock() >= self._turn:
            self._turn = self._clock() + _MINUTE
            self._before, self._worst = self._worst, 0.0
        self._worst = max(self._worst, lag)
        self._lag.set(max(self._worst, self._before))
