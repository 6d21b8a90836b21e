"""Counting in a store that all processes and machines share, through `limits`: Redis, Valkey, Memcached, MongoDB.

An operation has a time-out, and a store that fails is left alone for a while: see `outage`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from fastapi_prodkit import _extras
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError, ProblemError
from fastapi_prodkit.rate_limit.limits import Limit, Quota
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.outage import Outage
from fastapi_prodkit.sections import RateLimitSettings

if TYPE_CHECKING:
    from limits.aio.storage import Storage
    from prometheus_client import CollectorRegistry

__all__ = ["SharedStore"]

_SUPPORT = {"moving-window": "acquire_entry", "sliding-window": "acquire_sliding_window_entry"}


class SharedStore:
    """Count in a store outside of this process.

    Nothing connects before the first request. A fixed window costs one round trip, whatever the number of limits;
    the other strategies cost two, because `limits` asks for what is left separately.

    Args:
        settings: Where the store is, how it counts, and what is done while it fails. The windows are those of the
            clock, the same for every process.
        prefix: Begins each key, so that services can share a store.
        registry: Where the metrics are shown; prometheus_client's default registry unless given.
        clock: Seconds since 1970, as the other processes have them.

    Raises:
        ConfigurationError: The URL cannot be used, or the store cannot do the strategy. It does not repeat the URL.
        MissingExtraError: The client of the store is not installed.
    """

    def __init__(
        self,
        settings: RateLimitSettings,
        *,
        prefix: str = "fastapi-prodkit",
        registry: "CollectorRegistry | None" = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._prefix = prefix
        self._clock = clock
        self._memory = MemoryStore(settings.strategy)
        self._outage = Outage(settings.on_storage_error, timeout=settings.storage_timeout, registry=registry)
        # A client's connections belong to the event loop that opened them, and tests have many.
        self._storages: WeakKeyDictionary[asyncio.AbstractEventLoop, Storage] = WeakKeyDictionary()
        self._verify(_open(settings.storage_url.get_secret_value()))

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit, and return what is left of each.

        Raises:
            ProblemError: 503, if the store fails and the policy is to deny.
        """
        storage = self._storage()
        if self._outage.is_on(storage):
            return self._without(limits, key, cost)
        try:
            async with asyncio.timeout(self._settings.storage_timeout):
                return await self._count(storage, limits, key, cost)
        except Exception as error:  # noqa: BLE001 - each store's client has errors of its own; the policy answers to all
            self._outage.begin(error)
        return self._without(limits, key, cost)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Close the store's connections at shutdown."""
        try:
            yield
        finally:
            self._outage.stop()
            storage = self._storages.pop(asyncio.get_running_loop(), None)
            client: Any = getattr(getattr(storage, "bridge", None), "storage", None)
            if hasattr(client, "aclose"):
                with suppress(Exception):  # a store that is gone has nothing left to close
                    async with asyncio.timeout(1):
                        await client.aclose()

    async def clear(self) -> None:
        """Forget every request.

        Raises:
            Exception: Whatever the store's client raises.
        """
        self._memory.clear()
        await self._storage().reset()

    def _storage(self) -> "Storage":
        loop = asyncio.get_running_loop()
        storage = self._storages.get(loop)
        if storage is None:
            storage = self._storages[loop] = _open(self._settings.storage_url.get_secret_value())
        return storage

    async def _count(self, storage: Any, limits: Sequence[Limit], key: str, cost: int) -> list[Quota]:
        count = self._fixed if self._settings.strategy == "fixed-window" else self._limiter(storage)
        if len(limits) == 1:
            return [await count(storage, limits[0], key, cost)]
        return list(await asyncio.gather(*[count(storage, limit, key, cost) for limit in limits]))

    async def _fixed(self, storage: Any, limit: Limit, key: str, cost: int) -> Quota:
        # The window's number is part of the key: so its end is known, and need not be asked for.
        number, elapsed = divmod(self._clock(), limit.seconds)
        used = await storage.incr(f"{self._prefix}/{limit.id}/{key}/{int(number)}", limit.seconds, amount=cost)
        return limit, limit.amount - used, limit.seconds - int(elapsed)

    def _limiter(self, storage: Any) -> Callable[[Any, Limit, str, int], Awaitable[Quota]]:
        from limits import RateLimitItemPerSecond  # noqa: PLC0415 - on first use
        from limits.aio import strategies  # noqa: PLC0415

        moving = self._settings.strategy == "moving-window"
        limiter = (strategies.MovingWindowRateLimiter if moving else strategies.SlidingWindowCounterRateLimiter)(
            storage
        )

        async def count(_: Any, limit: Limit, key: str, cost: int) -> Quota:
            item = RateLimitItemPerSecond(limit.amount, limit.seconds, namespace=self._prefix)
            admitted = await limiter.hit(item, limit.id, key, cost=cost)
            reset, remaining = await limiter.get_window_stats(item, limit.id, key)
            return limit, remaining if admitted else -1, max(1, int(reset - self._clock()) + 1)

        return count

    def _without(self, limits: Sequence[Limit], key: str, cost: int) -> list[Quota]:
        self._outage.decided()
        if self._settings.on_storage_error == "memory":
            return self._memory.count(limits, key, cost)
        if self._settings.on_storage_error == "deny":
            raise ProblemError(503, "The service cannot count requests at the moment.", headers={"Retry-After": "1"})
        return []

    def _verify(self, storage: "Storage") -> None:
        strategy = self._settings.strategy
        if strategy in _SUPPORT and not hasattr(storage, _SUPPORT[strategy]):
            raise ConfigurationError(
                f"RATE_LIMIT_STRATEGY={strategy} is not possible in a {type(storage).__name__}: use fixed-window"
            )


def _open(url: str) -> "Storage":
    from limits.errors import ConfigurationError as LimitsError  # noqa: PLC0415 - on first use
    from limits.storage import storage_from_string  # noqa: PLC0415

    scheme = url.partition(":")[0]
    # redis-py for Redis, which the extra brings; `limits` would choose coredis.
    options: dict[str, Any] = {"implementation": "redispy"} if scheme.startswith("redis") else {}
    if options:
        _extras.require("redis", extra="redis")
    try:
        return cast("Storage", storage_from_string(f"async+{url}", **options))
    except LimitsError as error:
        if "prerequisite" in str(error):
            package = f"pip install 'limits[async-{scheme.partition('+')[0]}]'"
            raise MissingExtraError(f"the store of RATE_LIMIT_STORAGE_URL={scheme}://... needs {package}") from None
        raise _unusable(scheme) from None
    except Exception:  # noqa: BLE001 - not chained: what is wrong with a URL is told with the URL, and its password
        raise _unusable(scheme) from None


def _unusable(scheme: str) -> ConfigurationError:
    return ConfigurationError(
        f"RATE_LIMIT_STORAGE_URL cannot be used ({scheme}://...): write redis://:password@host:6379/0, rediss:// for "
        "TLS, redis+cluster://, redis+sentinel://host:26379/name, valkey:// or memory://"
    )
