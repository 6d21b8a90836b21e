"""One line of the log for each request.

Exactly one line is written whatever happens: an exception, a client that disconnects (status 499), a cancellation, a
WebSocket (when it is closed).
"""

import logging
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp

from fastapi_prodkit import _context
from fastapi_prodkit._asgi import LONGEST_LOGGED_PATH
from fastapi_prodkit._direct_log import DirectWriter
from fastapi_prodkit._log_handler import EVENT_NAME
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt

__all__ = ["AccessLogMiddleware"]

_logger = logging.getLogger("fastapi_prodkit.access")
_EVENT = "request"


class AccessLogMiddleware(Layer):
    """Log each request once, with method, route, path, status, duration and client.

        app.add_middleware(AccessLogMiddleware, exempt={"/health"})

    The query string, headers and bodies are never logged. Lines go to the logger `fastapi_prodkit.access`. An exception
    is logged by `errors.ErrorBoundaryMiddleware`.

    Args:
        app: The app to serve.
        exempt: Paths relative to the app, without trailing slash, whose requests get no line.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(self, app: ASGIApp, *, exempt: Collection[str] = frozenset()) -> None:
        self.app = app
        self.exempt = checked_exempt(exempt)
        self._direct = DirectWriter(_logger, _EVENT)

    def inside(self, outer: Layer) -> Layer | None:
        """Leave the line to a layer further out, which sees the final status."""
        return None if isinstance(outer, AccessLogMiddleware) else self

    def on_end(self, exchange: Exchange) -> None:
        """Write the line."""
        if not _logger.isEnabledFor(logging.INFO):
            return
        scope = exchange.scope
        client = scope.get("client")
        fields = {
            "http_method": scope.get("method"),
            "http_route": exchange.route,
            "http_path": scope["path"][:LONGEST_LOGGED_PATH],
            "http_status": exchange.status,
            "duration_ms": int(exchange.duration * 1e6) / 1e3,
            "client_ip": client and client[0],
        }
        if client is None or scope["type"] == "websocket":
            fields = {name: value for name, value in fields.items() if value is not None}
        write = self._direct.find() or _log
        write(fields)


def _log(fields: dict[str, Any]) -> None:
    """Make a record. Its message is for formats that show no fields; `EventHandler` writes the event's name instead."""
    arguments = (fields.get("http_method", "WebSocket"), fields["http_route"], fields["http_status"])
    # Not Logger.info: it looks for its caller, which costs a tenth of a request, and is always this function.
    origin, message = (__file__, _log.__code__.co_firstlineno), "%s %s %s"
    record = _logger.makeRecord(_logger.name, logging.INFO, *origin, message, arguments, None, _log.__name__)
    # Not as `extra`, which fails where a record factory has set an attribute of the same name.
    attributes = vars(record)
    attributes |= {**fields, EVENT_NAME: _EVENT}
    if (request_id := _context.request_id()) is not None:
        attributes.setdefault("request_id", request_id)
    _logger.handle(record)
