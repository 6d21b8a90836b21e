"""Counting in this process: bounded, without a lock, a thread or a sweeper.

One call counts a request from beginning to end and awaits nothing, so of any number of requests at the same time
exactly as many are admitted as the limit says.
"""

import math
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from fastapi_prodkit import _counting
from fastapi_prodkit.rate_limit.limits import Limit, Quota

__all__ = ["MAX_CLIENTS", "MemoryStore", "Strategy"]

MAX_CLIENTS: Final = 100_000  # of each limit; about 10 MB, 20 MB in a sliding or a moving window
MAX_HITS: Final = 1_000_000  # that a moving window remembers of each limit, and those of one client; about 10 MB more

Strategy = Literal["fixed-window", "moving-window", "sliding-window"]
_Value = TypeVar("_Value")


class Window(Protocol):
    """The counters of one limit."""

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        """Count a request unless it is over the limit; return requests left, and seconds until there are more."""
        ...

    def clear(self) -> None:
        """Forget every request."""
        ...


class MemoryStore:
    """Count in this process.

    Args:
        strategy: What a limit's seconds mean. `fixed-window`: the window opens with the first request after the last
            one closed, for all clients at once. `sliding-window`: the share of the last window that still overlaps
            counts. `moving-window`: each request counts for exactly as long, which has to be remembered of each.
        clock: Seconds, monotonic.
    """

    def __init__(self, strategy: Strategy = "fixed-window", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._make: Callable[[Limit], Window] = _WINDOWS[strategy]
        self._windows: dict[Limit, Window] = {}
        _counting.register(self)

    def window(self, limit: Limit) -> Window:
        """Return the counters of a limit, for those who ask for the same one with every request."""
        window = self._windows.get(limit)
        if window is None:
            window = self._windows[limit] = self._make(limit)
        return window

    def count(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit that it is not over, and return what is left of each."""
        now = self.clock()
        return [(limit, *self.window(limit).hit(key, cost, now)) for limit in limits]

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Do the same, as every store does."""
        return self.count(limits, key, cost)

    def clear(self) -> None:
        """Forget every request."""
        for window in self._windows.values():
            window.clear()


class _Recent(Generic[_Value]):
    """A dictionary of two generations: the older one is forgotten as a whole when the newer is full.

    Who keeps calling moves to the newer one, so there is no list of who called when.

    Attributes:
        new: The newer generation.
        size: How much is remembered in it, where that is not one thing for each key.
    """

    def __init__(self, default: Callable[[], _Value]) -> None:
        self.new: dict[str, _Value] = {}
        self.size = 0
        self._old: dict[str, _Value] = {}
        self._default = default

    def recall(self, key: str) -> _Value:
        """Make room for a key that is not in the newer generation, and return its value in the older."""
        value = self._old.get(key)
        if len(self.new) >= MAX_CLIENTS // 2:
            self.turn()
        self.new[key] = value = self._default() if value is None else value
        return value

    def look(self, key: str) -> _Value | None:
        """Return the value of a key without keeping it any longer."""
        value = self.new.get(key)
        return self._old.get(key) if value is None else value

    def turn(self) -> None:
        """Forget the older generation."""
        self._old, self.new, self.size = self.new, {}, 0


class _FixedWindow:
    def __init__(self, limit: Limit) -> None:
        self._amount = limit.amount
        self._seconds = limit.seconds
        self.clear()

    def clear(self) -> None:
        self._start = -math.inf
        self._used: _Recent[int] = _Recent(int)

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        elapsed = now - self._start
        if elapsed >= self._seconds:
            self._start, elapsed = now, 0.0
            self._used = _Recent(int)
        counts = self._used.new
        used = counts.get(key)
        if used is None:
            used = self._used.recall(key)
            counts = self._used.new
        remaining = self._amount - used - cost
        if remaining >= 0:
            counts[key] = used + cost
        return remaining, self._seconds - int(elapsed)


class _SlidingWindow:
    def __init__(self, limit: Limit) -> None:
        self._amount = limit.amount
        self._seconds = limit.seconds
        self.clear()

    def clear(self) -> None:
        self._number = 0
        self._last: _Recent[int] = _Recent(int)
        self._used: _Recent[int] = _Recent(int)

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        number, elapsed = divmod(now, self._seconds)
        if number != self._number:
            self._last = self._used if number == self._number + 1 else _Recent(int)
            self._used = _Recent(int)
            self._number = int(number)
        used = self._used.new.get(key)
        if used is None:
            used = self._used.recall(key)
        before = self._last.look(key) or 0
        overlap = math.floor(before * (1 - elapsed / self._seconds))
        remaining = self._amount - overlap - used - cost
        if remaining >= 0:
            self._used.new[key] = used + cost
        return remaining, self._reset(before, overlap, elapsed)

    def _reset(self, before: int, overlap: int, elapsed: float) -> int:
        """Return seconds until one more of the last window's requests no longer counts, or until this one ends."""
        end = self._seconds - elapsed
        until = end if overlap < 1 else (1 - overlap / before) * self._seconds - elapsed + 1e-6
        return max(1, math.ceil(min(until, end)))


class _MovingWindow:
    def __init__(self, limit: Limit) -> None:
        self._amount = limit.amount
        self._seconds = limit.seconds
        self.clear()

    def clear(self) -> None:
        self._hits: _Recent[array[float]] = _Recent(lambda: array("d"))  # a deque has room for 64 from the start

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        recent = self._hits
        hits = recent.new.get(key)
        if hits is None:
            hits = recent.recall(key)
            recent.size += len(hits)
        over = bisect_right(hits, now - self._seconds)
        if over * 2 > len(hits):  # not each time: what remains has to be moved
            del hits[:over]
            over = 0
        remaining = self._amount - len(hits) + over - cost
        if remaining >= 0:
            hits.extend([now] * cost)
            recent.size += cost
        if recent.size >= MAX_HITS // 2:
            recent.turn()
        oldest = hits[over] if over < len(hits) else now
        return remaining, max(1, math.ceil(self._seconds - (now - oldest)))


_WINDOWS: dict[str, Any] = {
    "fixed-window": _FixedWindow,
    "sliding-window": _SlidingWindow,
    "moving-window": _MovingWindow,
}
