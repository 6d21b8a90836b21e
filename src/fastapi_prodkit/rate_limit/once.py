"""Remember keys that may be used once, such as the `jti` of a DPoP proof, in the memory of this process."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from fastapi_prodkit.rate_limit.limits import unavailable

__all__ = ["MAX_KEYS", "OnceKeys"]

MAX_KEYS: Final = 200_000  # that are remembered at a time; about 30 MB
_SLICES: Final = 4  # in which the keys of one period are dropped; so a key is remembered for at most 1.25 periods


@dataclass(slots=True)
class _Slice:
    """Keys that were added in one slice of time, and are forgotten together."""

    closes_at: float
    keep_until: float = 0.0
    keys: set[str] = field(default_factory=set)


class OnceKeys:
    """Keys that were added recently.

    No key is forgotten before its time: if too many are remembered, no other key is added.
    """

    def __init__(self) -> None:
        self._slices: deque[_Slice] = deque()

    def add(self, key: str, seconds: int, now: float) -> bool:
        """Remember a key for at least so many seconds; return False if it is remembered already.

        Raises:
            ProblemError: 503: `MAX_KEYS` keys are remembered.
        """
        while self._slices and self._slices[0].keep_until <= now:
            self._slices.popleft()
        if any(key in each.keys for each in self._slices):
            return False
        if sum(len(each.keys) for each in self._slices) >= MAX_KEYS:
            raise unavailable(f"{MAX_KEYS} keys are remembered in memory; RATE_LIMIT_STORAGE_URL=redis://... has room")
        if not self._slices or self._slices[-1].closes_at <= now:
            self._slices.append(_Slice(closes_at=now + seconds / _SLICES))
        newest = self._slices[-1]
        newest.keys.add(key)
        newest.keep_until = max(newest.keep_until, now + seconds)
        return True

    def clear(self) -> None:
        """Forget every key."""
        self._slices.clear()
