"""The request context: one mutable dict per request, whose fields are in every log line.

Sync dependencies, thread pools and tasks run in a copy of the context. A ContextVar that is set there is lost, but a
change of the dict is not: the copy refers to the same dict.
"""

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal, NamedTuple

from fastapi_prodkit import _scope

NO_REQUEST: Final = "-"  # the request id in log records outside of a request, for formats other than ours

# Why a request can be refused. The set is closed, because the codes are values of a metric's label.
Code = Literal[
    "body_timeout",
    "body_too_large",
    "cors_header_not_allowed",
    "cors_method_not_allowed",
    "cors_private_network_not_allowed",
    "database_unavailable",
    "deadline_exceeded",
    "forbidden",
    "gateway_timeout",
    "head_timeout",
    "head_too_large",
    "host_not_allowed",
    "issuer_unavailable",
    "malformed_request",
    "origin_not_allowed",
    "queue_full",
    "queue_timeout",
    "rate_limit_unavailable",
    "rate_limited",
    "request_timeout",
    "shutdown",
    "unauthenticated",
    "unavailable",
    "websocket_refused",
]


class Reason(NamedTuple):
    """Why a request was refused.

    Attributes:
        code: One of a closed set, for metrics.
        text: Text for the access line: which limit was exceeded, and which setting sets it.
    """

    code: Code
    text: str = ""


# The reason of a refusal for which none was given, by status.
_UNEXPLAINED: Final[Mapping[int, Reason]] = {
    408: Reason("request_timeout"),
    413: Reason("body_too_large"),
    429: Reason("rate_limited"),
    431: Reason("head_too_large"),
    503: Reason("unavailable"),
    504: Reason("gateway_timeout"),
}


# The statuses of refusals. With another status the app has caught the refusal, and its reason does not count.
_REFUSING: Final = frozenset({400, 401, 403, *_UNEXPLAINED})
_REFUSING_HANDSHAKE: Final = _REFUSING.union(range(400, 499))  # 499 stands for a client that has disconnected
_LONGEST_TEXT: Final = 200  # characters of a text from the app
_NORMAL_CLOSURE: Final = 1000  # RFC 6455 section 7.4.1; the default of ASGI
_REFUSING_CLOSES: Final = frozenset({1008, 1013, 3000, 3003, 3008})  # codes of WebSockets; see _problem
_FORBIDDEN: Final = 403  # the status that servers send if an app closes a handshake before it accepts it


class RequestContext(dict[str, Any]):
    """The fields of one request's log lines, and further facts for its access line.

    Attributes:
        reason: Why the request was refused, if a reason was given.
        failed: An exception has left the app; it has a log record of its own.
        end_reason: Why a stream or a WebSocket has ended, if neither the app nor the client has ended it.
    """

    reason: Reason | None = None
    failed = False
    end_reason: str | None = None

    def explain_handshake(self, status: int, text: str) -> None:
        """Record why the app refuses a WebSocket handshake, unless a reason was given before."""
        if self.reason is None:
            code = _UNEXPLAINED[status].code if status in _UNEXPLAINED else "websocket_refused"
            self.reason = Reason(code, " ".join(text.split())[:_LONGEST_TEXT])

    def explain_close(self, message: Mapping[str, Any], *, is_open: bool) -> Reason | None:
        """Return why the app refuses the client by closing a WebSocket with this message; None if it does not.

        To close a handshake is to refuse it. An open WebSocket is refused if the code says so, and a reason was given.
        """
        code = message.get("code", _NORMAL_CLOSURE)
        if is_open:
            return self.reason if code in _REFUSING_CLOSES else None
        reason = message.get("reason") or f"{code}, before it was open"
        self.explain_handshake(_FORBIDDEN, f"the app has closed it: {reason}")
        return self.reason

    def refusal(self, status: int, scope_type: str) -> Reason | None:
        """Return why a request with this status was refused, or None if it was not refused."""
        if status in (_REFUSING if scope_type == "http" else _REFUSING_HANDSHAKE):
            return self.reason or _UNEXPLAINED.get(status)
        return None


_fields: ContextVar[dict[str, Any] | None] = ContextVar("fastapi_prodkit", default=None)


begin = _fields.set  # opens a context of its own with these fields; returns a token
end = _fields.reset  # closes the context of the token
current = _fields.get  # returns the fields themselves, not a copy; None outside of a context


def request_id() -> str | None:
    """Return the id of the current request, or None outside of a request."""
    return (_fields.get() or {}).get("request_id")


def bind(**fields: Any) -> None:
    """Add fields to the current context; outside of a request, to that of the current task."""
    context = _fields.get()
    if context is None:
        _fields.set(fields)
    else:
        context.update(fields)


def refuse(reason: Reason) -> None:
    """Record why the current request is refused. If it is called several times, the last reason counts.

    Everything that refuses a request calls this, in the task or thread that serves the request. The call has no effect
    outside of a request, or if the request is served in the end.
    """
    context = _fields.get()
    if isinstance(context, RequestContext):
        context.reason = reason


def refuse_handshake(status: int, text: str) -> None:
    """Record why the app refuses the WebSocket handshake of this request, unless a reason was given before."""
    context = _fields.get()
    if isinstance(context, RequestContext):
        context.explain_handshake(status, text)


def explain_end(reason: str) -> None:
    """Record why the current WebSocket ends, if neither the app nor the client has ended it."""
    context = _fields.get()
    if isinstance(context, RequestContext):
        context.end_reason = reason


def keep(error: BaseException, context: dict[str, Any]) -> None:
    """Keep a request's context for the record of its exception, which the server writes after the context is closed."""
    vars(error)[_scope.EXCEPTION_CONTEXT] = context  # not setattr, which an exception's class may refuse


def of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the current context; outside of a request, that of the request that raised the record's exception."""
    context = _fields.get()
    if context is None and isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        context = vars(record.exc_info[1]).get(_scope.EXCEPTION_CONTEXT)
    return context or {}
