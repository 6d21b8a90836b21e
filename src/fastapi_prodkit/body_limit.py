"""Limit the size of a request's body, and the time for which the app waits for the body.

Starlette's own limit checks the size: it counts chunked uploads as they arrive, and knows the limits of single routes
(`max_body_size=`). This module applies it only if there is a body, and replaces its plain-text answer by a problem.
"""

import asyncio
import math
from asyncio import CancelledError, Task
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from http import HTTPStatus
from time import perf_counter
from typing import Any, TypedDict, Unpack, cast

from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit import _context
from fastapi_prodkit._asgi import exceeded_body_limit, header, walk_routes
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit._pipeline.timers import SharedTimer
from fastapi_prodkit._problem import Refusal, send_problem
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["BodyLimitMiddleware", "largest_limit", "own_limit"]

_MAX_DIGITS = 18  # digits of a Content-Length that are parsed: an exabyte is too large already

# Content-Type and Content-Length of Starlette's and FastAPI's own 413: `Content Too Large` as text, and in JSON.
_REFUSALS = {(b"text/plain; charset=utf-8", b"17"), (b"application/json", b"30")}


_too_large = ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
_SLOW_TEXT = "The body of the request did not arrive in time."
_too_slow = ProblemError(HTTPStatus.REQUEST_TIMEOUT, _SLOW_TEXT)
# RFC 9110 section 15.5.9: the rest of the body may still arrive, and must not be read as the next request.
_too_slow_to_go_on = ProblemError(HTTPStatus.REQUEST_TIMEOUT, _SLOW_TEXT, headers={"Connection": "close"})


class BodyLimitKeywords(TypedDict, total=False):
    """Fields of `LimitsSettings`."""

    max_body_size: int | None
    body_timeout: float | None


class BodyLimitMiddleware(Layer):
    """Refuse a body that is too large with a 413 problem: by its Content-Length, or when the received bytes exceed it.

        app.add_middleware(BodyLimitMiddleware, max_body_size=65_536)

    If no part of the body arrives for `body_timeout` while the app waits for one, the answer is a 408 problem (RFC 9110
    section 15.5.9). If the response has started by then, the app receives `http.disconnect`.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        largest: The largest limit that a single route of the app has, bytes, or a function that returns it, called
            at the first body; see `largest_limit`. An announced body beyond it is refused before any route runs.
            Without it Starlette refuses such a body when the app reads it, or when the response starts: a handler that
            does not read the body may have done its work by then.

    Keyword Args:
        max_body_size: Largest body, bytes; None leaves it to the app's own limits. Default: 1048576.
        body_timeout: Longest wait for a part of a body, seconds; None sets no limit. Default: 20.0.

    Attributes:
        size: The largest body, bytes; infinity without a limit.

    Raises:
        ConfigurationError: A keyword does not exist, or its value cannot be used.
    """

    may_cancel_app = True

    def __init__(
        self,
        app: ASGIApp,
        settings: LimitsSettings | None = None,
        *,
        largest: int | Callable[[], int] | None = None,
        **keywords: Unpack[BodyLimitKeywords],
    ) -> None:
        settings = with_keywords(self, settings or LimitsSettings(), keywords, BodyLimitKeywords.__optional_keys__)
        self.app = app
        size = settings.max_body_size
        limited = _further_in if size is None else RequestBodyLimitMiddleware(_further_in, size)
        self._limited = _ProblemForRefusal(limited, size)
        self._settings = settings
        self.size = math.inf if size is None else size
        self._largest = largest
        seconds = settings.body_timeout
        reason = Reason("body_timeout", f"no part of the body for LIMITS_BODY_TIMEOUT={seconds} seconds")
        self._timer = None if seconds is None else SharedTimer(seconds, partial(_BodyTimeout.expire, reason=reason))

    def inside(self, outer: Layer) -> Layer:
        """Leave the size to a layer further out if its limit is smaller: Starlette would apply the inner limit."""
        if isinstance(outer, BodyLimitMiddleware) and outer.size < self.size:
            return BodyLimitMiddleware(self.app, self._settings.model_copy(update={"max_body_size": None}))
        return self

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Apply the limit, unless the request has no body, or announces one that is small enough.

        A request without Content-Length and Transfer-Encoding has no body (RFC 9112 section 6.3), and servers pass on
        no more of a body than its Content-Length.
        """
        headers = exchange.headers
        announced = headers.get(b"content-length")
        size, unchecked = 0, -1.0
        if b"transfer-encoding" not in headers and exchange.scope["http_version"] < "2":
            if announced is None or announced == b"0":
                return None
            size = int(announced[:_MAX_DIGITS]) if announced.isdigit() else 0
            highest, unchecked = self._thresholds
            if size > highest:
                return Refusal(_too_large, _reason(int(highest), self._settings.max_body_size))
        if self._timer is not None:
            exchange.receive_from_server = _BodyTimeout(self._timer, exchange).receive
        return None if size <= unchecked else self._limited

    @cached_property
    def _thresholds(self) -> tuple[float, float]:
        """Return the largest Content-Length that is accepted, and the largest for which no bytes are counted.

        Computed at the first body, when start-up is over: until then an app may change its routes.
        """
        largest = self._largest() if callable(self._largest) else self._largest
        highest = math.inf if largest is None else max(self.size, largest)
        return highest, highest if largest == 0 else -1.0


def largest_limit(routes: Sequence[BaseRoute]) -> int:
    """Return the largest `max_body_size` of these routes and of apps mounted in them, bytes; 0 if none has one."""
    return max((own_limit(context) or 0 for _, context in walk_routes(routes)), default=0)


def own_limit(route: Any) -> int | None:
    """Return the `max_body_size` of a route, of FastAPI's context of it, or of the app that it mounts, bytes."""
    app = getattr(getattr(route, "original_route", route), "app", None)
    found: int | None = getattr(route, "max_body_size", None) or getattr(app, "max_body_size", None)
    return found


class _BodyTimeout:
    """End the wait for a part of a body when it takes longer than `body_timeout`."""

    _complete = False
    _expired = False
    _waiting: "Task[Any] | None" = None  # the task that waits for a part

    def __init__(self, timer: "SharedTimer[_BodyTimeout]", exchange: Exchange) -> None:
        self._timer = timer
        self._exchange = exchange
        self._receive = exchange.receive_from_server

    async def receive(self) -> Message:
        """Return the next message, or `http.disconnect` if it did not come in time."""
        untimed = self._complete or self._waiting is not None
        message = await (self._receive() if untimed else self._receive_in_time())
        if message["type"] != "http.request" or not message.get("more_body"):
            self._complete = True  # only `http.disconnect` can follow
        return message

    async def _receive_in_time(self) -> Message:
        self._waiting = task = cast("Task[Any]", asyncio.current_task())
        cancelled_before = task.cancelling()
        timer = self._timer.start(self, perf_counter(), task.get_loop())
        try:
            return await self._receive()
        except CancelledError:
            if self._expired and task.uncancel() <= cancelled_before:  # nothing else has cancelled the task
                return {"type": "http.disconnect"}
            raise
        finally:
            timer.cancel(self)
            self._waiting = None

    def expire(self, *, reason: Reason) -> None:
        """Send 408 in place of the app's response or, if that has started, let `receive` return `http.disconnect`."""
        exchange = self._exchange
        if not exchange.status:
            problem = _too_slow if exchange.scope["http_version"] >= "2" else _too_slow_to_go_on
            exchange.interrupt(Refusal(problem, reason))
        else:
            self._expired = self._complete = True
            exchange.client_disconnected |= not exchange.complete
            cast("Task[Any]", self._waiting).cancel()  # set, because the time-out runs only while a task waits


async def _further_in(scope: Scope, receive: Receive, send: Send) -> None:
    exchange = cast("Exchange", Exchange.innermost(scope))
    await exchange.call_inner(receive, send)


def _reason(limit: int, size: int | None) -> Reason:
    """Return the reason with the limit that a body has exceeded: `size` of the settings, or that of a route or app."""
    general, special = f"LIMITS_MAX_BODY_SIZE={limit}; max_body_size= on the route", f"max_body_size={limit}"
    return Reason("body_too_large", f"body larger than {general if limit == size else special}")


class _ProblemForRefusal:
    def __init__(self, app: ASGIApp, size: int | None) -> None:
        self._app = app
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def send_problem_instead(message: Message) -> None:
            nonlocal refused
            refuses = message.get("status") == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            if refuses and (limit := exceeded_body_limit(scope)) is not None:
                _context.refuse(_reason(limit, self._size))
            if refuses and _is_refusal(message):
                refused = True
                await send_problem(scope, receive, send, _too_large)
            elif not refused:
                await send(message)

        await self._app(scope, receive, send_problem_instead)


def _is_refusal(message: Message) -> bool:
    headers = message.get("headers", ())
    return (header(headers, b"content-type"), header(headers, b"content-length")) in _REFUSALS
