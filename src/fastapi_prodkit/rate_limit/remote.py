"""The connections of one event loop to a shared store, through `limits`."""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, unquote, urlsplit

from fastapi_prodkit import _extras
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError
from fastapi_prodkit.rate_limit.limits import Limit, Quota
from fastapi_prodkit.rate_limit.memory import Strategy
from fastapi_prodkit.rate_limit.time_limit import TimeLimit

if TYPE_CHECKING:
    from limits.aio.storage import Storage

__all__ = ["Remote", "reason_about_key"]

# Concurrent operations of one worker, each on a connection of its own. With a round trip of half a millisecond, 16
# connections allow 30 000 operations a second, more than one Python process can use.
_OPERATIONS: Final = 16
_CLUSTER_TLS: Final = re.compile(r"^(redis|valkey)s(?=\+cluster:)")  # `limits` has no scheme for a cluster with TLS
_SCHEME: Final = re.compile(r"(?:(?:redis|valkey)(?:s|\+unix|s?\+cluster|\+sentinel)?|memcached|mongodb(?:\+srv)?)://")
# The part after the scheme: [user:password@]host[:port][,...], or the path of a socket. Checked here because
# `limits` and its clients use a default in place of a missing host, and silently ignore a malformed one.
_PLACE: Final = re.compile(r"(?:[^\s/?#]*@)?([^\s@/?#]*)(/\S*|\?\S*|)")
_NUMBER: Final = re.compile(r"/?\d*(?:\?.*)?")  # of a database; Redis and Valkey have no database names
_HOST: Final = re.compile(r"(?:[^:\[\]]+|\[[0-9A-Fa-f:.]+\])(?::0*([1-9]\d{0,4}))?")
_LAST_PORT: Final = 65_535
_PROBE: Final = Limit("probe", 1_000, 1, owner="outage")
# Error messages of Redis, Valkey and Memcached for a key whose value is not a counter.
_ABOUT_KEY: Final = re.compile(
    "WRONGTYPE|not an integer|not a valid float|would overflow|non-numeric|attempt to compare"
)
_SUPPORT: Final = {"moving-window": "acquire_entry", "sliding-window": "acquire_sliding_window_entry"}


class Remote:
    """Count in a store, over connections of one event loop; nothing connects before the first request.

    Args:
        url: URL of the store.
        strategy: How windows are counted.
        prefix: Prefix of each key.
        clock: Returns seconds since 1970; all processes must agree.

    Attributes:
        storage: The storage object of `limits`.
        connections: Semaphore to hold during an operation; limits the number of connections.

    Raises:
        ConfigurationError: The URL cannot be used, or the store lacks the strategy. The message omits the URL.
        MissingExtraError: The client of the store is not installed.
    """

    def __init__(self, url: str, strategy: Strategy, *, prefix: str, clock: Callable[[], float]) -> None:
        self.storage = _open(url)
        self.connections = asyncio.Semaphore(_OPERATIONS)
        self.count = self._fixed
        self._prefix = quote(prefix)  # some stores accept no spaces in a key
        self._clock = clock
        if strategy != "fixed-window":
            self._limiter = _limiter(self.storage, strategy)
            self.count = self._rolling

    async def aclose(self) -> None:
        """Close the connections."""
        bridge: Any = getattr(self.storage, "bridge", None)
        sentinels = getattr(getattr(bridge, "sentinel", None), "sentinels", ())
        names = ("storage", "storage_replica")
        for client in (*(getattr(bridge, name, None) for name in names), *sentinels):
            if hasattr(client, "aclose"):
                # If the store does not respond, there is nothing left to close.
                with suppress(Exception), TimeLimit(1):
                    await client.aclose()

    async def probe(self, limits: Sequence[Limit], key: str) -> None:
        """Count in the store, without cost for the limits: a store that answers PING may still refuse to write.

        Raises:
            Exception: Any exception of the store's client.
        """
        await self.count(_PROBE, key, 1)
        for limit in limits:  # in a cluster, their keys may be on another server
            await self.count(limit, key, 0)

    async def add_once(self, key: str, seconds: int) -> bool:
        """Remember a key for so many seconds; return False if it is remembered already.

        Raises:
            Exception: Any exception of the store's client.
        """
        # The key expires a time after it was added: a window that begins at a fixed time could end a moment later.
        return await self.storage.incr(f"{self._prefix}/once/{key}", seconds) == 1

    async def _fixed(self, limit: Limit, key: str, cost: int) -> Quota:
        # The number of the window is part of the key, so the reset time is known without a second command.
        number, elapsed = divmod(self._clock(), limit.seconds)
        if cost > limit.amount:  # always over the limit; some stores reject the number
            return limit, -1, limit.seconds - int(elapsed)
        used = await self.storage.incr(f"{self._prefix}/{limit.id}/{key}/{int(number)}", limit.seconds, amount=cost)
        return limit, limit.amount - used, limit.seconds - int(elapsed)

    async def _rolling(self, limit: Limit, key: str, cost: int) -> Quota:
        from limits import RateLimitItemPerSecond  # noqa: PLC0415 - loaded by now

        item = RateLimitItemPerSecond(limit.amount, limit.seconds, namespace=self._prefix)
        admitted = await self._limiter.hit(item, limit.id, key, cost=cost)
        reset, remaining = await self._limiter.get_window_stats(item, limit.id, key)
        return limit, remaining if admitted else -1, max(1, int(reset - self._clock()) + 1)


def reason_about_key(error: Exception) -> str | None:
    """Return the reason if the error is about the value of one key; None if the store itself failed.

    The store counts as failed if it is full, read-only, loading, denies access or does not serve the key's slot.
    """
    if isinstance(error, ValueError | TypeError | OverflowError) and not isinstance(error, OSError):
        return type(error).__name__  # the client could not read the value of the key
    found = _ABOUT_KEY.search(str(error))
    return found and found[0]


def _limiter(storage: Any, strategy: Strategy) -> Any:
    from limits.aio import strategies  # noqa: PLC0415 - on first use

    if not hasattr(storage, _SUPPORT[strategy]):
        raise ConfigurationError(
            f"RATE_LIMIT_STRATEGY={strategy} is not possible in a {type(storage).__name__}: use fixed-window"
        )
    moving = strategy == "moving-window"
    return (strategies.MovingWindowRateLimiter if moving else strategies.SlidingWindowCounterRateLimiter)(storage)


def _open(url: str) -> "Storage":
    from limits.errors import ConfigurationError as LimitsError  # noqa: PLC0415 - on first use
    from limits.storage import storage_from_string  # noqa: PLC0415

    if not _is_complete(url):
        raise _unusable(url)
    scheme = url.partition(":")[0]
    if scheme.startswith("redis"):
        _extras.require("redis", extra="redis")
    try:
        spelt = _CLUSTER_TLS.sub(r"\1", url)
        return cast("Storage", storage_from_string(f"async+{spelt}", **_options(url)))
    except LimitsError as error:
        if "prerequisite" in str(error):  # `limits` knows the scheme; its client is missing
            store = scheme.partition("+")[0].removesuffix("s")  # the "s" means TLS
            raise MissingExtraError(
                f"the store of RATE_LIMIT_STORAGE_URL={scheme}://... needs pip install 'limits[async-{store}]'"
            ) from None
        raise _unusable(url) from None
    except Exception:  # noqa: BLE001 - not chained: such messages may quote the URL with its password
        raise _unusable(url) from None


def _is_complete(url: str) -> bool:
    """Return whether the URL has a scheme and, if we know the scheme, hosts with valid ports or a socket."""
    scheme = _SCHEME.match(url)
    if scheme is None:  # may be registered with `limits`, which accepts lower case only
        return url == "memory://" or ("://" in url and not _SCHEME.match(url.lower()) and not url.startswith("memory"))
    place = _PLACE.fullmatch(url, scheme.end())
    if place is None:
        return False
    hosts, path = place.groups()
    named = len(path) > 1 and path[0] == "/"
    if not hosts and scheme[0] in {"redis+unix://", "valkey+unix://", "memcached://"}:
        return named
    if "+sentinel" in scheme[0] and not named:
        return False
    if scheme[0] in {"redis://", "rediss://", "valkey://", "valkeys://"} and not _NUMBER.fullmatch(path):
        return False
    found = [_HOST.fullmatch(host) for host in hosts.split(",")]
    return all(host is not None and int(host[1] or 1) <= _LAST_PORT for host in found)


def _options(url: str) -> dict[str, Any]:
    """Return the options that `limits` does not read from the URL."""
    parts = urlsplit(url)
    # Use redis-py, which the extra installs; the default of `limits` is coredis.
    options: dict[str, Any] = {"implementation": "redispy"} if parts.scheme.startswith("redis") else {}
    if parts.scheme.endswith(("+cluster", "+sentinel")):
        named = {"username": parts.username, "password": parts.password}
        options |= {name: unquote(value) for name, value in named.items() if value}
    if _CLUSTER_TLS.match(url):
        options["ssl"] = True
    return options


def _unusable(url: str) -> ConfigurationError:
    known = _SCHEME.match(url)  # an unknown text before "://" may be the password: do not repeat it
    named = f" ({known[0]}...)" if known else ""
    return ConfigurationError(
        f"RATE_LIMIT_STORAGE_URL cannot be used{named}: write redis://:password@host:6379/0, rediss:// for "
        "TLS, redis+cluster://, redis+sentinel://host:26379/name, valkey:// or memory://"
    )
