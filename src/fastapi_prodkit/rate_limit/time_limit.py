"""A time-out that tolerates a busy event loop and repeats a cancellation that was lost."""

import asyncio
from types import TracebackType
from typing import Final

__all__ = ["TimeLimit"]

_GRACE: Final = 0.005  # seconds for reading an answer that has already arrived
_REPEAT_AFTER: Final = 0.01  # seconds until a cancellation without effect is repeated


class TimeLimit:
    """Cancel an operation after a time and raise TimeoutError: `with TimeLimit(0.1): await operation()`.

    It differs from `asyncio.timeout` in two ways. First, an answer that arrived while the event loop was busy counts,
    even if the time has run out meanwhile. Second, the cancellation is repeated until it has an effect: redis-py uses
    `asyncio.wait_for`, which in Python 3.11 can lose a cancellation.

    Args:
        seconds: The time-out; TimeoutError is raised a few milliseconds later.
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
            raise RuntimeError("a TimeLimit must be entered in a task")
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
        if kind is asyncio.CancelledError and left <= self._before:  # else it was cancelled from outside, too
            raise TimeoutError from error

    def _wait(self) -> None:
        self._timer = self._loop.call_later(_GRACE, self._cancel)

    def _cancel(self) -> None:
        self._cancelled += 1
        self._task.cancel()
        self._timer = self._loop.call_later(_REPEAT_AFTER, self._cancel)
