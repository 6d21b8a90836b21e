"""Limit how long a request may take until its response starts.

A handler that never ends holds memory, connections and locks, even if its client has long disconnected. At the deadline
the client gets a 504 problem, and the handler is cancelled as by `asyncio.timeout`. What the handler awaits is
cancelled as well: for example, the database ends its query.
"""

import math
from asyncio import Task, get_running_loop
from collections.abc import Collection
from contextvars import Context
from functools import partial
from time import perf_counter
from typing import Any, TypedDict, Unpack, cast

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import chosen_route, walk_dependencies
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._pipeline.timers import SharedTimer
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["DeadlineMiddleware", "Timeout", "timeout_of"]


class DeadlineKeywords(TypedDict, total=False):
    """Fields of `LimitsSettings`."""

    request_timeout: float | None


class DeadlineMiddleware(Layer):
    """Answer with a 504 problem if no response has started within `request_timeout`, and cancel the handler.

        app.add_middleware(DeadlineMiddleware, request_timeout=10)

    The deadline does not apply to a response that has started, nor to WebSockets. The time starts when the request
    reaches this layer, and includes the reading of the body. `Depends(Timeout(120))` sets another time for a route.
    If another DeadlineMiddleware is further out, this one replaces its deadline.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        exempt: Paths relative to the app, without trailing slash, that have no deadline.

    Keyword Args:
        request_timeout: Longest time until a response starts, seconds; with None only routes with a `Timeout` have a
            deadline. Default: 30.0.

    Attributes:
        seconds: The time; None if only routes with a `Timeout` have a deadline.

    Raises:
        ConfigurationError: A keyword does not exist, or its value cannot be used.
    """

    may_cancel_app = True

    def __init__(
        self,
        app: ASGIApp,
        settings: LimitsSettings | None = None,
        *,
        exempt: Collection[str] = frozenset(),
        **keywords: Unpack[DeadlineKeywords],
    ) -> None:
        settings = with_keywords(self, settings or LimitsSettings(), keywords, DeadlineKeywords.__optional_keys__)
        self.app = app
        self.exempt = checked_exempt(exempt)
        self.seconds = seconds = settings.request_timeout
        timeout_response = _timeout_response(f"LIMITS_REQUEST_TIMEOUT={seconds} seconds; Timeout() on the route")
        self._timer = None if seconds is None else SharedTimer(seconds, partial(_expire, timeout_response))

    def inside(self, outer: Layer) -> Layer:
        """Replace the deadline of a layer further out."""
        return _InnerDeadline(self) if isinstance(outer, DeadlineMiddleware) else self

    def on_wait(self, exchange: Exchange, started_at: float) -> None:
        """Start the deadline."""
        if self._timer is None:
            exchange.deadline = NoDeadline()
        else:
            exchange.deadline = self._timer.start(exchange, started_at, get_running_loop())


class _InnerDeadline(Layer):
    """Cancel the deadlines of layers further out, and start the inner one."""

    may_cancel_app = True

    def __init__(self, deadline: DeadlineMiddleware) -> None:
        self._deadline = deadline

    def on_wait(self, exchange: Exchange, started_at: float) -> None:
        outer = exchange.outer
        while outer is not None:
            if outer.deadline is not None:
                outer.deadline.cancel(outer)
                outer.deadline = NoDeadline()
            outer = outer.outer
        self._deadline.on_wait(exchange, started_at)


class Timeout:
    """Give a route or router a deadline of its own: `Depends(Timeout(120))`.

    It replaces the general deadline, and counts from the start of the request, before the body is read. If a route has
    several, the last one counts. It has no effect on WebSockets, or if the section `limits` is None.

    Args:
        seconds: Longest time until the response starts; None for no deadline.

    Raises:
        ConfigurationError: The time is not positive; or, during a request, there is no `DeadlineMiddleware`.
    """

    statuses = (504,)  # in the OpenAPI schema of routes that depend on it

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ConfigurationError(f"Timeout({seconds}): use a positive number of seconds, or None for no deadline")
        self.seconds = seconds
        self.response = _timeout_response(f"Timeout({seconds}), in seconds, of the route")

    async def __call__(self, connection: HTTPConnection) -> None:
        """Set the deadline of this request."""
        scope = connection.scope
        exchange = _with_deadline(scope)
        if exchange is not None:
            self.replace_deadline(exchange)
        elif scope["type"] == "http" and _scope.installed(scope) is None:
            raise ConfigurationError("Timeout has no effect here: add DeadlineMiddleware to the app")

    def replace_deadline(self, exchange: Exchange) -> None:
        """Cancel the deadline of a request, and start one of `seconds` that counts from the same moment."""
        if exchange.deadline is None or exchange.waiting_since is None:  # the request is exempt
            return
        exchange.deadline.cancel(exchange)
        if self.seconds is None or exchange.interruption is not None:
            exchange.deadline = NoDeadline()
        else:
            exchange.deadline = RouteDeadline(exchange, self.seconds, exchange.waiting_since, self.response)


class NoDeadline:
    """The `Deadline` of a request without a time-out."""

    def cancel(self, exchange: Exchange, /) -> None:
        """Do nothing: there is no timer."""


class RouteDeadline:
    """The `Deadline` of one request whose route has a time-out of its own: a timer for this request alone."""

    def __init__(self, exchange: Exchange, seconds: float, started_at: float, response: Refusal) -> None:
        left = max(0.0, started_at + seconds - perf_counter())
        loop = cast("Task[Any]", exchange.task).get_loop()
        self._timer = loop.call_later(left, exchange.interrupt, response, context=Context())

    def cancel(self, exchange: Exchange, /) -> None:  # noqa: ARG002 - of this request only
        """Cancel the timer."""
        self._timer.cancel()


def _timeout_response(limit: str) -> Refusal:
    reason = Reason("deadline_exceeded", f"no response within {limit}")
    return Refusal(ProblemError(504, "The service did not answer in time."), reason)


def _expire(response: Refusal, exchange: Exchange) -> None:
    """Interrupt the request, unless its response has started or its route has a time-out of its own."""
    own = timeout_of(chosen_route(exchange.scope))
    if own is not None:
        own.replace_deadline(exchange)  # FastAPI calls the dependency only after it has read the body
    else:
        exchange.interrupt(response)


def _with_deadline(scope: Scope) -> Exchange | None:
    """Return the innermost exchange of the request that has a deadline, or is exempt from it."""
    exchange = Exchange.innermost(scope)
    while exchange is not None and exchange.deadline is None and not exchange.exempt:
        exchange = exchange.outer
    return exchange


def timeout_of(route: Any) -> Timeout | None:
    """Return the `Timeout` of a route, or of FastAPI's context of it: the last one counts; None if it has none."""
    found = None
    for dependency in walk_dependencies(getattr(route, "dependant", None)):
        found = dependency if isinstance(dependency, Timeout) else found
    return found
