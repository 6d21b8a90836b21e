"""One timer for many waits of the same length, where one timer for each would cost more than the waits themselves.

What is added first ends first, so a timer has to look at the oldest only. Nearly every wait is over long before: it is
taken out again, and the timer finds later ones, or nothing, and then rests.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextvars import Context
from time import perf_counter
from typing import Generic, TypeVar

_Wait = TypeVar("_Wait")


class Line(dict[_Wait, float]):
    """The waits of one event loop, oldest first, and when each is due; whoever has waited is taken out."""

    def __init__(self, loop: AbstractEventLoop, seconds: float, expire: Callable[[_Wait], None]) -> None:
        super().__init__()
        self.loop = loop
        self.seconds = seconds
        self.timed = False
        self._expire = expire

    def wake(self, due: float) -> None:
        """Look when the first of them is due."""
        # Not the context of the request that happens to be the first: its fields are not the next one's.
        self.loop.call_later(due - perf_counter(), self.look, context=Context())
        self.timed = True

    def look(self) -> None:
        """End what is due, and look again when the oldest of the others is."""
        self.timed = False  # should an `expire` raise, the next wait begins anew
        while self:
            oldest, due = next(iter(self.items()))
            if due > perf_counter():
                self.wake(due)
                return
            del self[oldest]
            self._expire(oldest)


class Expiry(Generic[_Wait]):
    """End what takes longer than so many seconds.

    Args:
        seconds: How long a wait may be.
        expire: Ends a wait; called from its event loop.
    """

    def __init__(self, seconds: float, expire: Callable[[_Wait], None]) -> None:
        self.seconds = seconds
        self._expire = expire
        self._line: Line[_Wait] | None = None

    def add(self, wait: _Wait, since: float, loop: AbstractEventLoop) -> Line[_Wait]:
        """Begin a wait, and return the line to take it out of. Each event loop has a line of its own.

        Of any two the one that is added first is also the one that has waited for longer.

        Args:
            wait: What is ended when it is due, not before this has returned.
            since: When it began, on the clock of `perf_counter`.
            loop: Where.
        """
        line = self._line
        if line is None or line.loop is not loop:
            line = self._line = Line(loop, self.seconds, self._expire)
        line[wait] = due = since + self.seconds
        if not line.timed:
            line.wake(due)
        return line
