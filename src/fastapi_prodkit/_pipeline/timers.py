"""One timer for many time-outs of the same length: a timer for each would cost more than the request.

Time-outs of one length expire in the order in which they started, so the timer checks the oldest only. Nearly every
request ends long before its time-out and cancels it. If the timer fires and there is no time-out, it is not set again.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable, Hashable
from contextvars import Context
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Deadline", "SharedTimer", "TimerQueue"]

_Subject = TypeVar("_Subject", bound=Hashable)


class Deadline(Protocol):
    """What ends the wait for the response of a request. Several requests may share it."""

    def cancel(self, exchange: Any, /) -> None:
        """Cancel the time-out of this request. May be called after it has expired."""


class TimerQueue(Generic[_Subject]):
    """The time-outs of one event loop, oldest first, each with the time at which it is due.

    Attributes:
        due: When each subject's time-out is due; only those that are neither cancelled nor expired.
        armed: The event loop will call `expire_due`.
    """

    def __init__(self, loop: AbstractEventLoop, expire: Callable[[_Subject], None]) -> None:
        self.loop = loop
        self.due: dict[_Subject, float] = {}
        self.armed = False
        self._expire = expire

    def cancel(self, subject: _Subject) -> None:
        """Take the subject's time-out out of the queue. May be called after it has expired."""
        self.due.pop(subject, None)

    def schedule(self, due: float) -> None:
        """Have the event loop call `expire_due` at that time."""
        # In an empty context: the timer serves many requests, so the context must not be that of one of them.
        self.loop.call_later(due - perf_counter(), self.expire_due, context=Context())
        self.armed = True

    def expire_due(self) -> None:
        """Expire the time-outs that are due, and schedule the next call for the oldest of the others."""
        self.armed = False
        while self.due:
            oldest, due = next(iter(self.due.items()))
            if due > perf_counter():
                self.schedule(due)
                return
            del self.due[oldest]
            try:
                self._expire(oldest)
            except Exception as error:  # noqa: BLE001 - one subject's failure; the time-outs of the others still expire
                self.loop.call_exception_handler({"message": "a time-out failed to expire", "exception": error})


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

    def start(self, subject: _Subject, started_at: float, loop: AbstractEventLoop) -> TimerQueue[_Subject]:
        """Start the time-out of a subject, and return the queue, which can cancel it.

        Args:
            subject: What `expire` is called with; it has one time-out at a time.
            started_at: When the time-out begins to count, on the clock of `perf_counter`. Time-outs must be started in
                this order.
            loop: The event loop in which `expire` is called; each has its own queue.
        """
        queue = self._queue
        if queue is None or queue.loop is not loop:
            queue = self._queue = TimerQueue(loop, self._expire)
        queue.due[subject] = due = started_at + self._seconds
        if not queue.armed:
            queue.schedule(due)
        return queue
