"""Write one log line for each request.

Exactly one line is written whatever happens: an exception, a client that disconnects (status 499), a cancellation, a
WebSocket (when it is closed).
"""

import logging
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp

from fastapi_prodkit import _context
from fastapi_prodkit._asgi import LONGEST_LOGGED_PATH
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._pipeline.stream import ResponseStream
from fastapi_prodkit.logging.direct import DirectWriter
from fastapi_prodkit.logging.handler import EVENT_NAME

__all__ = ["AccessLogMiddleware"]

_logger = logging.getLogger("fastapi_prodkit.access")
_EVENT = "request"
_LOWEST_ERROR, _LOWEST_SERVER_ERROR = 400, 500  # not from HTTPStatus: looking up an enumeration's member costs more


class AccessLogMiddleware(Layer):
    """Log each request once, with method, route, path, status, duration and client.

        app.add_middleware(AccessLogMiddleware, exempt={"/health"})

    The query string, headers and bodies are never logged. Lines go to the logger `fastapi_prodkit.access`. An exception
    is logged by `errors.ErrorBoundaryMiddleware`.

    The level is INFO. For a refusal (by a layer, or with 408, 413, 429, 431, 503 or 504) it is WARNING, and the line
    has a `reason`. For any other 5xx it is ERROR, or WARNING if an exception is the cause, which is logged by itself.

    Args:
        app: The app to serve.
        exempt: Paths relative to the app, without trailing slash, that are not logged.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(self, app: ASGIApp, *, exempt: Collection[str] = frozenset()) -> None:
        self.app = app
        self.exempt = checked_exempt(exempt)
        levels = (logging.INFO, logging.WARNING, logging.ERROR)
        self._direct = {level: DirectWriter(_logger, _EVENT, level) for level in levels}

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if a layer further out writes the line: only the outermost sees the final status."""
        return None if isinstance(outer, AccessLogMiddleware) else self

    def on_end(self, exchange: Exchange) -> None:
        """Write the line."""
        level = logging.INFO if exchange.status < _LOWEST_ERROR and exchange.refusal is None else _level(exchange)
        if not _logger.isEnabledFor(level):
            return
        scope = exchange.scope
        client, method = scope.get("client"), scope.get("method")
        fields = {
            "http_method": method,
            "http_route": exchange.route,
            "http_path": scope["path"][:LONGEST_LOGGED_PATH],
            "http_status": exchange.status,
            "duration_ms": int(exchange.duration * 1e6) / 1e3,
            "client_ip": client and client[0],
        }
        if client is None or method is None:  # a WebSocket, or a request that the server could not parse
            fields["end_reason"] = exchange.context.end_reason
            fields = {name: value for name, value in fields.items() if value not in {None, ""}}
        if exchange.refusal is not None and exchange.refusal.text:
            fields["reason"] = exchange.refusal.text
        if exchange.stream is not None:
            fields |= _stream_fields(exchange, exchange.stream)
        write = self._direct[level].find()
        if write is not None:
            write(fields)
        else:
            _log(level, fields, scope["type"])


def _level(exchange: Exchange) -> int:
    """Return the level of an error: WARNING for an exception, which has a record of its own with the level ERROR."""
    if exchange.refusal is not None:
        return logging.WARNING
    if exchange.status < _LOWEST_SERVER_ERROR:
        return logging.INFO
    return logging.WARNING if exchange.context.failed else logging.ERROR


def _stream_fields(exchange: Exchange, stream: ResponseStream) -> dict[str, Any]:
    """Return the fields of the line for a response in several parts."""
    ended = "complete" if exchange.complete else "error"
    ended = "client_disconnected" if exchange.client_disconnected else ended
    fields = {"response_bytes": stream.size, "end_reason": exchange.context.end_reason or ended}
    if stream.first_byte_at is not None:
        fields["time_to_first_byte_ms"] = int((stream.first_byte_at - exchange.started_at) * 1e6) / 1e3
    return fields


def _log(level: int, fields: dict[str, Any], kind: str) -> None:
    """Log a record. Its message is for formats that show no fields; `EventHandler` writes the event's name instead."""
    method = fields.get("http_method", "WebSocket" if kind == "websocket" else "-")
    arguments = (method, fields["http_route"], fields["http_status"])
    # Not by Logger.info, which searches the stack for its caller: that costs a tenth of a request.
    origin, message = (__file__, _log.__code__.co_firstlineno), "%s %s %s"
    record = _logger.makeRecord(_logger.name, level, *origin, message, arguments, None, _log.__name__)
    # Not as `extra`, which fails where a record factory has set an attribute of the same name.
    attributes = vars(record)
    attributes |= {**fields, EVENT_NAME: _EVENT}
    if (request_id := _context.request_id()) is not None:
        attributes.setdefault("request_id", request_id)
    _logger.handle(record)
