"""One line of the log for each request.

Exactly one line is written whatever happens: an exception, a client that disconnects (status 499), a cancellation, a
WebSocket (when it is closed).
"""

import logging
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import ASGIApp

from fastapi_prodkit._asgi import LONGEST_LOGGED_PATH
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer

__all__ = ["AccessLogMiddleware"]

_logger = logging.getLogger("fastapi_prodkit.access")


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
        self.exempt = exempt
        self._write = _find_writer()

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
        self._write(fields)


def _find_writer() -> Callable[[dict[str, Any]], None]:
    """Return the direct way to the handler of `configure_logging`, if nobody else listens; it saves the LogRecord."""
    loggers = (_logger, logging.getLogger("fastapi_prodkit"), logging.getLogger())
    handlers = [handler for logger in loggers for handler in logger.handlers]
    direct = getattr(handlers[0], "writer", None) if len(handlers) == 1 else None
    if direct is None or _logger.filters or not _logger.propagate:
        return _log
    writer: Callable[[dict[str, Any]], None] = direct("info", _logger.name, "request")
    return writer


def _log(fields: dict[str, Any]) -> None:
    _logger.info("request", extra=fields)
