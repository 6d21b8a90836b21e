"""Security headers on every response.

They follow the OWASP Secure Headers Project and ASVS 5.0, chapter 3. What a handler sets wins: a header that the
response already carries is left as it is, so no header ever stands there twice.
"""

from collections.abc import Mapping
from itertools import product
from typing import TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit._keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import RawHeaders
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.sections import HeadersSettings

__all__ = ["SecurityHeadersMiddleware"]

SWITCHING_PROTOCOLS, BAD_REQUEST = 101, 400
_SECURE = frozenset({"https", "wss"})
_REMOVED = frozenset({b"server", b"x-powered-by"})


class SecurityHeadersKeywords(TypedDict, total=False):
    """Fields of `HeadersSettings`."""

    hsts_max_age: int
    csp: str
    referrer_policy: str
    permissions_policy: str
    frame_options: str
    cross_origin_opener_policy: str


class SecurityHeadersMiddleware(Layer):
    """Add the security headers to every response that passes.

        app.add_middleware(SecurityHeadersMiddleware, csp="default-src 'self'")

    Strict-Transport-Security is sent over https and wss only (RFC 6797 section 7.2), Cross-Origin-Opener-Policy with
    HTML only. `Cache-Control: no-store` goes on errors and on answers to requests that carry Authorization or Cookie.
    `Server` and `X-Powered-By` are removed. An accepted WebSocket gets nothing; a refused handshake is a response.

    Args:
        app: The ASGI app to wrap.
        settings: Values of the keywords that are not given. An empty value leaves its header out.

    Keyword Args:
        hsts_max_age: Strict-Transport-Security, seconds; 0 leaves it out. Default: 63072000.
        csp: Content-Security-Policy. Default: default-src 'none'; object-src 'none'; base-uri 'none'; form-action
            'none'; frame-ancestors 'none'.
        referrer_policy: Referrer-Policy. Default: no-referrer.
        permissions_policy: Permissions-Policy. Default: camera=(), geolocation=(), microphone=(), payment=(), usb=().
        frame_options: X-Frame-Options. Default: DENY.
        cross_origin_opener_policy: Cross-Origin-Opener-Policy. Default: same-origin.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self, app: ASGIApp, settings: HeadersSettings | None = None, **keywords: Unpack[SecurityHeadersKeywords]
    ) -> None:
        self.app = app
        accepted = SecurityHeadersKeywords.__optional_keys__
        values = with_keywords(self, settings or HeadersSettings(), keywords, accepted)
        self._additions = {
            (secure, html, private): _additions(values, secure=secure, html=html, private=private)
            for secure, html, private in product((False, True), repeat=3)
        }
        self._watched = _REMOVED.union(name for headers in self._additions.values() for name, _ in headers)

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Complete the response."""
        status, request = exchange.status, exchange.headers
        if status == SWITCHING_PROTOCOLS:
            return
        html = present.get(b"content-type", b"")[:9].lower() == b"text/html"
        private = status >= BAD_REQUEST or b"authorization" in request or b"cookie" in request
        additions = self._additions[exchange.scope.get("scheme") in _SECURE, html, private]
        if not self._watched.isdisjoint(present):
            headers[:] = [pair for pair in headers if pair[0] not in _REMOVED]
            additions = [pair for pair in additions if pair[0] not in present]
        headers += additions


def _additions(settings: HeadersSettings, *, secure: bool, html: bool, private: bool) -> RawHeaders:
    hsts = settings.hsts_max_age and secure
    values = {
        b"strict-transport-security": f"max-age={settings.hsts_max_age}; includeSubDomains" if hsts else "",
        b"x-content-type-options": "nosniff",
        b"x-frame-options": settings.frame_options,
        b"content-security-policy": settings.csp,
        b"referrer-policy": settings.referrer_policy,
        b"permissions-policy": settings.permissions_policy,
        b"cross-origin-opener-policy": settings.cross_origin_opener_policy if html else "",
        b"cache-control": "no-store" if private else "",
    }
    return [(name, value.encode()) for name, value in values.items() if value]
