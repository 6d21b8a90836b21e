"""Identify the client of a request, and clear all counts of requests in this process.

Tests start with empty counts; see `fastapi_prodkit.testing`.
"""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final, Protocol
from weakref import WeakSet

from starlette.types import Scope

__all__ = ["clear_counts", "client_key", "register"]


def client_key(scope: Scope) -> str:
    """Return the key by which a client is counted: its IPv4 address, or the /64 network of its IPv6 address."""
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


class Counts(Protocol):
    """An object that counts requests by client."""

    def clear(self) -> None:
        """Forget every request."""
        ...


_every: Final[WeakSet[Counts]] = WeakSet()  # one set for the process, because limits of routes belong to no app


def register(counts: Counts) -> None:
    """Let `clear_counts` clear these counts too. Only a weak reference is kept."""
    _every.add(counts)


def clear_counts() -> None:
    """Forget every request that was counted in this process."""
    for counts in list(_every):
        counts.clear()
