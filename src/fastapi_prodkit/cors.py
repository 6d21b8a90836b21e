"""Strict CORS: which web origins may read responses, according to the Fetch standard.

An origin is allowed if it is listed, if `origin_regex` matches the whole of it, or if it is a deployment of one Vercel
project. Other origins get no Access-Control header. The origin `null` is never allowed: a sandboxed frame of any site
sends it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final, Literal, TypedDict, Unpack

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Code, Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import RawHeaders
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import CorsSettings

__all__ = ["CORSMiddleware"]

# What browsers send for a page with an origin: no `null`, no path, no list, nothing that could end a header line.
_ORIGIN = re.compile(rb"[a-z][a-z0-9+.-]*://[A-Za-z0-9._:\[\]-]{1,261}")
_LONGEST_LOGGED = 300  # bytes, of what a client has sent
_ANY = b"*"  # any origin, any method, or any header
_POLICY = frozenset(
    b"access-control-" + name
    for name in (
        b"allow-credentials",
        b"allow-headers",
        b"allow-methods",
        b"allow-origin",
        b"allow-private-network",
        b"expose-headers",
        b"max-age",
    )
)
_OURS = _POLICY | {b"vary"}
_ALLOW_ORIGIN = b"access-control-allow-origin"
_REQUEST_METHOD, _REQUEST_HEADERS = b"access-control-request-method", b"access-control-request-headers"
_PRIVATE_NETWORK = b"access-control-request-private-network"
_SAFE_METHODS = frozenset({b"GET", b"HEAD", b"POST"})  # Fetch standard: no preflight has to allow these
_NOT_WILD = b"authorization"  # Fetch standard: `*` does not include this header
_NEEDS_DECISION = ("OPTIONS", None)  # methods: of a request that may be a preflight, and of a WebSocket
_STARLETTE_NAMES: Final = {"allow_origins": "origins", "allow_origin_regex": "origin_regex"}


class CORSKeywords(TypedDict, total=False):
    """Fields of `CorsSettings`, and Starlette's names for two of the fields."""

    origins: Collection[str]
    allow_origins: Collection[str]
    origin_regex: str | None
    allow_origin_regex: str | None
    vercel_project: str | None
    vercel_team: str | None
    allow_credentials: bool
    allow_methods: Collection[str]
    allow_headers: Collection[str]
    expose_headers: Collection[str]
    max_age: int


class CORSMiddleware(Layer):
    """Tell browsers which origins may read responses, and answer their preflights.

        app.add_middleware(CORSMiddleware, origins=["https://app.example.com"], allow_credentials=True)

    A preflight does not reach the app. Access-Control headers that the app sets are removed: there is one policy, in
    one place. Browsers send WebSocket handshakes from any site, with cookies. So a handshake is refused with 403 unless
    its origin is allowed or is that of the host, or it has no Origin, as from clients other than browsers.

    Args:
        app: The ASGI app to wrap.
        settings: Values of the keywords that are not given.
        allow_private_network: Starlette's keyword; True is refused, because private networks are never allowed here.

    Keyword Args:
        origins: Exact origins, such as https://app.example.com, or `*`. Default: none.
        origin_regex: Regular expression that a whole origin must match. Default: none.
        vercel_project: Vercel project of the front end. Default: none.
        vercel_team: Vercel team (slug) that owns the project. Default: none.
        allow_credentials: Let browsers send cookies and HTTP authentication. Default: False.
        allow_methods: Methods that preflights allow. Default: GET, POST, PUT, PATCH, DELETE.
        allow_headers: Request headers that preflights allow. Default: Authorization, Content-Type, X-Request-ID.
        expose_headers: Response headers that scripts may read. Default: X-Request-ID, RateLimit, RateLimit-Policy,
            Retry-After.
        max_age: How long browsers keep a preflight's answer, seconds, at most 7200. Default: 600.
        allow_origins: Starlette's name of `origins`.
        allow_origin_regex: Starlette's name of `origin_regex`.

    Raises:
        ConfigurationError: `*` is combined with credentials; `allow_private_network` is True; or a keyword does not
            exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})
    runs_on_plain_response = False

    def __init__(
        self,
        app: ASGIApp,
        settings: CorsSettings | None = None,
        *,
        allow_private_network: Literal[False] = False,
        **keywords: Unpack[CORSKeywords],
    ) -> None:
        if allow_private_network:
            raise ConfigurationError("allow_private_network: private networks are never allowed here; leave it out")
        self.app = app
        values = with_keywords(
            self, settings or CorsSettings(), keywords, CORSKeywords.__optional_keys__, _STARLETTE_NAMES
        )
        _refuse_wildcards(values)
        self._public = "*" in values.origins
        self._patterns = tuple(_patterns(values))
        # If all origins or none are allowed, every origin gets the same response: it does not vary.
        self._base = {b"vary": b"Origin"} if values.configured and not self._public else {}
        credentials = {b"access-control-allow-credentials": b"true"} if values.allow_credentials else {}
        self._granted = {
            **self._base,
            **credentials,
            **_header(b"access-control-expose-headers", values.expose_headers),
        }
        # The headers for a listed origin, made once; those of a preflight are others.
        listed = () if self._public else [origin.encode() for origin in values.origins]
        self._listed: dict[bytes | None, dict[bytes, bytes]] = {
            origin: {_ALLOW_ORIGIN: origin, **self._granted} for origin in listed
        }
        self._preflight = {
            **self._base,
            b"access-control-max-age": str(values.max_age).encode(),
            **_header(b"access-control-allow-methods", values.allow_methods),
            **_header(b"access-control-allow-headers", values.allow_headers),
            **credentials,
        }
        self._methods = _SAFE_METHODS.union(method.encode() for method in values.allow_methods)
        self._headers = frozenset(name.encode().lower() for name in values.allow_headers)

    def inside(self, outer: Layer) -> Layer:
        """Replace the policy of a layer further out."""
        return _InnerPolicy(self) if isinstance(outer, CORSMiddleware) else self

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Answer a preflight, refuse a WebSocket of another origin, and add the CORS headers to other responses."""
        scope = exchange.scope
        origin = exchange.headers.get(b"origin")
        if exchange.has_repeated_headers and len(lines := exchange.header_values(b"origin")) > 1:
            origin = b", ".join(lines)  # RFC 9110 section 5.3; a list equals no allowed origin
        granted = self._listed.get(origin)
        if granted is None or scope.get("method") in _NEEDS_DECISION:
            return self._decide(exchange, scope, origin)
        exchange.response_headers |= granted
        return None

    def _decide(self, exchange: Exchange, scope: Scope, origin: bytes | None) -> ASGIApp | None:
        if scope["type"] == "websocket":
            return self._handshake_refusal(exchange, origin)
        allowed = self._allowed(origin)
        preflight = origin is not None and scope["method"] == "OPTIONS" and _REQUEST_METHOD in exchange.headers
        refusal = self._preflight_refusal(exchange, origin, allowed) if preflight else None
        if allowed is None or refusal is not None:
            exchange.response_headers |= self._base
            return refusal
        exchange.response_headers[_ALLOW_ORIGIN] = allowed
        exchange.response_headers |= self._preflight if preflight else self._granted
        return _answer_preflight if preflight else None

    def _preflight_refusal(self, exchange: Exchange, origin: bytes | None, allowed: bytes | None) -> Refusal | None:
        """Return the refusal of a preflight whose origin, method or headers are not allowed; None if all are."""
        if allowed is None:
            return _refusal("Requests", origin)
        method = b", ".join(exchange.header_values(_REQUEST_METHOD))
        if method not in self._methods and _ANY not in self._methods:
            reason = _reason("cors_method_not_allowed", _REQUEST_METHOD, method, "is not one of CORS_ALLOW_METHODS")
            return Refusal(ProblemError(403, "This method is not allowed from other origins."), reason)
        if refused := b", ".join(self._refused_headers(exchange)):
            reason = _reason("cors_header_not_allowed", _REQUEST_HEADERS, refused, "is not in CORS_ALLOW_HEADERS")
            return Refusal(ProblemError(403, "These headers are not allowed from other origins."), reason)
        if exchange.headers.get(_PRIVATE_NETWORK) == b"true":
            reason = _reason("cors_private_network_not_allowed", _PRIVATE_NETWORK, b"true", "is never allowed")
            return Refusal(ProblemError(403, "Requests into a private network are not allowed."), reason)
        return None

    def _refused_headers(self, exchange: Exchange) -> Iterator[bytes]:
        for line in exchange.header_values(_REQUEST_HEADERS):
            for name in filter(None, map(bytes.strip, line.lower().split(b","))):
                if name not in self._headers and (_ANY not in self._headers or name == _NOT_WILD):
                    yield name

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Remove the Access-Control headers of the app, and merge its Vary with ours."""
        if _OURS.isdisjoint(present) or exchange.scope["type"] == "websocket":
            return
        headers[:] = [pair for pair in headers if pair[0] not in _POLICY]
        ours = exchange.response_headers.get(b"vary", b"")
        lines = [*(value for name, value in headers if name == b"vary"), ours]
        fields = {field.lower(): field for line in lines for field in map(bytes.strip, line.split(b",")) if field}
        if fields:
            exchange.response_headers[b"vary"] = b", ".join(fields.values())

    def _handshake_refusal(self, exchange: Exchange, origin: bytes | None) -> ASGIApp | None:
        if origin is None or _is_own(exchange, origin) or self._may_connect(exchange, origin):
            return None
        return _refusal("WebSocket handshakes", origin)

    def _allowed(self, origin: bytes | None) -> bytes | None:
        """Return the value of Access-Control-Allow-Origin, or None."""
        if self._public:
            return _ANY
        if origin is None or origin in self._listed:
            return origin
        if self._patterns and _ORIGIN.fullmatch(origin):
            text = origin.decode()
            if any(pattern.fullmatch(text) for pattern in self._patterns):
                return origin
        return None

    def _may_connect(self, exchange: Exchange, origin: bytes) -> bool:
        if self._public:  # `*` excludes credentials, and a handshake may have cookies
            return b"cookie" not in exchange.headers
        return self._allowed(origin) is not None


class _InnerPolicy(Layer):
    """Replace the headers that a layer further out has added."""

    def __init__(self, policy: CORSMiddleware) -> None:
        self._policy = policy

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        for name in _POLICY:
            exchange.response_headers.pop(name, None)
        return self._policy.on_request(exchange)


def _refusal(what: str, origin: bytes | None) -> Refusal:
    reason = _reason("origin_not_allowed", b"origin", origin or b"", "is not one of CORS_ORIGINS")
    return Refusal(ProblemError(403, f"{what} from this origin are not allowed."), reason)


def _reason(code: Code, header: bytes, value: bytes, wrong: str) -> Reason:
    return Reason(code, f"{header.decode().title()}: {value[:_LONGEST_LOGGED].decode('latin-1')!r} {wrong}")


async def _answer_preflight(_scope: Scope, _receive: Receive, send: Send) -> None:
    vary = [(b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers")]
    await send({"type": "http.response.start", "status": 204, "headers": vary})
    await send({"type": "http.response.body"})


def _is_own(exchange: Exchange, origin: bytes) -> bool:
    """Return whether a handshake comes from a page of the same scheme, host and port."""
    host = exchange.headers.get(b"host", b"").lower()
    if exchange.scope.get("scheme") == "wss":
        return origin == b"https://" + host.removesuffix(b":443")
    return origin == b"http://" + host.removesuffix(b":80")


def _header(name: bytes, values: tuple[str, ...]) -> dict[bytes, bytes]:
    return {name: ", ".join(values).encode()} if values else {}


def _patterns(settings: CorsSettings) -> Iterator[re.Pattern[str]]:
    if settings.origin_regex:
        yield re.compile(settings.origin_regex)
    if settings.vercel_project and settings.vercel_team:
        # Only the host of a single deployment. If a dash were allowed in the middle, as hosts of branches need it, a
        # team whose slug ends in "-{team}" could create a project whose hosts match.
        project, team = re.escape(settings.vercel_project), re.escape(settings.vercel_team)
        yield re.compile(rf"https://{project}-[a-z0-9]+-{team}\.vercel\.app")


def _refuse_wildcards(settings: CorsSettings) -> None:
    names = ("origins", "allow_methods", "allow_headers", "expose_headers")
    wild = [f"CORS_{name.upper()}" for name in names if "*" in getattr(settings, name)]
    if wild and settings.allow_credentials:
        raise ConfigurationError(
            f"{', '.join(wild)}: browsers refuse `*` together with CORS_ALLOW_CREDENTIALS; "
            "list what is allowed, or set it to false"
        )
