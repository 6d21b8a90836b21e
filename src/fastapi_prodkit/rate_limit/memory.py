"""Count in the memory of this process, which is bounded; no lock, thread or clean-up task is needed.

A request is counted in one synchronous call, so concurrent requests can never exceed the limit.

A key is stored as its 64-bit hash, in a third of the memory: Python seeds hashes at random, so nobody can choose keys
that collide, and two of 120 000 collide by chance less than once in a billion times.
"""

import math
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from fastapi_prodkit import _counting
from fastapi_prodkit.rate_limit.limits import Limit, Quota
from fastapi_prodkit.rate_limit.once import OnceKeys

__all__ = ["MAX_CLIENTS", "MemoryStore", "Strategy"]

MAX_CLIENTS: Final = 120_000  # keys of one limit; about 10 MB, 20 MB with a sliding or a moving window
MAX_HITS: Final = 1_000_000  # requests that a moving window stores for one limit, plus one key's; about 10 MB more

Strategy = Literal["fixed-window", "moving-window", "sliding-window"]
_Value = TypeVar("_Value")


class Window(Protocol):
    """The counters of one limit."""

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        """Count a request unless it exceeds the limit; return requests left, and seconds until more are allowed."""
        ...

    def clear(self) -> None:
        """Forget every request."""
        ...


class MemoryStore:
    """Count in this process.

    Args:
        strategy: How the window is counted. `fixed-window`: a window for all clients opens with the first request after
            the previous one closed. `sliding-window`: requests of the previous window count in proportion to its
            overlap. `moving-window`: each request counts for exactly the window's length; needs the most memory.
        clock: Returns monotonic seconds.

    Attributes:
        shared: Whether all processes count together.
    """

    shared: Final = False

    def __init__(self, strategy: Strategy = "fixed-window", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._make: Callable[[Limit], Window] = _WINDOWS[strategy]
        self._windows: dict[Limit, Window] = {}
        self._once = OnceKeys()
        _counting.register(self)

    def window(self, limit: Limit) -> Window:
        """Return the counters of a limit; a caller that always uses one limit can keep them."""
        window = self._windows.get(limit)
        if window is None:
            window = self._windows[limit] = self._make(limit)
        return window

    def count(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit that still allows it, and return the quota of each limit."""
        now = self.clock()
        return [(limit, *self.window(limit).hit(key, cost, now)) for limit in limits]

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request; `count` as a coroutine function, which the `Store` protocol requires."""
        return self.count(limits, key, cost)

    async def add_once(self, key: str, seconds: int) -> bool:
        """Remember a key for at least so many seconds; return False if it is remembered already.

        Raises:
            ProblemError: 503: too many keys are remembered, and none is forgotten before its time; see `once`.
        """
        return self._once.add(key, seconds, self.clock())

    def clear(self) -> None:
        """Forget every request and every key."""
        for window in self._windows.values():
            window.clear()
        self._once.clear()


class _Recent(Generic[_Value]):
    """A bounded dictionary of two generations: when the newer one is full, the older one is dropped.

    A key that is used moves to the newer generation, so no list of last uses is needed.

    Attributes:
        new: The newer generation.
        size: Number of stored values in the newer generation, kept by users that store several per key.
    """

    def __init__(self, default: Callable[[], _Value]) -> None:
        self.new: dict[int, _Value] = {}
        self.size = 0
        self._old: dict[int, _Value] = {}
        self._default = default

    def touch(self, key: int) -> _Value:
        """Add a key to the newer generation, with its value from the older one or the default; return the value."""
        value = self._old.pop(key, None)
        if len(self.new) >= MAX_CLIENTS // 2:
            self.rotate()
        self.new[key] = value = self._default() if value is None else value
        return value

    def peek(self, key: int) -> _Value | None:
        """Return the value of a key without moving the key to the newer generation."""
        value = self.new.get(key)
        return self._old.get(key) if value is None else value

    def rotate(self) -> None:
        """Drop the older generation and start a new one."""
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
        hashed, counts = hash(key), self._used.new
        used = counts.get(hashed)
        if used is None:
            used = self._used.touch(hashed)
            counts = self._used.new
        remaining = self._amount - used - cost
        if remaining >= 0:
            counts[hashed] = used + cost
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
        hashed = hash(key)
        used = self._used.new.get(hashed)
        if used is None:
            used = self._used.touch(hashed)
        before = self._last.peek(hashed) or 0
        overlap = math.floor(before * (1 - elapsed / self._seconds))
        remaining = self._amount - overlap - used - cost
        if remaining >= 0:
            self._used.new[hashed] = used + cost
        return remaining, self._reset(before, overlap, elapsed)

    def _reset(self, before: int, overlap: int, elapsed: float) -> int:
        """Return seconds until the overlap shrinks by one request, or until this window ends."""
        end = self._seconds - elapsed
        until = end if overlap < 1 else (1 - overlap / before) * self._seconds - elapsed + 1e-6
        return max(1, math.ceil(min(until, end)))


class _MovingWindow:
    def __init__(self, limit: Limit) -> None:
        self._amount = limit.amount
        self._seconds = limit.seconds
        self.clear()

    def clear(self) -> None:
        self._hits: _Recent[array[float]] = _Recent(lambda: array("d"))  # a deque allocates space for 64 items at once

    def hit(self, key: str, cost: int, now: float) -> tuple[int, int]:
        recent, hashed = self._hits, hash(key)
        hits = recent.new.get(hashed)
        if hits is None:
            hits = recent.touch(hashed)
            recent.size += len(hits)
        over = bisect_right(hits, now - self._seconds)
        if over * 2 > len(hits):  # not in every call: deleting moves the remaining items
            del hits[:over]
            over = 0
        remaining = self._amount - len(hits) + over - cost
        if remaining >= 0:
            hits.extend([now] * cost)
            recent.size += cost
        if recent.size >= MAX_HITS // 2:
            recent.rotate()
        oldest = hits[over] if over < len(hits) else now
        return remaining, max(1, math.ceil(self._seconds - (now - oldest)))


_WINDOWS: dict[str, Any] = {
    "fixed-window": _FixedWindow,
    "sliding-window": _SlidingWindow,
    "moving-window": _MovingWindow,
}
