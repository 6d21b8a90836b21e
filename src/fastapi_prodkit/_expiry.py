"""One timer for many waits of the same length, where one timer for each would cost more than the waits themselves.

What is added first ends first, so a timer has to look at the oldest only. Nearly every wait is over long before: it is
taken out again, and the timer finds later ones, or nothing, and then rests.
"""

from asyncio import AbstractEventLoop
from contextvars import Context
from time import monotonic
from typing import Protocol


class Expiring(Protocol):
    """What can come to its end."""

    due: float  # when, on the monotonic clock

    def expire(self) -> None:
        """End; called once, from the event loop."""


class Line(dict[Expiring, None]):
    """The waits of one event loop, oldest first; whoever has waited takes itself out."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.timed = False

    def look(self) -> None:
        """End what is due, and look again when the oldest of the others is."""
        self.timed = False  # should an `expire` raise, the next wait begins anew
        while self:
            oldest = next(iter(self))
            left = oldest.due - monotonic()
            if left > 0:
                # Not the context of the request that happens to be the first: its fields are not the next one's.
                self.loop.call_later(left, self.look, context=Context())
                self.timed = True
                return
            del self[oldest]
            oldest.expire()


class Expiry:
    """End what takes longer than so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._line: Line | None = None

    def add(self, wait: Expiring, loop: AbstractEventLoop) -> Line:
        """Begin a wait, and return the line to take it out of. Each event loop has a line of its own."""
        line = self._line
        if line is None or line.loop is not loop:
            line = self._line = Line(loop)
        wait.due = monotonic() + self.seconds
        line[wait] = None
        if not line.timed:
            line.look()
        return line
