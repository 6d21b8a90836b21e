"""Answer only requests for the host names of the service.

Otherwise a client controls each link, redirect and cache key that is built from the Host header, such as a link to
reset a password. RFC 9112 section 3.2 requires 400 if the header is missing, invalid or repeated.
"""

import re
from collections.abc import Collection
from ipaddress import IPv6Address
from typing import Final, Literal, TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import HostsSettings

__all__ = ["AllowedHostsMiddleware"]

_HIGHEST_PORT = 65_535
_LONGEST_NAME = 253
_LABELS = rb"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*"
_NAME = re.compile(rb"(?:\*\.)?" + _LABELS + rb"\.?|\[[0-9A-Fa-f:.]+\]")
_HOST = re.compile(rb"(" + _LABELS + rb"\.?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
_STARLETTE_NAMES: Final = {"allowed_hosts": "allowed"}


class AllowedHostsKeywords(TypedDict, total=False):
    """Fields of `HostsSettings`, and Starlette's name of the field."""

    allowed: Collection[str]
    allowed_hosts: Collection[str]


class AllowedHostsMiddleware(Layer):
    """Refuse requests for a host name that is not allowed with 400.

        app.add_middleware(AllowedHostsMiddleware, allowed=["api.example.com", "*.example.org"])

    Case, port and a trailing dot do not matter. A missing, repeated or malformed Host is refused even with `*`, and in
    HTTP/1.0 too, where it is optional. WebSocket handshakes are checked as well.

    Args:
        app: The ASGI app to wrap.
        settings: Values of the keywords that are not given.
        exempt: Paths relative to the app whose Host is not checked: load balancers probe them by address.
        www_redirect: Starlette's keyword; True is refused, because nothing is redirected here.

    Keyword Args:
        allowed: Host names; `*.example.com` allows subdomains, `*` any. Required.
        allowed_hosts: Starlette's name of `allowed`.

    Raises:
        ConfigurationError: There is no host name, or one that can never match; `www_redirect` is True; or a keyword
            does not exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self,
        app: ASGIApp,
        settings: HostsSettings | None = None,
        *,
        exempt: Collection[str] = frozenset(),
        www_redirect: Literal[False] = False,
        **keywords: Unpack[AllowedHostsKeywords],
    ) -> None:
        if www_redirect:
            raise ConfigurationError(
                "www_redirect: this middleware never redirects; redirect in the proxy, or in a route"
            )
        accepted = AllowedHostsKeywords.__optional_keys__
        settings = with_keywords(self, settings or HostsSettings(), keywords, accepted, _STARLETTE_NAMES)
        self.app = app
        names = [_pattern(name) for name in settings.allowed]
        if not names:
            raise ConfigurationError(
                "HOSTS_ALLOWED is empty: list the host names of the service, "
                "such as api.example.com,*.example.com; or * for any"
            )
        self._any = b"*" in names
        self._exact = frozenset(name for name in names if not name.startswith(b"*"))
        self._suffixes = tuple(name[1:] for name in names if name.startswith(b"*."))
        self.exempt = checked_exempt(exempt)

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Refuse a request for a host that is not allowed."""
        if exchange.headers.get(b"host") in self._exact and not exchange.has_repeated_headers:
            return None
        refusal = self._refusal(exchange)
        if refusal is None:
            return None
        hosts = b", ".join(exchange.header_values(b"host")).decode("latin-1")
        reason = f"Host: {hosts[:_LONGEST_NAME]!r} is not one of HOSTS_ALLOWED"
        return Refusal(ProblemError(400, refusal), Reason("host_not_allowed", reason))

    def _refusal(self, exchange: Exchange) -> str | None:
        host = exchange.headers.get(b"host")
        if host is None:
            return "The Host header is missing."
        if exchange.has_repeated_headers and len(exchange.header_values(b"host")) > 1:
            return "The Host header is repeated."
        name = _host_name(host)
        if name is None:
            return "The Host header is invalid."
        if self._any or name in self._exact or name.endswith(self._suffixes):
            return None
        return "The Host header does not name this service."


def _host_name(host: bytes) -> bytes | None:
    """Return the name in a Host header (RFC 9110 section 7.2) in the form that is compared; None if it is invalid."""
    match = _HOST.fullmatch(host)
    if match is None or int(match[2] or 0) > _HIGHEST_PORT:
        return None
    return _normal(match[1])


def _normal(name: bytes) -> bytes | None:
    if name.startswith(b"["):
        try:
            return b"[%b]" % str(IPv6Address(name[1:-1].decode())).encode()
        except ValueError:
            return None
    name = name.lower().removesuffix(b".")
    return name if len(name) <= _LONGEST_NAME else None


def _pattern(text: str) -> bytes:
    if text == "*":
        return b"*"
    name = text.encode()
    normal = _normal(name) if _NAME.fullmatch(name) else None
    if normal is None:
        raise ConfigurationError(
            f"HOSTS_ALLOWED: {text!r} is not a host name; write api.example.com, *.example.com for its subdomains, "
            "[::1] for an IPv6 address, xn--... for other alphabets, or * for any; no scheme, port or path"
        )
    return normal
