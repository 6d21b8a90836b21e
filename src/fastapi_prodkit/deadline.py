"""How long a request may take until its response starts.

A client that waits for ever, and a handler that works for ever for one that has long left, hold memory, connections
and locks. At the deadline the client gets a 504 problem and the handler is cancelled, as `asyncio.timeout` does it, so
that what it awaits is cancelled as well: a query ends in the database.
"""

import asyncio
import math
from asyncio import Task, TimerHandle
from collections.abc import Container
from contextvars import Context
from time import monotonic
from typing import cast

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Scope

from fastapi_prodkit._asgi import route_dependencies
from fastapi_prodkit._exchange import Exchange, Piece
from fastapi_prodkit._expiry import Expiry, Line
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["DeadlineMiddleware", "Timeout"]

_KEY = "fastapi_prodkit.deadline"
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
        self._expiry = None if settings.request_timeout is None else Expiry(settings.request_timeout)

    def enter(self, exchange: Exchange) -> None:
        """Begin to watch."""
        outer = exchange.scope.get(_KEY)
        exempt = exchange.path in self._exempt and exchange.is_exempt(self._exempt)
        exchange.scope[_KEY] = outer if exempt else _Watch(exchange, self._expiry, outer)

    def leave(self, exchange: Exchange) -> None:
        """Watch no longer, if it was watched."""
        watch = _Watch.of(exchange)
        if watch is not None:
            watch.stop()
            exchange.scope[_KEY] = watch.outer


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
        watch: _Watch | None = scope.get(_KEY)
        if watch is not None:
            watch.allow(self.seconds)
        elif scope["type"] == "http" and _KEY not in scope and "fastapi_prodkit" not in scope:
            raise ConfigurationError("Timeout has no effect here: add DeadlineMiddleware to the app")


class _Watch:
    """Watch over one request: who is to be cancelled when."""

    __slots__ = ("_exchange", "_line", "_own", "_seconds", "_task", "_timer", "due", "outer")

    due: float

    def __init__(self, exchange: Exchange, expiry: Expiry | None, outer: "_Watch | None") -> None:
        self.outer = outer
        self._exchange = exchange
        self._own = False  # the deadline is the route's
        self._timer: TimerHandle | None = None
        self._task = task = cast("Task[None]", asyncio.current_task())  # there is one: this is called by a coroutine
        self._line: Line | None = None
        if expiry is None:
            self._seconds, self.due = 0.0, monotonic()
        else:
            self._seconds = expiry.seconds
            self._line = expiry.add(self, task.get_loop())

    @staticmethod
    def of(exchange: Exchange) -> "_Watch | None":
        """Return the watch over exactly this request, and not over one around it."""
        watch: _Watch | None = exchange.scope.get(_KEY)
        return watch if watch is not None and watch._exchange is exchange else None  # noqa: SLF001 - our own

    def allow(self, seconds: float | None) -> None:
        """Take another time, from the beginning of the request."""
        self.stop()
        self._own = True
        if seconds is not None and self._exchange.interruption is None:
            self.due += seconds - self._seconds
            self._seconds = seconds
            left = max(0.0, self.due - monotonic())
            self._timer = self._task.get_loop().call_later(left, self.expire, context=Context())

    def expire(self) -> None:
        """Answer and cancel, unless the response has started, or the route that was chosen has another time."""
        own = None if self._own else _timeout_of(self._exchange.scope)
        if own is not None:
            self.allow(own.seconds)  # the dependency itself is called when the body has been read
        else:
            self._exchange.interrupt(self._task, _late)

    def stop(self) -> None:
        """Watch no longer."""
        if self._line is not None:
            self._line.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()


def _timeout_of(scope: Scope) -> Timeout | None:
    found = None
    for dependency in route_dependencies(scope):
        found = dependency if isinstance(dependency, Timeout) else found
    return found
