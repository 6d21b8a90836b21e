"""How long a request may take until its response starts.

A client that waits for ever, and a handler that works for ever for one that has long left, hold memory, connections
and locks. At the deadline the client gets a 504 problem and the handler is cancelled, as `asyncio.timeout` does it, so
that what it awaits is cancelled as well: a query ends in the database.
"""

import math
from asyncio import AbstractEventLoop, Task
from collections.abc import Container
from contextvars import Context
from time import perf_counter
from typing import Any, cast

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Scope

from fastapi_prodkit._asgi import route_dependencies
from fastapi_prodkit._exchange import Exchange
from fastapi_prodkit._expiry import Expiry
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit._stack import Piece
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["DeadlineMiddleware", "Timeout"]

_late = Refusal(ProblemError(504, "The service did not answer in time."))


class DeadlineMiddleware(Piece):
    """Answer with a 504 problem if no response has started within `request_timeout`, and cancel the handler.

    A response that has started is left alone, however long it takes; WebSockets are, too. The time runs from here, and
    includes the reading of the body. `Depends(Timeout(120))` gives a route another time.

    Args:
        app: The app to serve.
        settings: `request_timeout`, seconds; None leaves it to the routes.
        exempt: Paths relative to the app, without trailing slash, that have no deadline.
    """

    interrupts = True

    def __init__(
        self, app: ASGIApp, settings: LimitsSettings | None = None, *, exempt: Container[str] = frozenset()
    ) -> None:
        settings = settings or LimitsSettings()
        self.app = app
        self._exempt = exempt
        self._expiry = None if settings.request_timeout is None else Expiry(settings.request_timeout, _expire)

    def wait(self, exchange: Exchange, since: float) -> None:
        """Begin to watch: who never waits is not late, or nobody could have told."""
        if exchange.deadline is not None:
            return
        if exchange.path in self._exempt and exchange.is_exempt(self._exempt):
            exchange.deadline = _EXEMPT
        elif self._expiry is None:
            exchange.deadline = _Never(since)
        else:
            exchange.deadline = self._expiry.add(exchange, since, _loop_of(exchange))


class Timeout:
    """Give a route or router a deadline of its own: `Depends(Timeout(120))`.

    It takes the place of the general one from the beginning, before the body has been read; of several the last one
    counts. Where limits are switched off, it does nothing; WebSockets have no deadline.

    Args:
        seconds: Longest time until the response starts; None for no deadline.

    Raises:
        ConfigurationError: The time is not positive; or, on a request, there is no `DeadlineMiddleware`.
    """

    statuses = (504,)  # what the schema shows on routes that depend on it

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ConfigurationError(f"Timeout({seconds}): use a positive number of seconds, or None for no deadline")
        self.seconds = seconds

    async def __call__(self, connection: HTTPConnection) -> None:
        """Set the deadline of this request."""
        scope = connection.scope
        exchange = _watched(scope)
        if exchange is not None:
            self.hold_for(exchange)
        elif scope["type"] == "http" and "fastapi_prodkit" not in scope:
            raise ConfigurationError("Timeout has no effect here: add DeadlineMiddleware to the app")

    def hold_for(self, exchange: Exchange) -> None:
        """Take the place of the deadline of a request."""
        before = exchange.deadline
        if before is _EXEMPT:
            return
        begun = before.pop(exchange, perf_counter()) - before.seconds
        if self.seconds is None or exchange.interruption is not None:
            exchange.deadline = _Never(begun)
        else:
            exchange.deadline = _OwnTime(exchange, self.seconds, begun)


class _Never:
    """No deadline."""

    seconds = 0.0

    def __init__(self, begun: float) -> None:
        self._begun = begun

    def pop(self, exchange: Exchange, _: float | None) -> float:  # noqa: ARG002 - as a line has it, which holds many
        """Watch no longer, which it never did; return since when."""
        return self._begun


class _OwnTime:
    """The deadline of one request, which is its route's: a timer for itself."""

    def __init__(self, exchange: Exchange, seconds: float, begun: float) -> None:
        self.seconds = seconds
        self._due = begun + seconds
        left = max(0.0, self._due - perf_counter())
        self._timer = _loop_of(exchange).call_later(left, exchange.interrupt, _late, context=Context())

    def pop(self, exchange: Exchange, _: float | None) -> float:  # noqa: ARG002 - likewise
        """Watch no longer; return when it would have been due."""
        self._timer.cancel()
        return self._due


_EXEMPT = _Never(0.0)  # not even a deadline of the route's own


def _loop_of(exchange: Exchange) -> AbstractEventLoop:
    return cast("Task[Any]", exchange.task).get_loop()


def _expire(exchange: Exchange) -> None:
    """Answer and cancel, unless the response has started, or the route that was chosen has another time."""
    own = _timeout_of(exchange.scope)
    if own is not None:
        own.hold_for(exchange)  # the dependency itself is called when the body has been read
    else:
        exchange.interrupt(_late)


def _watched(scope: Scope) -> Exchange | None:
    """Return the innermost exchange of a request that has a deadline, which may begin with this."""
    exchange = Exchange.of(scope)
    while exchange is not None:
        if exchange.task is None:  # the app has not waited for anything yet
            exchange.watch(exchange.begun)
        if exchange.deadline is not None:
            break
        exchange = exchange.outer
    return exchange


def _timeout_of(scope: Scope) -> Timeout | None:
    found = None
    for dependency in route_dependencies(scope):
        found = dependency if isinstance(dependency, Timeout) else found
    return found
