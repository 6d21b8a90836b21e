"""Read the client's address and scheme from the headers of trusted proxies.

X-Forwarded-For and X-Forwarded-Proto are read only if the peer is a listed proxy, because any client can send them. The
client is the right-most address that is not a listed proxy: each proxy appends the address of its peer, and a client
can forge the addresses further left (ASVS 5.0, 4.1.3 and 15.3.4).
"""

import re
from collections.abc import Collection
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple, TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import ProxySettings

__all__ = ["ProxyHeadersMiddleware"]

Network = IPv4Network | IPv6Network
_Found = tuple[tuple[str, int] | None, str | None]  # the client and its scheme, if a proxy names them

_HOP = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::([0-9]{1,5}))?|([0-9A-Fa-f:.]+)")
_HIGHEST_PORT = 65_535
_LONGEST = len("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535")
_MAX_HOPS = 32
_LONGEST_CACHED = 128  # bytes of both headers; the cache is bounded in the number and the size of its entries
_SCHEMES = {
    "http": {b"http": "http", b"https": "https"},
    "websocket": {b"http": "ws", b"https": "wss", b"ws": "ws", b"wss": "wss"},
}
_UVICORN_NAMES: Final = {"trusted_hosts": "trusted"}


class ProxyHeadersKeywords(TypedDict, total=False):
    """Fields of `ProxySettings`, and uvicorn's name of the field."""

    trusted: Collection[str]
    trusted_hosts: Collection[str]


class ProxyHeadersMiddleware(Layer):
    """Put the client's address and scheme into the scope, if a trusted proxy sends them.

        app.add_middleware(ProxyHeadersMiddleware, trusted=["10.0.0.0/16"])

    The scope is changed in place: outer layers see the client too, and entries that routing adds are not lost in a
    copy. The port of the client is 0 if the header does not have it.

    Args:
        app: The ASGI app to wrap.
        settings: Values of the keywords that are not given.

    Keyword Args:
        trusted: The proxies: addresses, networks, `unix` for a peer without an address, or `*` for any peer. With `*`
            the right-most entry counts, and any client that can reach the port directly can forge it. Default: none.
        trusted_hosts: uvicorn's name of `trusted`, for a list without `*`: with `*` uvicorn takes the left-most entry.

    Raises:
        ConfigurationError: An entry is neither an address nor a network; `trusted_hosts` has `*`; or a keyword does not
            exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})
    may_answer = False

    def __init__(
        self, app: ASGIApp, settings: ProxySettings | None = None, **keywords: Unpack[ProxyHeadersKeywords]
    ) -> None:
        if "*" in (keywords.get("trusted_hosts") or ()):
            raise ConfigurationError(
                "trusted_hosts: with * uvicorn takes the left-most address, which a client can forge; list the "
                'proxies, or write trusted="*", which takes the right-most'
            )
        accepted = ProxyHeadersKeywords.__optional_keys__
        trusted = with_keywords(self, settings or ProxySettings(), keywords, accepted, _UVICORN_NAMES).trusted
        self.app = app
        self._any = "*" in trusted
        self._unix = "unix" in trusted
        networks = tuple(_network(entry) for entry in trusted if entry not in ("*", "unix"))
        self._hop = partial(_read_hop, networks)
        self._client = lru_cache(maxsize=1024)(self._find_client)

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if a layer further out has put the client in place of the peer already."""
        return None if isinstance(outer, ProxyHeadersMiddleware) else self

    def on_request(self, exchange: Exchange) -> None:
        """Put the client that a trusted proxy names into the scope."""
        scope, header = exchange.scope, exchange.headers.get
        forwarded_for, scheme = header(b"x-forwarded-for", b""), header(b"x-forwarded-proto", b"")
        if exchange.has_repeated_headers:
            forwarded_for = b",".join(exchange.header_values(b"x-forwarded-for"))
        peer = scope.get("client")
        find = self._client if len(forwarded_for) + len(scheme) <= _LONGEST_CACHED else self._find_client
        client, named = find(scope["type"], peer and peer[0], forwarded_for, scheme)
        if client is not None:
            scope["client"] = client
        if named is not None:
            scope["scheme"] = named

    def _find_client(self, kind: str, peer: str | None, forwarded_for: bytes, scheme: bytes) -> _Found:
        """Return the client and the scheme that a trusted peer sends; cached, as a client sends many requests."""
        if not self._trusts(peer):
            return None, None
        # From the right to the first address that is not a proxy's, or to the last one before an invalid entry.
        client = None
        for entry in reversed(forwarded_for.rsplit(b",", _MAX_HOPS)):
            text = entry.strip().decode("latin-1")
            hop = self._hop(text) if len(text) <= _LONGEST else None
            if hop is None:
                break
            client = hop.client
            if not hop.trusted:
                break
        return client, _SCHEMES[kind].get(scheme.rpartition(b",")[2].strip().lower())

    def _trusts(self, peer: str | None) -> bool:
        if self._any or peer is None:
            return self._any or self._unix
        hop = self._hop(peer)
        return hop is not None and hop.trusted


class _Hop(NamedTuple):
    client: tuple[str, int]
    trusted: bool


def _read_hop(trusted: tuple[Network, ...], text: str) -> _Hop | None:
    """Read `1.2.3.4`, `1.2.3.4:567`, `::1`, `[::1]` or `[::1]:567`; None for anything else."""
    match = _HOP.fullmatch(text)
    if match is None or (port := int(match[3] or 0)) > _HIGHEST_PORT:
        return None
    try:
        address = _unmapped(ip_address(match[1] or match[2] or match[4]))
    except ValueError:
        return None
    return _Hop((str(address), port), any(address in network for network in trusted))


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address in `::ffff:1.2.3.4`, which is how a dual-stack socket writes it."""
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def _network(entry: str) -> Network:
    try:
        network = ip_network(entry)
    except ValueError as error:
        raise ConfigurationError(
            f"PROXY_TRUSTED: {entry!r} is neither an address nor a network ({error}); write 10.0.0.7, 10.0.0.0/16, "
            "2001:db8::/32, unix for a socket, or * for any peer"
        ) from None
    if isinstance(network, IPv6Network) and (mapped := network.network_address.ipv4_mapped):
        network = ip_network((mapped, network.prefixlen - 96))
    if network.prefixlen == 0:
        raise ConfigurationError(f"PROXY_TRUSTED: {entry!r} trusts every client as a proxy; list the proxies' networks")
    return network
