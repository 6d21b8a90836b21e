"""How large a request's body may be.

The limit is Starlette's own, which counts chunked uploads as they come and knows the limits of single routes
(`max_body_size=`). This piece asks it only where there is a body, and makes a problem of its plain-text answer.
"""

from http import HTTPStatus

from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._asgi import header
from fastapi_prodkit._exchange import Exchange, Piece
from fastapi_prodkit._problem import send_problem
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["BodyLimitMiddleware"]

# What Starlette and FastAPI say of themselves, type and length: `Content Too Large`, and the same in JSON as `detail`.
_REFUSALS = {(b"text/plain; charset=utf-8", b"17"), (b"application/json", b"30")}


class BodyLimitMiddleware(Piece):
    """Refuse a body that is too large with a 413 problem: an announced one unread, a chunked one where it passes.

    Args:
        app: The app to serve.
        settings: `max_body_size`, bytes; None leaves it to the app's own limits.
    """

    def __init__(self, app: ASGIApp, settings: LimitsSettings | None = None) -> None:
        settings = settings or LimitsSettings()
        self.app = app
        size = settings.max_body_size
        self._limited = _ProblemForRefusal(app if size is None else RequestBodyLimitMiddleware(app, size))

    def enter(self, exchange: Exchange) -> ASGIApp | None:
        """Put the limit in front of the app, unless the request has no body (RFC 9112 section 6.3)."""
        headers = exchange.headers
        if b"content-length" in headers or b"transfer-encoding" in headers or exchange.scope["http_version"] >= "2":
            return self._limited
        return None


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
