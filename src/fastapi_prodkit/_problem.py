"""The one error body: `application/problem+json`, RFC 9457."""

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from fastapi_prodkit import _context
from fastapi_prodkit.exceptions import ProblemError

MEDIA_TYPE = "application/problem+json"


def body(scope: Scope, problem: ProblemError) -> bytes:
    """Render the problem object. `instance` is the path without the query, which may hold secrets."""
    members: dict[str, Any] = {
        **problem.extensions,
        "type": problem.type,
        "title": problem.title,
        "status": problem.status_code,
        "detail": problem.detail,
        "instance": scope["path"],
    }
    request_id = (_context.current() or {}).get("request_id")
    if request_id is not None:
        members["request_id"] = request_id
    return orjson.dumps(members, default=str, option=orjson.OPT_NON_STR_KEYS)


def headers(problem: ProblemError) -> dict[str, str]:
    """Return the problem's headers with its media type; errors are never cached unless the problem says otherwise."""
    return {"cache-control": "no-store", **_lower(problem.headers), "content-type": MEDIA_TYPE}


async def send_problem(scope: Scope, receive: Receive, send: Send, problem: ProblemError) -> None:
    """Answer with the problem from a middleware; a WebSocket handshake is refused with its status."""
    content = body(scope, problem)
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers(problem).items()]
    raw.append((b"content-length", str(len(content)).encode()))
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # the handshake, websocket.connect, which has to be taken before it can be answered
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": problem.title})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": problem.status_code, "headers": raw})
    await send({"type": f"{kind}.body", "body": content})


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {key.lower(): value for key, value in (headers or {}).items()}
