"""Rate limits: how often one client may call.

`RateLimitMiddleware` counts every request against a default; `Depends(RateLimit("5/minute"))` counts the requests of
a route or router against a limit of its own. They count in a `MemoryStore`, in this process, or in a `SharedStore`,
which all processes and machines have in common.
"""

from fastapi_prodkit.rate_limit.dependency import RateLimit
from fastapi_prodkit.rate_limit.keys import by_address, by_header
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.middleware import RateLimitMiddleware
from fastapi_prodkit.rate_limit.shared import SharedStore

__all__ = ["MemoryStore", "RateLimit", "RateLimitMiddleware", "SharedStore", "by_address", "by_header"]
