"""Counting in a store that all processes and machines share, through `limits`: Redis, Valkey, Memcached, MongoDB.

An operation has a time-out, and a store that fails is left alone for a while: see `outage`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fastapi_prodkit import _context
from fastapi_prodkit._context import Reason
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.rate_limit.limits import Limit, Quota
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.outage import StoreOutage
from fastapi_prodkit.rate_limit.remote import Remote
from fastapi_prodkit.rate_limit.time_limit import TimeLimit
from fastapi_prodkit.sections import RateLimitSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["SharedStore", "store_of"]


def store_of(
    settings: RateLimitSettings, *, prefix: str, registry: "CollectorRegistry | None" = None
) -> "MemoryStore | SharedStore":
    """Return the store that the settings name, with the arguments of `SharedStore`."""
    if settings.shared:
        return SharedStore(settings, prefix=prefix, registry=registry)
    return MemoryStore(settings.strategy)


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
        self._policy = settings.on_storage_error
        self._timeout = settings.storage_timeout
        self._memory = MemoryStore(settings.strategy)
        self._outage = StoreOutage(self._policy, timeout=self._timeout, registry=registry)
        # A client's connections belong to the event loop that opened them, and tests have many.
        self._remotes: WeakKeyDictionary[asyncio.AbstractEventLoop, Remote] = WeakKeyDictionary()
        self._known: dict[str, Limit] = {}  # by id
        self._open()  # what is wrong with the settings is an error here, and not in the first request

    def register(self, limits: Sequence[Limit]) -> None:
        """Take note of limits, before they are counted for the first time.

        Raises:
            ConfigurationError: Other limits have the same ids, so that the store would count both together.
        """
        for limit in limits:
            if self._known.setdefault(limit.id, limit) is not limit:
                raise ConfigurationError(
                    f"a shared store would count two rate limits together, both {limit.id}: give one of them another "
                    "name, RateLimit(..., name=...), or use one object"
                )

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit, and return what is left of each.

        Raises:
            ProblemError: 503, if the store fails and the policy is to deny.
        """
        remote = self._remote()
        try:
            if self._outage.active:
                raise _StoreBusyError
            if len(limits) == 1:
                return [await self._count(remote, limits[0], key, cost)]
            return list(await asyncio.gather(*[self._count(remote, limit, key, cost) for limit in limits]))
        except _StoreBusyError:
            pass
        except Exception as error:  # noqa: BLE001 - each store's client has errors of its own; the policy answers to all
            self._outage.report(error)
        self._outage.ask_until_back(partial(remote.answers, limits, key))
        return self._without(limits, key, cost)

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
        """Forget every request.

        Raises:
            Exception: Whatever the store's client raises.
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

    async def _count(self, remote: Remote, limit: Limit, key: str, cost: int) -> Quota:
        connections = remote.connections
        await (self._wait(connections) if connections.locked() else connections.acquire())
        try:
            if self._outage.active:  # since it began to wait
                raise _StoreBusyError
            with TimeLimit(self._timeout):
                return await remote.count(limit, key, cost)
        finally:
            connections.release()

    async def _wait(self, connections: asyncio.Semaphore) -> None:
        """Wait for a turn, which is not the store's fault: it begins no outage."""
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
            _context.refuse(Reason("rate_limit_unavailable", "the store fails; RATE_LIMIT_ON_STORAGE_ERROR=deny"))
            raise ProblemError(503, "The service cannot count requests at the moment.", headers={"Retry-After": "1"})
        return []


class _StoreBusyError(Exception):
    """The store was not asked, because others that were before were too slow."""
