"""Every error is a problem: `application/problem+json`, RFC 9457.

`add_problem_handlers(app)` replaces FastAPI's own handlers, and only those: a handler that the user registered, before
or after, stays in charge of its exceptions.

A validation error says where and what, never the submitted value: stock FastAPI echoes the input, and with it
passwords; and input that JSON cannot express, such as NaN or a lone surrogate, turns the echo into a 500. The same
input turns the response of any handler that repeats it into one, which is a 422 here.
`ErrorBoundaryMiddleware` is where an exception that nothing has handled is logged, once, and where it ends.
"""

import logging
from collections.abc import Awaitable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, TypedDict, Unpack

from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
    websocket_request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler
from starlette.websockets import WebSocket, WebSocketDisconnect

from fastapi_prodkit import _problem, _scope
from fastapi_prodkit._asgi import LONGEST_LOGGED_PATH
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.errors.unserializable import unserializable_input
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import ErrorsSettings

__all__ = ["ErrorBoundaryMiddleware", "ProblemError", "add_problem_handlers"]

_logger = logging.getLogger("fastapi_prodkit.error")

_LONGEST_KEY = 64
_MOST_ERRORS = 100  # a body of a megabyte can be wrong in half a million places
_FIXED_MESSAGES = {  # of the errors whose message in pydantic repeats the input
    "byte_size_unit": "Input should end with a unit of bytes",
    "import_error": "Input should be a valid python path",
    "union_tag_invalid": "Input does not match any of the expected tags",
    "zoneinfo_str": "Input should be a valid time zone",
}
_FASTAPIS_OWN = (
    None,
    http_exception_handler,
    request_validation_exception_handler,
    websocket_request_validation_exception_handler,
)


def add_problem_handlers(app: Starlette) -> None:
    """Make problems of the app's HTTP exceptions, validation errors and unhandled exceptions.

    A response that cannot be rendered, because it repeats what JSON cannot express, is the client's error if the
    request carries it.
    """
    handlers: dict[type[Exception], ExceptionHandler] = {
        HTTPException: _http_exception,  # type: ignore[dict-item]  # Starlette types the exception too widely
        RequestValidationError: _validation_error,  # type: ignore[dict-item]  # likewise
        WebSocketRequestValidationError: _websocket_validation_error,  # type: ignore[dict-item]  # likewise
        ValueError: _not_rendered,  # json's own, and the base of pydantic's and of the codecs'
        RecursionError: _recursion,  # type: ignore[dict-item]  # Starlette types the answer too narrowly
    }
    for kind, handler in handlers.items():
        if app.exception_handlers.get(kind) in _FASTAPIS_OWN:
            app.add_exception_handler(kind, handler)
    if app.exception_handlers.keys().isdisjoint((500, Exception)):
        app.add_exception_handler(Exception, _unhandled)


class ErrorBoundaryKeywords(TypedDict, total=False):
    """Fields of `ErrorsSettings`."""

    raise_: bool


class ErrorBoundaryMiddleware(Layer):
    """Log an exception that nothing has handled, once, and swallow it if the response is complete.

        app.add_middleware(ErrorBoundaryMiddleware, raise_=True)

    The response is complete if the 500 problem was sent, or if a background task failed after a 200. Then nothing is
    wrong with the connection, but uvicorn would close it unannounced, which a load balancer turns into a sporadic 502.
    If the response is not complete the exception is raised on, so that the client sees a broken transfer.

    Records go to the logger `fastapi_prodkit.error`. A client that disconnects is no error.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        explain: Log, when the first exception is swallowed, what to set for a tracker around the app object.

    Keyword Args:
        raise_: Raise every exception on, for `TestClient` and for trackers around the app object. Default: False.

    Raises:
        ConfigurationError: A keyword does not exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self,
        app: ASGIApp,
        settings: ErrorsSettings | None = None,
        *,
        explain: bool = False,
        **keywords: Unpack[ErrorBoundaryKeywords],
    ) -> None:
        self.app = app
        accepted = ErrorBoundaryKeywords.__optional_keys__
        self._raise = with_keywords(self, settings or ErrorsSettings(), keywords, accepted).raise_
        self._explain = cache(_explain) if explain else _nothing  # cached: called once

    def inside(self, outer: Layer) -> Layer | None:
        """Leave the exception to a layer further out, which knows whether the response is complete."""
        return None if isinstance(outer, ErrorBoundaryMiddleware) else self

    def on_error(self, exchange: Exchange, error: BaseException) -> bool:
        """Log the exception, and swallow it if the client has all that it will get."""
        disconnected = exchange.client_disconnected and isinstance(error, ClientDisconnect | OSError)
        if disconnected or (isinstance(error, WebSocketDisconnect) and exchange.scope["type"] == "websocket"):
            return True  # not a fault of the app, and there is no client to be told
        if _logger.isEnabledFor(logging.ERROR):
            _log(error, exchange.scope["path"][:LONGEST_LOGGED_PATH])
        if exchange.complete and not self._raise:
            self._explain()
            return True
        _scope.mark_logged(error)  # the server gets the exception, too
        return False


def _log(error: BaseException, path: str) -> None:
    origin, info = (__file__, _log.__code__.co_firstlineno), (type(error), error, error.__traceback__)
    text = "unhandled exception"
    record = _logger.makeRecord(_logger.name, logging.ERROR, *origin, text, (), info, _log.__name__)
    vars(record)["http_path"] = path  # not as `extra`, which fails where a record factory has set it
    _logger.handle(record)


def _explain() -> None:
    _logger.info(
        "this exception ends here; for a tracker around the app object, such as SentryAsgiMiddleware(app), "
        "set ERRORS_RAISE=true"
    )


def _nothing() -> None: ...


async def _http_exception(request: HTTPConnection, error: HTTPException) -> Response | None:
    if error.status_code < HTTPStatus.BAD_REQUEST:  # raised to redirect or to say 304: not an error, and no body
        return Response(status_code=error.status_code, headers=error.headers)
    return await _problem.respond(request, error if isinstance(error, ProblemError) else _from_http_exception(error))


def _from_http_exception(error: HTTPException) -> ProblemError:
    """Read `HTTPException(detail=...)`: text is the detail, the members of a mapping are extension members."""
    detail: Any = error.detail
    if isinstance(detail, str):
        return ProblemError(error.status_code, detail, headers=error.headers)
    members = dict(detail) if isinstance(detail, Mapping) else {"errors": detail}
    standard = {name: members.pop(name) for name in ("type", "title", "detail") if name in members}
    problem = ProblemError(error.status_code, headers=error.headers, **standard)
    problem.extensions = members  # not as keywords: a member may be called `status`, or by a number
    return problem


async def _validation_error(request: HTTPConnection, error: RequestValidationError) -> Response:
    given: Any = error.errors()  # a list of pydantic's own, unless somebody raised it by hand
    errors = [_without_input(each) for each in given[:_MOST_ERRORS] if isinstance(each, Mapping)]
    return _problem.response(request, ProblemError(422, "The request is not valid.", errors=errors))


async def _websocket_validation_error(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:  # noqa: ARG001 - it echoes the input
    await websocket.close(code=1008, reason="The request is not valid.")


async def _not_rendered(request: HTTPConnection, error: Exception) -> Response:
    found = await unserializable_input(request, error) if isinstance(request, Request) else []
    if found:
        return await _validation_error(request, RequestValidationError(found))
    try:
        raise error
    finally:
        del error  # or it refers, through its traceback, to a frame that refers to it


async def _recursion(request: HTTPConnection, error: Exception) -> Response | None:
    """Do the same, unless the app has a handler for the base class, which this one would hide."""
    own = request.app.exception_handlers.get(RuntimeError)
    if own is None:
        return await _not_rendered(request, error)
    answer: Response | Awaitable[Response | None] | None = await run_in_threadpool(own, request, error)
    return await answer if isinstance(answer, Awaitable) else answer


async def _unhandled(request: Request, error: Exception) -> Response:  # noqa: ARG001 - nothing of it leaves the process
    return _problem.response(request, ProblemError(500, _problem.INTERNAL_ERROR))


def _without_input(error: Mapping[str, Any]) -> dict[str, Any]:
    """Keep where and what of a pydantic error; `input` and `ctx` repeat what was submitted."""
    kind = error.get("type", "value_error")
    message = _FIXED_MESSAGES.get(kind) or error.get("msg", "Value error")
    return {"loc": _printable(error.get("loc", ())), "msg": message, "type": kind}


def _printable(loc: Sequence[str | int]) -> list[str | int]:
    """Escape and cut what a client may have chosen: the keys of a body are part of `loc`."""
    return [
        each if isinstance(each, int) else str(each).encode("unicode_escape").decode("ascii")[:_LONGEST_KEY]
        for each in loc
    ]
