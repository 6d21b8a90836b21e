"""Every count of this process, so that tests can begin with empty ones."""

from typing import Final, Protocol
from weakref import WeakSet

__all__ = ["clear_counts", "register"]


class Counts(Protocol):
    """Whatever counts the requests of clients."""

    def clear(self) -> None:
        """Forget every request."""
        ...


_every: Final[WeakSet[Counts]] = WeakSet()  # of the process: limits of routes belong to no app


def register(counts: Counts) -> None:
    """Have `clear_counts` clear these as well, as long as they live."""
    _every.add(counts)


def clear_counts() -> None:
    """Forget every request that was counted in this process."""
    for counts in list(_every):
        counts.clear()
