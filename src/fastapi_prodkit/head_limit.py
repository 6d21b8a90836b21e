"""Limit the number of header lines of a request.

A request with a million header lines would cost time in each layer that searches them. The size of a head must be
limited by the server, which reads it first: `fastapi-prodkit serve` does this.
"""

from typing import TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["HeadLimitMiddleware"]


class HeadLimitKeywords(TypedDict, total=False):
    """Fields of `LimitsSettings`."""

    max_headers: int


class HeadLimitMiddleware(Layer):
    """Refuse a request with more header lines than allowed with a 431 problem (RFC 6585 section 5).

        app.add_middleware(HeadLimitMiddleware, max_headers=50)

    WebSocket handshakes are refused as well.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.

    Keyword Args:
        max_headers: Most header lines. Default: 100.

    Raises:
        ConfigurationError: There is no `max_headers`; or a keyword does not exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self, app: ASGIApp, settings: LimitsSettings | None = None, **keywords: Unpack[HeadLimitKeywords]
    ) -> None:
        settings = with_keywords(self, settings or LimitsSettings(), keywords, HeadLimitKeywords.__optional_keys__)
        if settings.max_headers is None:
            raise ConfigurationError("LIMITS_MAX_HEADERS is none: set a number, or leave the middleware out")
        self.app = app
        self._most = settings.max_headers
        reason = Reason("head_too_large", f"more header lines than LIMITS_MAX_HEADERS={settings.max_headers}")
        self._refusal = Refusal(ProblemError(431, "The request has too many header lines."), reason)

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Refuse a request with too many header lines."""
        return self._refusal if len(exchange.scope["headers"]) > self._most else None
