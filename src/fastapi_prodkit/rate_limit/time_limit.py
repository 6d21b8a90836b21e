"""A time limit that holds although a client loses a cancellation, and although the event loop was late itself."""

import asyncio
from types import TracebackType
from typing import Final

__all__ = ["TimeLimit"]

_AFTERWARDS: Final = 0.005  # seconds in which what has arrived meanwhile is read
_AGAIN: Final = 0.01  # seconds until a cancellation without effect is repeated


class TimeLimit:
    """End what takes longer with a TimeoutError: `with TimeLimit(0.1): await operation()`.

    Two things that `asyncio.timeout` does not do. If the event loop was busy for so long that the answer has come and
    the time is over, the answer counts: it is not the store that was slow. And a cancellation is repeated until it
    has an effect: `asyncio.wait_for` of Python 3.11, which redis-py uses, loses one that comes at the wrong moment.

    Args:
        seconds: How long it may take; a few milliseconds longer until the error.
    """

    __slots__ = ("_before", "_cancelled", "_loop", "_seconds", "_task", "_timer")

    _task: "asyncio.Task[object]"
    _loop: asyncio.AbstractEventLoop
    _timer: asyncio.TimerHandle

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._cancelled = 0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a TimeLimit is for what is awaited in a task")
        self._task = task
        self._before = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._wait)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        if not self._cancelled:
            return
        left = 0
        for _each in range(self._cancelled):
            left = self._task.uncancel()
        if kind is asyncio.CancelledError and left <= self._before:  # otherwise somebody else has cancelled it, too
            raise TimeoutError from error

    def _wait(self) -> None:
        self._timer = self._loop.call_later(_AFTERWARDS, self._cancel)

    def _cancel(self) -> None:
        self._cancelled += 1
        self._task.cancel()
        self._timer = self._loop.call_later(_AGAIN, self._cancel)
