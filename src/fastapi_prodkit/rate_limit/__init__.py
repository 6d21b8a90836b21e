"""Limit how often one client may call the service.

`RateLimitMiddleware` counts every request against a default; `Depends(RateLimit("5/minute"))` counts the requests of
a route or router against a separate limit. They count in a `MemoryStore`, in this process, or in a `SharedStore`, which
all processes and machines share. `Limiter` replaces `slowapi.Limiter` and uses the same stores.
"""

from typing import TYPE_CHECKING

from fastapi_prodkit.rate_limit.dependency import RateLimit
from fastapi_prodkit.rate_limit.keys import Key, by_address, by_header, by_user
from fastapi_prodkit.rate_limit.limits import Limit, Quota, Store
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.middleware import RateLimitMiddleware
from fastapi_prodkit.rate_limit.shared import SharedStore

if TYPE_CHECKING:
    from fastapi_prodkit.rate_limit.slowapi import Limiter

__all__ = [
    "Key",
    "Limit",
    "Limiter",
    "MemoryStore",
    "Quota",
    "RateLimit",
    "RateLimitMiddleware",
    "SharedStore",
    "Store",
    "by_address",
    "by_header",
    "by_user",
]


def __getattr__(name: str) -> "type[Limiter]":
    """Import `Limiter` on first use, because it imports slowapi (PEP 562)."""
    if name != "Limiter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastapi_prodkit.rate_limit.slowapi import Limiter  # noqa: PLC0415 - on first use

    return Limiter
