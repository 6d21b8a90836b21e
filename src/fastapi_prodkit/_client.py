"""Who a client is where its requests are counted."""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

from starlette.types import Scope

__all__ = ["client_key"]


def client_key(scope: Scope) -> str:
    """Return what a client is counted as: its IPv4 address, or the /64 network of its IPv6 address."""
    client = scope.get("client")
    if client is None:
        return "unknown"
    host: str = client[0]
    return _network(host) if ":" in host else host


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((int(address) >> 64 << 64, 64)))
