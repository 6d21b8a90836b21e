"""One timer for many time-outs of the same length: a timer for each would cost more than the request.

Time-outs of one length expire in the order in which they started, so the timer checks the oldest only. Nearly every
request ends long before its time-out and cancels it. If the timer fires and there is no time-out, it is not set again.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextvars import Context
from time import perf_counter
from typing import Generic, Protocol, TypeVar

__all__ = ["Deadline", "SharedTimer", "TimerQueue", "Timing"]

_Subject = TypeVar("_Subject")


class Deadline(Protocol):
    """The time-out of one request."""

    started_at: float  # on the clock of `perf_counter`

    def cancel(self) -> None:
        """Cancel the time-out. May be called after the time-out has expired."""


class TimerQueue(Generic[_Subject]):
    """The time-outs of one event loop, oldest first, each with the time at which it is due.

    Attributes:
        timings: Time-outs that are neither cancelled nor expired.
        armed: The event loop will call `expire_due`.
    """

    def __init__(self, loop: AbstractEventLoop, expire: Callable[[_Subject], None]) -> None:
        self.loop = loop
        self.timings: dict[Timing[_Subject], float] = {}
        self.armed = False
        self._expire = expire

    def schedule(self, due: float) -> None:
        """Have the event loop call `expire_due` at that time."""
        # In an empty context: the timer serves many requests, so the context must not be that of one of them.
        self.loop.call_later(due - perf_counter(), self.expire_due, context=Context())
        self.armed = True

    def expire_due(self) -> None:
        """Expire the time-outs that are due, and schedule the next call for the oldest of the others."""
        self.armed = False
        while self.timings:
            oldest, due = next(iter(self.timings.items()))
            if due > perf_counter():
                self.schedule(due)
                return
            del self.timings[oldest]
            try:
                self._expire(oldest.subject)
            except Exception as error:  # noqa: BLE001 - one subject's failure; the time-outs of the others still expire
                self.loop.call_exception_handler({"message": "a time-out failed to expire", "exception": error})


class Timing(Generic[_Subject]):
    """One time-out in a queue; a `Deadline`."""

    __slots__ = ("_timings", "started_at", "subject")

    def __init__(self, subject: _Subject, started_at: float, timings: "dict[Timing[_Subject], float]") -> None:
        self.subject = subject
        self.started_at = started_at
        self._timings = timings

    def cancel(self) -> None:
        """Take the time-out out of its queue."""
        self._timings.pop(self, None)


class SharedTimer(Generic[_Subject]):
    """Call a function for each subject whose time-out has expired.

    Args:
        seconds: Length of every time-out.
        expire: Called with the subject, from its event loop.
    """

    def __init__(self, seconds: float, expire: Callable[[_Subject], None]) -> None:
        self._seconds = seconds
        self._expire = expire
        self._queue: TimerQueue[_Subject] | None = None

    def start(self, subject: _Subject, started_at: float, loop: AbstractEventLoop) -> Timing[_Subject]:
        """Start the time-out of a subject. Time-outs must be started in the order of `started_at`.

        Args:
            subject: What `expire` is called with.
            started_at: When the time-out begins to count, on the clock of `perf_counter`.
            loop: The event loop in which `expire` is called; each has its own queue.
        """
        queue = self._queue
        if queue is None or queue.loop is not loop:
            queue = self._queue = TimerQueue(loop, self._expire)
        timing = Timing(subject, started_at, queue.timings)
        queue.timings[timing] = due = started_at + self._seconds
        if not queue.armed:
            queue.schedule(due)
        return timing
