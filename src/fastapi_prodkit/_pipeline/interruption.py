"""Answer a request in place of an app that is being cancelled."""

import asyncio
from asyncio import Task
from collections.abc import Awaitable
from typing import Any

from fastapi_prodkit import _context

__all__ = ["Interruption"]


class Interruption:
    """Send an answer in place of the app's response, in a separate task, while the app is being cancelled.

    Args:
        task: The task that serves the request.
        answer: Sends the answer.
        context: The context of the request, for log lines about the answer.
    """

    def __init__(self, task: "Task[Any]", answer: Awaitable[None], context: dict[str, Any]) -> None:
        self._task = task
        self._cancelled_before = task.cancelling()
        self._answer = task.get_loop().create_task(_send_within(context, answer))

    def is_current_task(self) -> bool:
        """Return whether the running task sends the answer; False for a task of the app."""
        return asyncio.current_task() is self._answer

    def withdraw_cancellation(self) -> bool:
        """Withdraw the cancellation of the app's task; return False if something else has cancelled the task as well.

        Called once, when the app has ended. It compares the counts of cancellations, as `asyncio.timeout` does.
        """
        return self._task.uncancel() <= self._cancelled_before

    async def wait_closed(self) -> None:
        """Wait until the answer is sent: servers report an error if an app returns before its response is complete."""
        await self._answer


async def _send_within(context: dict[str, Any], answer: Awaitable[None]) -> None:
    _context.begin(context)  # never reset: the task's context ends with the task
    await answer
