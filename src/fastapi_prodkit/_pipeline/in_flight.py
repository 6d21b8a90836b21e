"""Find the requests in progress when the process ends: in the frames of its tasks, so that no list is kept."""

import asyncio
from asyncio import AbstractEventLoop, Task
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Final

from fastapi_prodkit import _context
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.cancellation import cut
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import LayerStack
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ProblemError

__all__ = ["abandon", "cut_requests", "exchanges_in", "frames_of"]

_SERVE: Final = LayerStack.__call__.__code__
_RETRY_AFTER: Final = "1"  # seconds; by then another process serves requests
_stopped: Final = Refusal(
    ProblemError(503, "The service is stopping; try again.", headers={"Retry-After": _RETRY_AFTER}),
    Reason("shutdown", "no response before the process ended; SHUTDOWN_GRACE limits the time for it"),
)
_ABANDONED: Final = Reason("shutdown", "no response: the process exited while the handler ran")


def frames_of(task: "Task[Any]") -> Iterator[FrameType]:
    """Yield the frames of a suspended task, outermost first."""
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        yield frame
        awaited = awaited.cr_await


def exchanges_in(frames: Iterable[FrameType]) -> Iterator[Exchange]:
    """Yield the outermost exchange of the request that is served in these frames, if there is one."""
    for frame in frames:
        exchange = frame.f_locals.get("exchange") if frame.f_code is _SERVE else None
        if exchange is not None and exchange.outer is None:
            yield exchange


def cut_requests(loop: AbstractEventLoop) -> int:
    """Cancel all requests, and answer those whose response has not started with 503; return how many were cancelled.

    Called in the event loop. Requests that are cancelled already are skipped, and so are WebSockets, which the server
    closes.
    """
    count = 0
    for task in asyncio.all_tasks(loop):
        for exchange in exchanges_in(frames_of(task)):
            cancelled = exchange.interruption is not None or exchange.context.end_reason is not None
            if exchange.scope["type"] == "http" and not cancelled:
                count += 1
                _cut(exchange, task)
    return count


def _cut(exchange: Exchange, task: "Task[Any]") -> None:
    exchange.task = task  # not set yet if no layer may cancel the request
    if exchange.complete:  # only its background tasks still run
        cut(exchange, "complete")
    elif not exchange.interrupt(_stopped):
        exchange.open_stream()
        cut(exchange, "cancelled")


def abandon(exchange: Exchange) -> None:
    """Finish a request whose handler does not end, just before the process exits. May be called in any thread."""
    if not exchange.status:
        exchange.status = 503
        exchange.context.reason = _ABANDONED
    elif not exchange.complete:
        exchange.client_disconnected = True
    token = _context.begin(exchange.context)
    exchange.finish()
    _context.end(token)
