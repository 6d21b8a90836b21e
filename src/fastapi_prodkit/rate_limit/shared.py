"""Count in a store that all processes and machines share, through `limits`: Redis, Valkey, Memcached, MongoDB.

Each operation has a time-out. A circuit breaker skips a store that fails: see `outage`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit.limits import Limit, Quota, unavailable
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.outage import StoreOutage
from fastapi_prodkit.rate_limit.remote import Remote
from fastapi_prodkit.rate_limit.time_limit import TimeLimit
from fastapi_prodkit.sections import RateLimitSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["SharedStore", "store_of"]

_Result = TypeVar("_Result")


def store_of(
    settings: RateLimitSettings, *, prefix: str, registry: "CollectorRegistry | None" = None
) -> "MemoryStore | SharedStore":
    """Return the store that the settings name; the arguments are those of `SharedStore`."""
    if settings.shared:
        return SharedStore(settings, prefix=prefix, registry=registry)
    return MemoryStore(settings.strategy)


class SharedStore:
    """Count in a store outside of this process.

    It connects at the first request. A fixed window takes one round trip for any number of limits. The other strategies
    take two, because `limits` queries the remaining requests separately.

    Args:
        settings: URL of the store, strategy, and the policy while the store fails. Fixed windows begin at multiples of
            their length since 1970, so they are the same in every process.
        prefix: Prefix of each key, so that several services can use one store.
        registry: Registry of the metrics. Default: prometheus_client's default registry.
        clock: Returns seconds since 1970; all processes must agree.

    Attributes:
        shared: Whether all processes count together: not in `memory://`.

    Raises:
        ConfigurationError: The URL cannot be used, or the store lacks the strategy. The message omits the URL.
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
        self.shared = settings.shared
        self._settings = settings
        self._prefix = prefix
        self._clock = clock
        self._policy = settings.on_storage_error
        self._timeout = settings.storage_timeout
        self._memory = MemoryStore(settings.strategy)
        self._outage = StoreOutage(self._policy, timeout=self._timeout, registry=registry)
        # A client's connections belong to the event loop that opened them; tests use several loops.
        self._remotes: WeakKeyDictionary[asyncio.AbstractEventLoop, Remote] = WeakKeyDictionary()
        self._known: dict[str, Limit] = {}  # by id
        self._open()  # so that wrong settings fail here, not in the first request

    def register(self, limits: Sequence[Limit]) -> None:
        """Register limits before they are counted for the first time.

        Raises:
            ConfigurationError: Another limit has an equal id, so the store would count both together.
        """
        for limit in limits:
            if self._known.setdefault(limit.id, limit) is not limit:
                raise ConfigurationError(
                    f"a shared store would count two rate limits together, both {limit.id}: give one of them another "
                    "name, RateLimit(..., name=...), or use one object"
                )

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit, and return the quota of each limit.

        Raises:
            ProblemError: 503: the store failed, and the policy is `deny`.
        """
        remote = self._remote()
        try:
            if self._outage.active:
                raise _StoreBusyError
            counts = [self._ask(remote, partial(remote.count, limit, key, cost)) for limit in limits]
            return [await counts[0]] if len(counts) == 1 else list(await asyncio.gather(*counts))
        except _StoreBusyError:
            pass
        except Exception as error:  # noqa: BLE001 - each client has its own exceptions; the policy applies to all
            self._outage.report(error)
        self._outage.probe_until_back(partial(remote.probe, limits, key))
        return self._without(limits, key, cost)

    async def add_once(self, key: str, seconds: int) -> bool:
        """Remember a key for so many seconds; return False if it is remembered already.

        Raises:
            ProblemError: 503: the store failed. The policy does not apply, because other processes know other keys.
        """
        remote = self._remote()
        try:
            if self._outage.active:
                raise _StoreBusyError
            return await self._ask(remote, partial(remote.add_once, key, seconds))
        except _StoreBusyError:
            pass
        except Exception as error:  # noqa: BLE001 - each client has its own exceptions
            self._outage.report(error)
        self._outage.probe_until_back(partial(remote.probe, (), key))
        raise unavailable("the store fails, and it remembers what may be used once")

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Close the store's connections at shutdown."""
        try:
            yield
        finally:
            self._outage.close()
            remote = self._remotes.pop(asyncio.get_running_loop(), None)
            if remote is not None:
                await remote.aclose()

    async def clear(self) -> None:
        """Reset all counters.

        Raises:
            Exception: Any exception of the store's client.
        """
        self._memory.clear()
        await self._remote().storage.reset()

    def _open(self) -> Remote:
        url = self._settings.storage_url.get_secret_value()
        return Remote(url, self._settings.strategy, prefix=self._prefix, clock=self._clock)

    def _remote(self) -> Remote:
        loop = asyncio.get_running_loop()
        remote = self._remotes.get(loop)
        if remote is None:
            remote = self._remotes[loop] = self._open()
        return remote

    async def _ask(self, remote: Remote, operation: Callable[[], Awaitable[_Result]]) -> _Result:
        connections = remote.connections
        await (self._wait(connections) if connections.locked() else connections.acquire())
        try:
            if self._outage.active:  # may have begun during the wait
                raise _StoreBusyError
            with TimeLimit(self._timeout):
                return await operation()
        finally:
            connections.release()

    async def _wait(self, connections: asyncio.Semaphore) -> None:
        """Wait for a free connection; a time-out here does not open the circuit breaker."""
        try:
            with TimeLimit(self._timeout):
                await connections.acquire()
        except TimeoutError:
            raise _StoreBusyError from None

    def _without(self, limits: Sequence[Limit], key: str, cost: int) -> list[Quota]:
        self._outage.count_fallback()
        if self._policy == "memory":
            return self._memory.count(limits, key, cost)
        if self._policy == "deny":
            raise unavailable("the store fails; RATE_LIMIT_ON_STORAGE_ERROR=deny")
        return []


class _StoreBusyError(Exception):
    """Skipped the store: the circuit breaker is open, or no connection became free within the time-out."""
