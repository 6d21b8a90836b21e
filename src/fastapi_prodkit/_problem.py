"""The one error body: `application/problem+json`, RFC 9457."""

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import quote

import orjson
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fastapi_prodkit import _context
from fastapi_prodkit._context import Reason
from fastapi_prodkit.exceptions import ProblemError

MEDIA_TYPE = "application/problem+json"
_PATH_CHARACTERS: Final = "/:@!$&'()*+,;="  # beside those that `quote` never encodes; RFC 3986 section 3.3
# IANA's registry of WebSocket close codes: unauthorized, forbidden, timeout, try again later.
_CLOSE_CODES: Final = {401: 3000, 403: 3003, 408: 3008, 429: 1013, 503: 1013}
_POLICY_VIOLATION: Final = 1008  # RFC 6455 section 7.4.1
_INTERNAL_ERROR: Final = 1011  # RFC 6455 section 7.4.1
_LONGEST_REASON: Final = 123  # bytes; RFC 6455 section 5.5
_STRAY_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def body(scope: Scope, problem: ProblemError) -> bytes:
    """Render the problem object."""
    members: dict[str, Any] = {
        "type": problem.type,
        "title": problem.title,
        "status": problem.status_code,
        "detail": problem.detail,
        "instance": _instance(scope),
    }
    members = {**members, **problem.extensions, **members}  # the standard members come first, and win
    request_id = _context.request_id()
    if request_id is not None:
        members["request_id"] = request_id
    try:
        return orjson.dumps(members, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a lone surrogate or a huge integer, which the standard library writes as plain ASCII
        return json.dumps(members, default=str).encode()


def headers(problem: ProblemError) -> dict[str, str]:
    """Return the problem's headers with its media type; errors are never cached unless the problem says otherwise."""
    return {"cache-control": "no-store", **_lower(problem.headers), "content-type": MEDIA_TYPE}


def response(connection: HTTPConnection, problem: ProblemError) -> Response:
    """Return the problem as a response."""
    return Response(body(connection.scope, problem), status_code=problem.status_code, headers=headers(problem))


async def respond(connection: HTTPConnection, problem: ProblemError) -> Response | None:
    """Return the problem as a response, for an exception handler; an accepted WebSocket is closed instead."""
    error = raisable(connection, problem)
    if error is problem:
        if isinstance(connection, WebSocket):
            text = f"the app has answered it with {problem.status_code}: {problem.detail}"
            _context.refuse_handshake(problem.status_code, text)
        return response(connection, problem)
    if isinstance(error, WebSocketException):
        await cast("WebSocket", connection).close(error.code, error.reason)
    return None


def raisable(connection: HTTPConnection, problem: ProblemError) -> Exception:
    """Return the exception with which a dependency sends the problem, or as much of it as possible, to the client.

    An accepted WebSocket can only be closed with a code: 3000 for 401, 3003 for 403, 3008 for 408, 1013 for 429 and
    503, 1011 for other errors of the server, 1008 for other errors of the client. For a WebSocket that is closed
    already, it is a WebSocketDisconnect.
    """
    if not isinstance(connection, WebSocket) or connection.application_state is WebSocketState.CONNECTING:
        return problem
    status = problem.status_code
    code = _CLOSE_CODES.get(
        status, _INTERNAL_ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else _POLICY_VIOLATION
    )
    if WebSocketState.DISCONNECTED in (connection.application_state, connection.client_state):
        return WebSocketDisconnect(code)
    return WebSocketException(code, problem.title.encode()[:_LONGEST_REASON].decode(errors="ignore"))


class Refusal:
    """An ASGI app that answers every request with one problem, without reading its body, and logs the reason."""

    def __init__(self, problem: ProblemError, reason: Reason | None = None) -> None:
        self.problem = problem
        self._reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the problem."""
        if self._reason is not None:
            _context.refuse(self._reason)
        await send_problem(scope, receive, send, self.problem)


# The detail of every 500. It says nothing about the error, which may be confidential.
INTERNAL_ERROR: Final = "The server could not complete the request."


async def send_problem(scope: Scope, receive: Receive, send: Send, problem: ProblemError) -> None:
    """Answer with the problem from a middleware; a WebSocket handshake is refused with its status."""
    content = body(scope, problem)
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers(problem).items()]
    raw.append((b"content-length", str(len(content)).encode()))
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect, which must be received before the handshake is answered
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": problem.title})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": problem.status_code, "headers": raw})
    await send({"type": f"{kind}.body", "body": content})


def _instance(scope: Scope) -> str:
    """Return the path as a URI reference to this service (RFC 3986), without the query, which may hold secrets.

    If the server passes on the path as the client has sent it, this path is used: only there does `%2F` differ from a
    slash. The reference starts with exactly one slash: `//host/` or `http://host/` would refer to another host.
    """
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        path = quote(scope["path"], _PATH_CHARACTERS, errors="surrogatepass")
    else:
        raw = raw.partition(b"?")[0]  # some test clients leave the query in
        path = quote(_STRAY_PERCENT.sub(b"%25", raw), f"{_PATH_CHARACTERS}%")
    return f"/{path.lstrip('/')}"


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {key.lower(): value for key, value in (headers or {}).items()}
