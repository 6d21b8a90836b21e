"""How a request is answered in place of an app that is being cancelled."""

import asyncio
from asyncio import Task
from collections.abc import Awaitable
from typing import Any

from fastapi_prodkit import _context

__all__ = ["Interruption"]


class Interruption:
    """Another answer than the app's, while the app is being cancelled."""

    def __init__(self, task: "Task[Any]", answering: Awaitable[None], context: dict[str, Any]) -> None:
        self._task = task
        self._cancelled_before = task.cancelling()
        self._answer = task.get_loop().create_task(self._within(context, answering))

    def answers(self) -> bool:
        """Say whether it is this that is running, and not the app."""
        return asyncio.current_task() is self._answer

    async def end(self) -> bool:
        """Wait for the answer: an app that returns before the end of its response is broken, to a server.

        Return whether nobody else has cancelled the request; found out as `asyncio.timeout` does.
        """
        alone = self._task.uncancel() <= self._cancelled_before
        await self._answer
        return alone

    @staticmethod
    async def _within(context: dict[str, Any], answering: Awaitable[None]) -> None:
        _context.begin(context)  # this task's own
        await answering
