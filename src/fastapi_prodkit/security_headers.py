"""Security headers on every response.

They follow the OWASP Secure Headers Project and ASVS 5.0, chapter 3. A header that the handler has set stays as it is,
so no header is sent twice.
"""

import logging
from collections.abc import Collection, Mapping
from itertools import product
from typing import Final, TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit._asgi import UNMATCHED, route_template
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import RawHeaders
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import HeadersSettings

__all__ = ["FASTAPI_DOCS_CSP", "GRAPHIQL_CSP", "SQLADMIN_CSP", "PagePolicyMiddleware", "SecurityHeadersMiddleware"]

_STRICT: Final = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"

FASTAPI_DOCS_CSP: Final = (
    f"{_STRICT}; form-action 'none'; connect-src 'self'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "worker-src blob:; style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; img-src 'self' data: blob: https://fastapi.tiangolo.com https://cdn.redoc.ly"
)
"""For FastAPI's own `/docs` and `/redoc`: their inline scripts, and what they load from other hosts."""

SQLADMIN_CSP: Final = (
    f"{_STRICT}; form-action 'self'; connect-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; font-src 'self'; img-src 'self' data:"
)
"""For the pages of sqladmin: its own files, and the inline scripts and styles of its templates."""

GRAPHIQL_CSP: Final = (
    f"{_STRICT}; form-action 'none'; connect-src 'self'; script-src 'unsafe-inline' https://unpkg.com; "
    "style-src 'unsafe-inline' https://unpkg.com; font-src data:; img-src data:"
)
"""For the GraphiQL page of strawberry: its inline script and style, and what it loads from unpkg.com."""

SWITCHING_PROTOCOLS, BAD_REQUEST = 101, 400
_MAX_PAGES = 100  # pages for which a warning is logged
_SECURE = frozenset({"https", "wss"})
_REMOVED = frozenset({b"server", b"x-powered-by"})
_CSP = b"content-security-policy"
_FIELDS = {  # of the settings
    "hsts_max_age": b"strict-transport-security",
    "frame_options": b"x-frame-options",
    "csp": _CSP,
    "referrer_policy": b"referrer-policy",
    "permissions_policy": b"permissions-policy",
    "cross_origin_opener_policy": b"cross-origin-opener-policy",
}
_WATCHED = _REMOVED.union(_FIELDS.values(), (b"x-content-type-options", b"cache-control"))
_ByResponse = dict[tuple[bool, bool, bool], RawHeaders]  # by: over TLS, is HTML, must not be stored

_logger = logging.getLogger("fastapi_prodkit.security_headers")


class SecurityHeadersKeywords(TypedDict, total=False):
    """Fields of `HeadersSettings`."""

    hsts_max_age: int
    csp: str
    referrer_policy: str
    permissions_policy: str
    frame_options: str
    cross_origin_opener_policy: str


class SecurityHeadersMiddleware(Layer):
    """Add the security headers to every response.

        app.add_middleware(SecurityHeadersMiddleware, csp="default-src 'self'")

    Strict-Transport-Security is sent over https and wss only (RFC 6797 section 7.2), Cross-Origin-Opener-Policy with
    HTML only. `Cache-Control: no-store` is added to errors, and to responses to requests with Authorization, Cookie or
    X-API-Key.
    `Server` and `X-Powered-By` are removed. A refused WebSocket handshake gets the headers, an accepted one does not.

    A header that the app sets stays as it is; one that it sets to an empty value is left out. If another
    SecurityHeadersMiddleware is further out, this one only adds the headers whose settings it was given.

    Args:
        app: The ASGI app to wrap.
        settings: Values of the keywords that are not given. An empty value leaves its header out.
        policies: Content-Security-Policy by path, in place of `csp`: for a path relative to the app and all paths below
            it. The longest path that matches a request counts.

    Keyword Args:
        hsts_max_age: Strict-Transport-Security, seconds; 0 leaves it out. Default: 63072000.
        csp: Content-Security-Policy. Default: default-src 'none'; object-src 'none'; base-uri 'none'; form-action
            'none'; frame-ancestors 'none'.
        referrer_policy: Referrer-Policy. Default: no-referrer.
        permissions_policy: Permissions-Policy. Default: camera=(), geolocation=(), microphone=(), payment=(), usb=().
        frame_options: X-Frame-Options. Default: DENY.
        cross_origin_opener_policy: Cross-Origin-Opener-Policy. Default: same-origin.

    Raises:
        ConfigurationError: A path does not start with a slash, or a policy is not printable ASCII on one line; or a
            keyword does not exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self,
        app: ASGIApp,
        settings: HeadersSettings | None = None,
        *,
        policies: Mapping[str, str] | None = None,
        **keywords: Unpack[SecurityHeadersKeywords],
    ) -> None:
        self.app = app
        accepted = SecurityHeadersKeywords.__optional_keys__
        self._settings = with_keywords(self, settings or HeadersSettings(), keywords, accepted)
        self._policies = _checked(policies or {})
        self._headers = _HeadersByPath(self._settings, self._policies)

    def inside(self, outer: Layer) -> Layer:
        """Leave the headers whose settings were not given to a layer further out."""
        return _GivenHeaders(self._settings, self._policies) if isinstance(outer, SecurityHeadersMiddleware) else self

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Add the headers that the response does not have."""
        if exchange.status == SWITCHING_PROTOCOLS:
            return
        additions = self._headers.find(exchange, present)
        if not _WATCHED.isdisjoint(present):
            # A header with an empty value is left out.
            headers[:] = [pair for pair in headers if pair[0] not in _REMOVED and (pair[1] or pair[0] not in _WATCHED)]
            additions = [pair for pair in additions if pair[0] not in present]
        headers += additions


class _GivenHeaders(Layer):
    """Add the headers whose settings were given, before a layer further out adds the others."""

    def __init__(self, settings: HeadersSettings, policies: Mapping[str, str]) -> None:
        given = frozenset(_FIELDS[field] for field in settings.model_fields_set)
        self._headers = _HeadersByPath(settings, policies, only=given)

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: dict[bytes, bytes]) -> None:
        if exchange.status == SWITCHING_PROTOCOLS:
            return
        additions = [pair for pair in self._headers.find(exchange, present) if pair[0] not in present]
        headers += additions
        present.update(additions)


class PagePolicyMiddleware(Layer):
    """Log a warning when an HTML page is sent under a Content-Security-Policy that allows it no scripts or no styles.

        app.add_middleware(PagePolicyMiddleware)

    The warning is logged once for each route, and once for each path without a route, such as that of a file; at most
    100 times in all. The logger is `fastapi_prodkit.security_headers`. Meant for development: `create_app` adds this
    layer if `ENVIRONMENT` is `dev`. It must be outside of the layer that sets the policy.

    Args:
        app: The ASGI app to wrap.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._reported: set[str] = set()

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if a layer further out checks the policy: the outermost sees the policy that is sent."""
        return None if isinstance(outer, PagePolicyMiddleware) else self

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Check the policy of a page, and log a warning."""
        if not _is_html(present):
            return
        blocked = _blocked_by(dict(headers).get(_CSP, b"").decode("latin-1"))
        route = route_template(exchange.scope, exchange.root_path)
        place = exchange.path if route == UNMATCHED else route
        if blocked and place not in self._reported and len(self._reported) < _MAX_PAGES:
            self._reported.add(place)
            _logger.warning(
                "the page at %s is sent under a Content-Security-Policy that allows no %s: give its path "
                "another policy, SecurityHeadersMiddleware(policies={...}) or create_app(csp_policies={...})",
                place,
                " and no ".join(blocked),
            )


class _HeadersByPath:
    """The headers to add to a response, made once for each kind of response."""

    def __init__(
        self, settings: HeadersSettings, policies: Mapping[str, str], *, only: Collection[bytes] | None = None
    ) -> None:
        self._general = _by_response(settings, only)
        with_policy = None if only is None else {*only, _CSP}
        self._by_prefix = [
            (prefix, _by_response(settings.model_copy(update={"csp": policies[prefix]}), with_policy))
            for prefix in sorted(policies, key=len, reverse=True)
        ]

    def find(self, exchange: Exchange, present: Mapping[bytes, bytes]) -> RawHeaders:
        """Return the headers for the response of a request."""
        request = exchange.headers
        by_response = self._by_response_of(exchange.path) if self._by_prefix else self._general
        authenticated = b"authorization" in request or b"cookie" in request or b"x-api-key" in request
        private = authenticated or exchange.status >= BAD_REQUEST
        return by_response[exchange.scope.get("scheme") in _SECURE, _is_html(present), private]

    def _by_response_of(self, path: str) -> _ByResponse:
        for prefix, by_response in self._by_prefix:
            if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/"):
                return by_response
        return self._general


def _by_response(settings: HeadersSettings, only: Collection[bytes] | None) -> _ByResponse:
    """Return the headers for each kind of response.

    Args:
        settings: The values of the headers.
        only: Names of the headers to return, those with an empty value too; None for all headers that have a value.
    """
    found = {}
    for secure, html, private in product((False, True), repeat=3):
        headers = _additions(settings, secure=secure, html=html, private=private)
        found[secure, html, private] = [pair for pair in headers if (pair[1] if only is None else pair[0] in only)]
    return found


def _additions(settings: HeadersSettings, *, secure: bool, html: bool, private: bool) -> RawHeaders:
    hsts = settings.hsts_max_age and secure
    values = {
        b"strict-transport-security": f"max-age={settings.hsts_max_age}; includeSubDomains" if hsts else "",
        b"x-content-type-options": "nosniff",
        b"x-frame-options": settings.frame_options,
        _CSP: settings.csp,
        b"referrer-policy": settings.referrer_policy,
        b"permissions-policy": settings.permissions_policy,
        b"cross-origin-opener-policy": settings.cross_origin_opener_policy if html else "",
        b"cache-control": "no-store" if private else "",
    }
    return [(name, value.encode()) for name, value in values.items()]


def _is_html(headers: Mapping[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"")[:9].lower() == b"text/html"


def _checked(policies: Mapping[str, str]) -> dict[str, str]:
    """Return the policies by path without a trailing slash."""
    for path, policy in policies.items():
        if not path.startswith("/"):
            raise ConfigurationError(f"policies: {path!r} does not start with a slash; write it as '/admin', or '/'")
        if not (policy.isascii() and policy.isprintable()):
            raise ConfigurationError(f"policies: the policy of {path!r} must be printable ASCII on one line")
    return {path.rstrip("/"): policy for path, policy in policies.items()}


def _blocked_by(policy: str) -> list[str]:
    """Return which of scripts and styles a policy blocks from every source (CSP level 3, section 6.8)."""
    directives: dict[str, list[str]] = {}
    for directive in policy.lower().split(";"):
        name, *sources = directive.split() or [""]
        directives.setdefault(name, sources)  # the first of several counts
    blocked = []
    for kind in ("script", "style"):
        names = (f"{kind}-src-elem", f"{kind}-src", "default-src")
        sources = next((directives[name] for name in names if name in directives), ["*"])
        if sources in ([], ["'none'"]):
            blocked.append(f"{kind}s")
    return blocked
