"""Cancel the task that serves a request, and distinguish this cancellation from an error of the app."""

from asyncio import CancelledError, Task, current_task
from typing import Any, cast

from starlette.types import Scope

from fastapi_prodkit._pipeline.exchange import Exchange

__all__ = ["cancellable_exchange", "check_complete", "cut", "is_cancelled"]


def cancellable_exchange(scope: Scope) -> Exchange | None:
    """Return the innermost exchange of the request whose task may be cancelled."""
    exchange = Exchange.innermost(scope)
    while exchange is not None and exchange.task is None:
        exchange = exchange.outer
    return exchange


def cut(exchange: Exchange, reason: str) -> None:
    """Cancel the task that serves the request: the server closes the connection without completing the response."""
    exchange.context.end_reason = reason
    cast("Task[Any]", exchange.task).cancel()


def is_cancelled(exchange: Exchange) -> bool:
    """Return whether the request was cancelled: by `cut`, by the server, or by a task group around it.

    `Task.cancelling` alone is not reliable: a task group of anyio, such as that of `@app.middleware("http")`, may call
    `uncancel` more often than `cancel`.
    """
    task = current_task()
    return exchange.context.end_reason is not None or (task is not None and task.cancelling() > 0)


def check_complete(exchange: Exchange) -> None:
    """Raise an exception if the app has returned before its response was complete.

    A `StreamingResponse` returns early if its body raises a CancelledError, which anyio's task groups swallow.

    Raises:
        CancelledError: The request was cancelled, and the app has swallowed the CancelledError.
        RuntimeError: The request was not cancelled.
    """
    unfinished = exchange.status and not exchange.client_disconnected and exchange.scope["type"] == "http"
    if unfinished:
        text = "the app has returned before its response was complete: has its body raised a CancelledError?"
        raise CancelledError if is_cancelled(exchange) else RuntimeError(text)
