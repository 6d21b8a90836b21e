"""The default limit on every request, including those that no route serves."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypedDict, Unpack

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._counting import client_key
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._problem import Refusal, send_problem
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.rate_limit.endpoints import ExemptEndpoints, is_exempt
from fastapi_prodkit.rate_limit.limits import (
    Store,
    add_first_quota_header,
    add_quota_headers,
    parse_limits,
    refusal,
    refused,
    text_of,
)
from fastapi_prodkit.rate_limit.memory import MemoryStore, Strategy
from fastapi_prodkit.sections import RateLimitSettings

__all__ = ["RateLimitMiddleware"]


class RateLimitKeywords(TypedDict, total=False):
    """Fields of `RateLimitSettings` that do not configure the store."""

    default: str
    strategy: Strategy
    legacy_headers: bool


class RateLimitMiddleware(Layer):
    """Count every request of a client against the default limit; refuse requests over the limit with a 429 problem.

        app.add_middleware(RateLimitMiddleware, default="100/minute", exempt={"/health"})

    The body of a refused request is never read. WebSocket handshakes count and are refused like requests.
    Inside another RateLimitMiddleware, this one is an additional limit, unless both have the same limit and store.

    Args:
        app: The app to serve.
        settings: Section whose fields apply where a keyword is not given.
        exempt: Paths relative to the app, without trailing slash, that are not counted.
        store: Where to count. Default: a new `MemoryStore`.
        uncounted: Function of the scope that returns True for a request not to count; see `endpoints.ExemptEndpoints`.

    Keyword Args:
        default: Limit on every request of one client. Default: 100/minute.
        strategy: How the window of the limit is counted if no store is given: `fixed-window`, `moving-window` or
            `sliding-window`. Default: fixed-window.
        legacy_headers: Send X-RateLimit-* as well. Default: False.

    Raises:
        ConfigurationError: The limit cannot be read or is None; the settings name a shared store, and no store is
            given; or a keyword does not exist, or its value cannot be used.
    """

    scope_types = frozenset({"http", "websocket"})

    def __init__(
        self,
        app: ASGIApp,
        settings: RateLimitSettings | None = None,
        *,
        exempt: Collection[str] = frozenset(),
        store: Store | None = None,
        uncounted: Callable[[Scope], bool] | None = None,
        **keywords: Unpack[RateLimitKeywords],
    ) -> None:
        settings = with_keywords(self, settings or RateLimitSettings(), keywords, RateLimitKeywords.__optional_keys__)
        if settings.shared and store is None:
            raise ConfigurationError(
                "RATE_LIMIT_STORAGE_URL: a shared store has connections to be closed; give the middleware "
                "store=SharedStore(settings), and the app the lifespan of the store"
            )
        if settings.default is None:
            raise ConfigurationError("RATE_LIMIT_DEFAULT is none: set a limit, or leave the middleware out")
        self.app = app
        self.exempt = checked_exempt(exempt)
        self._uncounted = uncounted
        self._store = store or MemoryStore(settings.strategy)
        self._limits = parse_limits(settings.default, name="default")
        self._counts = self._store, [limit.id for limit in self._limits]  # to compare with another middleware
        self._legacy = settings.legacy_headers
        # Fast path for the common case, one limit in memory: its counters are looked up here, not in each request.
        self._hit = None
        if isinstance(self._store, MemoryStore) and len(self._limits) == 1 and not self._legacy:
            self._hit, self._clock = self._store.window(self._limits[0]).hit, self._store.clock

    def __str__(self) -> str:
        """Return the default limits, such as `2/second; 100/hour`."""
        return text_of(self._limits)

    def counts(self, endpoint: Any) -> bool:
        """Return whether requests for an endpoint are counted; True if `uncounted` can only tell for a request."""
        return not (isinstance(self._uncounted, ExemptEndpoints) and is_exempt(endpoint))

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if the outer layer counts the same limits in the same store: the request must not count twice."""
        same = isinstance(outer, RateLimitMiddleware) and outer._counts == self._counts  # noqa: SLF001 - of this class
        return None if same else self

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Count the request; return the problem as the answer if it is over a limit."""
        scope = exchange.scope
        if self._uncounted is not None and self._uncounted(scope):
            return None
        if self._hit is None:
            return partial(self._count_in_store, exchange)
        remaining, reset = self._hit(client_key(scope), 1, self._clock())
        if remaining >= 0:
            add_first_quota_header(exchange, self._limits[0], remaining, reset)
            return None
        quotas = [(self._limits[0], remaining, reset)]
        add_quota_headers(scope, quotas)
        return Refusal(refusal(quotas))

    async def _count_in_store(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            quotas = await self._store.hit(self._limits, client_key(scope))
            add_quota_headers(scope, quotas, legacy=self._legacy)
            if refused(quotas):
                raise refusal(quotas)
        except ProblemError as problem:
            await send_problem(scope, receive, send, problem)
            return
        await exchange.call_inner(receive, send)
