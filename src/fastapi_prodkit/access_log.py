"""One canonical line per request, and the boundary where an unhandled exception is logged, once.

Exactly one line is written whatever happens: an exception, a client that leaves (status 499), a cancellation, a
WebSocket (at its close).

When an exception arrives here and the response is complete (the 500 problem was sent, or a background task failed
after a 200), nothing is wrong with the connection: raising on would make uvicorn close it unannounced, which a load
balancer turns into a sporadic 502. So it is swallowed. If the response is not complete it is raised on, so that the
client sees a broken transfer and not a complete one.
"""

import logging
from collections.abc import Callable, Container
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from starlette.websockets import WebSocketDisconnect

from fastapi_prodkit import _scope
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.sections import AccessLogSettings

__all__ = ["AccessLogMiddleware"]

_logger = logging.getLogger("fastapi_prodkit.access")
_errors = logging.getLogger("fastapi_prodkit.error")
_LONGEST_PATH = 2048  # characters in a line; a path may have as many as the server reads of a request


class AccessLogMiddleware(Layer):
    """Log each request once, with method, route, path, status, duration and client.

    The query string, headers and bodies are never logged. Lines go to the logger `fastapi_prodkit.access`, unhandled
    exceptions to `fastapi_prodkit.error`.

    Args:
        app: The app to serve.
        settings: Has no fields of its own.
        exempt: Paths relative to the app, without trailing slash, that get no line; their exceptions are logged.
        propagate: Raise every exception on, complete response or not, so that `TestClient` shows it.
        silent: Write no lines, and be the boundary of exceptions only.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self,
        app: ASGIApp,
        settings: AccessLogSettings | None = None,  # noqa: ARG002 - every middleware takes its section
        *,
        exempt: Container[str] = frozenset(),
        propagate: bool = False,
        silent: bool = False,
    ) -> None:
        self.app = app
        self._silent = silent
        self._exempt = exempt
        self._propagate = propagate
        self._write = _find_writer()

    def on_end(self, exchange: Exchange) -> None:
        """Write the line."""
        if self._silent or (exchange.path in self._exempt and exchange.is_exempt(self._exempt)):
            return
        if not _logger.isEnabledFor(logging.INFO):
            return
        scope = exchange.scope
        client = scope.get("client")
        fields = {
            "http_method": scope.get("method"),
            "http_route": exchange.route,
            "http_path": scope["path"][:_LONGEST_PATH],
            "http_status": exchange.status,
            "duration_ms": int(exchange.duration * 1e6) / 1e3,
            "client_ip": client and client[0],
        }
        if client is None or scope["type"] == "websocket":
            fields = {name: value for name, value in fields.items() if value is not None}
        self._write(fields)

    def on_error(self, exchange: Exchange, error: BaseException) -> bool:
        """Log the exception, and say whether the client has all that it will get."""
        gone = exchange.client_disconnected and isinstance(error, ClientDisconnect | OSError)
        if gone or isinstance(error, WebSocketDisconnect):
            return True  # not a fault of the app, and there is nobody left to tell
        _errors.error(
            "unhandled exception", exc_info=error, extra={"http_path": exchange.scope["path"][:_LONGEST_PATH]}
        )
        _scope.mark_logged(error)
        return exchange.complete and not self._propagate


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
