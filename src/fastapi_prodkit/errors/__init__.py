"""Answer every error with a problem: `application/problem+json`, RFC 9457.

`add_problem_handlers(app)` replaces FastAPI's own handlers only: a handler that the user registers, before or after,
still handles its exceptions.

A validation error names the place and the problem, never the submitted value. FastAPI's own handler repeats the value,
passwords included, and fails with a 500 if JSON cannot express the value, such as NaN or a lone surrogate. If the
response of any handler repeats such input, it is a 422 here.
`ErrorBoundaryMiddleware` logs an unhandled exception, once, and swallows it if the response is complete.
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
_MAX_ERRORS = 100  # a body of a megabyte can be wrong in half a million places
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
    """Answer the app's HTTP exceptions, validation errors and unhandled exceptions with problems.

    If a response cannot be rendered because it repeats input of the request that JSON cannot express, the answer is a
    422 problem.
    """
    handlers: dict[type[Exception], ExceptionHandler] = {
        HTTPException: _http_exception,  # type: ignore[dict-item]  # Starlette types the exception too widely
        RequestValidationError: _validation_error,  # type: ignore[dict-item]  # as for HTTPException
        WebSocketRequestValidationError: _websocket_validation_error,  # type: ignore[dict-item]  # as for HTTPException
        ValueError: _not_rendered,  # raised by json; the base class of errors of pydantic and of the codecs
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

    The response is complete if the 500 problem was sent, or if a background task failed after a 200. Then the
    connection is still usable, but uvicorn would close it without notice, which causes sporadic 502s at a load
    balancer. If the response is not complete, the exception is re-raised, so that the client sees a broken transfer.

    Records go to the logger `fastapi_prodkit.error`. A client that disconnects is not an error.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        explain: When the first exception is swallowed, log how to pass exceptions to an error tracker around the app.

    Keyword Args:
        raise_: Re-raise every exception, for `TestClient` and error trackers around the app object. Default: False.

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
        """Return None if a layer further out handles the exception: the outermost sees whether a response is sent."""
        return None if isinstance(outer, ErrorBoundaryMiddleware) else self

    def on_error(self, exchange: Exchange, error: BaseException) -> bool:
        """Log the exception; return True to swallow it if the response is complete."""
        disconnected = exchange.client_disconnected and _consists_of(error, (ClientDisconnect, OSError))
        if disconnected or (exchange.scope["type"] == "websocket" and _consists_of(error, WebSocketDisconnect)):
            return True  # not an error of the app, and the client has disconnected
        if _logger.isEnabledFor(logging.ERROR):
            _log(error, exchange.scope["path"][:LONGEST_LOGGED_PATH])
        if exchange.complete and not self._raise:
            self._explain()
            return True
        _scope.mark_logged(error)  # the server would log the exception again
        return False


def _consists_of(error: BaseException, kinds: type[Exception] | tuple[type[Exception], ...]) -> bool:
    """Return whether the exception, or each one in a group, such as that of a task group, is of these types."""
    return error.split(kinds)[1] is None if isinstance(error, BaseExceptionGroup) else isinstance(error, kinds)


def _log(error: BaseException, path: str) -> None:
    origin, info = (__file__, _log.__code__.co_firstlineno), (type(error), error, error.__traceback__)
    text = "unhandled exception"
    record = _logger.makeRecord(_logger.name, logging.ERROR, *origin, text, (), info, _log.__name__)
    vars(record)["http_path"] = path  # not as `extra`, which fails where a record factory has set it
    _logger.handle(record)


def _explain() -> None:
    _logger.info(
        "this exception is not passed on; if an error tracker is around the app object, such as "
        "SentryAsgiMiddleware(app), set ERRORS_RAISE=true"
    )


def _nothing() -> None: ...


async def _http_exception(request: HTTPConnection, error: HTTPException) -> Response | None:
    if error.status_code < HTTPStatus.BAD_REQUEST:  # a redirect or a 304: not an error, and without a body
        return Response(status_code=error.status_code, headers=error.headers)
    return await _problem.respond(request, error if isinstance(error, ProblemError) else _from_http_exception(error))


def _from_http_exception(error: HTTPException) -> ProblemError:
    """Return a problem whose detail is `HTTPException.detail`; members of a mapping become extension members."""
    detail: Any = error.detail
    if isinstance(detail, str):
        return ProblemError(error.status_code, detail, headers=error.headers)
    members = dict(detail) if isinstance(detail, Mapping) else {"errors": detail}
    standard = {name: members.pop(name) for name in ("type", "title", "detail") if name in members}
    problem = ProblemError(error.status_code, headers=error.headers, **standard)
    problem.extensions = members  # not as keywords: a member may be called `status`, or by a number
    return problem


async def _validation_error(request: HTTPConnection, error: RequestValidationError) -> Response:
    given: Any = error.errors()  # a list of pydantic's errors, unless the app has raised the exception
    errors = [_without_input(each) for each in given[:_MAX_ERRORS] if isinstance(each, Mapping)]
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
        del error  # breaks a cycle of references: the error, its traceback, this frame, the error


async def _recursion(request: HTTPConnection, error: Exception) -> Response | None:
    """Handle a RecursionError as `_not_rendered` does, unless the app has a handler for its base, RuntimeError."""
    own = request.app.exception_handlers.get(RuntimeError)
    if own is None:
        return await _not_rendered(request, error)
    answer: Response | Awaitable[Response | None] | None = await run_in_threadpool(own, request, error)
    return await answer if isinstance(answer, Awaitable) else answer


async def _unhandled(request: Request, error: Exception) -> Response:  # noqa: ARG001 - the response does not show the error
    return _problem.response(request, ProblemError(500, _problem.INTERNAL_ERROR))


def _without_input(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return place, message and type of a pydantic error, without `input` and `ctx`, which repeat the value."""
    kind = error.get("type", "value_error")
    message = _FIXED_MESSAGES.get(kind) or error.get("msg", "Value error")
    return {"loc": _printable(error.get("loc", ())), "msg": message, "type": kind}


def _printable(loc: Sequence[str | int]) -> list[str | int]:
    """Escape and truncate the parts of `loc`: some are keys of the body, which the client has chosen."""
    return [
        each if isinstance(each, int) else str(each).encode("unicode_escape").decode("ascii")[:_LONGEST_KEY]
        for each in loc
    ]
