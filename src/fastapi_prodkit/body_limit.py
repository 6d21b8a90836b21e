"""How large a request's body may be.

The limit is Starlette's own, which counts chunked uploads as they come and knows the limits of single routes
(`max_body_size=`). This piece asks it only where there is a body, and makes a problem of its plain-text answer.
"""

import math
from collections.abc import Awaitable, Sequence
from http import HTTPStatus

from fastapi.routing import iter_route_contexts
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.routing import BaseRoute, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._asgi import header
from fastapi_prodkit._exchange import Exchange, Gate
from fastapi_prodkit._problem import send_problem
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["BodyLimitMiddleware", "largest_limit"]

_MOST_DIGITS = 18  # of a length that is looked at: an exabyte is too large already

# What Starlette and FastAPI say of themselves, type and length: `Content Too Large`, and the same in JSON as `detail`.
_REFUSALS = {(b"text/plain; charset=utf-8", b"17"), (b"application/json", b"30")}


class BodyLimitMiddleware(Gate):
    """Refuse a body that is too large with a 413 problem: an announced one unread, a chunked one where it passes.

    Args:
        app: The app to serve.
        settings: `max_body_size`, bytes; None leaves it to the app's own limits.
        largest: The largest limit that a single route of the app has, bytes; see `largest_limit`. An announced body
            beyond it is refused before any route runs. Without it Starlette refuses such a body when it is read, or
            when the response starts, which may be after a handler that does not read it has done its work.
    """

    def __init__(self, app: ASGIApp, settings: LimitsSettings | None = None, *, largest: int | None = None) -> None:
        settings = settings or LimitsSettings()
        self.app = app
        size = settings.max_body_size
        self._limited = _ProblemForRefusal(app if size is None else RequestBodyLimitMiddleware(app, size))
        self._highest = max(size, largest) if size is not None and largest is not None else math.inf
        self._plain = self._highest if largest == 0 else -1  # up to here nothing but the announcement needs a look

    def admit(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Put the limit in front of the app, unless the request has no body, or one of an announced, small size.

        A request without Content-Length and Transfer-Encoding has no body (RFC 9112 section 6.3), and servers let no
        more of one pass than was announced.
        """
        headers = exchange.headers
        announced = headers.get(b"content-length")
        if b"transfer-encoding" in headers or scope["http_version"] >= "2":
            return self._limited(scope, receive, send)
        if announced is None:
            return self.app(scope, receive, send)
        size = int(announced[:_MOST_DIGITS]) if announced.isdigit() else 0
        if size > self._highest:
            return send_problem(scope, receive, send, ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE))
        return (self.app if size <= self._plain else self._limited)(scope, receive, send)


def largest_limit(routes: Sequence[BaseRoute]) -> int:
    """Return the largest `max_body_size` of these routes and of apps mounted in them, bytes; 0 if none has one."""
    largest = 0
    for context in iter_route_contexts(routes):
        route = context.original_route
        inner = largest_limit(route.routes) if isinstance(route, Mount) else 0
        own = getattr(context, "max_body_size", None) or getattr(getattr(route, "app", None), "max_body_size", None)
        largest = max(largest, inner, own or 0)
    return largest


class _ProblemForRefusal:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def send_problem_instead(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and _is_refusal(message):
                refused = True
                await send_problem(scope, receive, send, ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE))
            elif not refused:
                await send(message)

        await self._app(scope, receive, send_problem_instead)


def _is_refusal(message: Message) -> bool:
    headers = message.get("headers", ())
    return (
        message["status"] == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        and (header(headers, b"content-type"), header(headers, b"content-length")) in _REFUSALS
    )
