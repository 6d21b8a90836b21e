"""Rate limits: how often one client may call.

`RateLimitMiddleware` counts every request against a default; `Depends(RateLimit("5/minute"))` counts the requests of
a route or router against a limit of its own. Both count in memory, in this process: with several workers each has its
own counters.

A limit is a fixed window: it opens with the first request after the last one closed, and whoever calls shares its
end. Counting is bounded: a limit remembers at most 100 000 clients (about 12 MB for IPv4 addresses). Beyond that it
forgets those that have not called for longest.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10, sent with every response of a limited request.
"""

import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from fastapi_prodkit._exchange import Exchange, Piece
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.sections import RateLimitSettings

__all__ = ["MemoryStore", "RateLimit", "RateLimitMiddleware"]

MAX_CLIENTS = 100_000
_COUNTED = "fastapi_prodkit.counted"  # scope key: the quotas of this request so far, and where their headers are
_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


class Limit:
    """So many requests in so many seconds. Two limits never share counters, however equal they look."""

    __slots__ = ("amount", "name", "policy", "seconds")

    def __init__(self, name: str, amount: int, seconds: int) -> None:
        self.name = name
        self.amount = amount
        self.seconds = seconds
        self.policy = f'"{name}";q={amount};w={seconds}'  # as an item of the RateLimit-Policy header


# What a limit has left for a client after a request: requests, and seconds until the window ends. -1 requests mean
# that this one was refused. A plain tuple, because one is made for each request.
Quota = tuple[Limit, int, int]


class MemoryStore:
    """Count in this process.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[Limit, _Window] = {}

    def count(self, limits: Sequence[Limit], client: str) -> tuple[list[Quota], bool]:
        """Count a request against each limit that it is not over; return what is left, and whether it is refused."""
        now = self._clock()
        quotas = []
        refused = False
        for limit in limits:
            window = self._windows.get(limit)
            if window is None or now - window.start >= limit.seconds:
                window = self._windows[limit] = _Window(now)
            used = window.used.get(client)
            if used is None:
                used = window.recall(client)
            remaining = limit.amount - used - 1
            if remaining < 0:
                refused = True
            else:
                window.used[client] = used + 1
            quotas.append((limit, remaining, limit.seconds - int(now - window.start)))
        return quotas, refused


class _Window:
    """The counters of one limit, in two generations: the older one is forgotten as a whole when the newer is full.

    A client that keeps calling moves to the newer one, so no sweeper is needed and no list of who called when.
    """

    def __init__(self, start: float) -> None:
        self.start = start
        self.used: dict[str, int] = {}
        self._previous: dict[str, int] = {}

    def recall(self, client: str) -> int:
        """Make room in the newer generation for a client that is not in it, and return its count in the older."""
        count = self._previous.get(client, 0)
        if len(self.used) >= MAX_CLIENTS // 2:
            self._previous, self.used = self.used, {}
        self.used[client] = count
        return count


class RateLimitMiddleware(Piece):
    """Count every request of a client against the default limit; refuse what is over it with a 429 problem.

    The body of a refused request is never read. WebSocket handshakes are not counted.

    Args:
        app: The app to serve.
        settings: The default limit.
        exempt: Paths relative to the app, without trailing slash, that are not counted.
        store: Where to count; in a store of its own unless given.

    Raises:
        ConfigurationError: The limit cannot be read.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: RateLimitSettings | None = None,
        *,
        exempt: Container[str] = frozenset(),
        store: MemoryStore | None = None,
    ) -> None:
        settings = settings or RateLimitSettings()
        self.app = app
        self._exempt = exempt
        self._store = store or MemoryStore()
        self._limits = parse_limits(settings.default, name="default")
        self._policy = _policy(self._limits)

    def enter(self, exchange: Exchange) -> ASGIApp | None:
        """Count the request, or refuse it."""
        if exchange.path in self._exempt and exchange.is_exempt(self._exempt):
            return None
        scope = exchange.scope
        quotas, refused = self._store.count(self._limits, client_key(scope))
        if _COUNTED in scope:
            _add(scope[_COUNTED], quotas)
        else:
            headers = exchange.response_headers
            headers[b"ratelimit-policy"] = self._policy
            headers[b"ratelimit"] = _remaining(quotas)
            scope[_COUNTED] = quotas, headers
        return Refusal(refusal(quotas)) if refused else None


class RateLimit:
    """Count the requests of a route or router against a limit of its own: `Depends(RateLimit("5/minute"))`.

    Routes that depend on the same object share its quota; a request counts once, however many of its dependencies
    do. The default limit counts as well.

    Args:
        limit: Such as `"5/minute"`, or `"2/second; 100/hour"` for several at once.
        name: What the headers and the 429 problem call it.

    Raises:
        ConfigurationError: The limit cannot be read, or the name cannot stand in a header.
    """

    def __init__(self, limit: str, *, name: str = "route") -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
            raise ConfigurationError(f"the name {name!r} cannot stand in a header: use letters, digits and any of _.:-")
        self._limits = parse_limits(limit, name=name)
        self._store = MemoryStore()

    async def __call__(self, connection: HTTPConnection, response: Response) -> None:
        """Count the request, or raise the 429 problem."""
        scope = connection.scope
        store: MemoryStore = _installed_store(scope) or self._store
        quotas, refused = store.count(self._limits, client_key(scope))
        exchange = Exchange.of(scope)
        counted = scope.setdefault(_COUNTED, ([], {} if exchange is None else exchange.response_headers))
        _add(counted, quotas)
        own = {}
        if exchange is None:  # nobody sends what is in the headers of an exchange, on every kind of response
            own = {name.decode(): value.decode() for name, value in counted[1].items()}
            response.headers.update(own)
        if refused:
            problem = refusal(quotas)
            problem.headers = {**own, **(problem.headers or {})}
            raise problem


def parse_limits(text: str, *, name: str) -> list[Limit]:
    """Read `"10/second; 1000/hour"`; the second and later ones are called `<name>-2` and so on.

    Raises:
        ConfigurationError: The text is not in the notation of the `limits` package.
    """
    from limits import parse_many  # noqa: PLC0415 - on first use: it costs more to import than all of this package

    try:
        items = parse_many(text)
    except ValueError:
        raise ConfigurationError(
            f"rate limit {text!r} cannot be read: write it as '100/minute', '5 per 10 seconds' or '2/second; 100/hour'"
        ) from None
    names = [name, *(f"{name}-{number}" for number in range(2, len(items) + 1))]
    return [Limit(each, item.amount, item.get_expiry()) for each, item in zip(names, items, strict=True)]


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


def refusal(quotas: list[Quota]) -> ProblemError:
    """Return the 429 problem that names the limits which were exceeded."""
    violated = [quota for quota in quotas if quota[1] < 0]
    names: dict[str, Any] = {"violated-policies": [limit.name for limit, _, _ in violated]}
    wait = {"Retry-After": str(max(reset for _, _, reset in violated))}
    return ProblemError(429, "Too many requests; try again later.", type=_QUOTA_EXCEEDED, headers=wait, **names)


def _add(counted: tuple[list[Quota], dict[bytes, bytes]], quotas: list[Quota]) -> None:
    """Write the headers anew, with further quotas: several limits are several items of one header."""
    every, headers = counted
    every += quotas
    headers[b"ratelimit-policy"] = _policy([limit for limit, _, _ in every])
    headers[b"ratelimit"] = _remaining(every)


def _policy(limits: list[Limit]) -> bytes:
    return ", ".join([limit.policy for limit in limits]).encode()


def _remaining(quotas: list[Quota]) -> bytes:
    text = ""
    for limit, remaining, reset in quotas:
        text += f', "{limit.name}";r={max(0, remaining)};t={reset}'
    return text[2:].encode()


def _installed_store(scope: Scope) -> MemoryStore | None:
    """Find the app's store: in the edge's pieces, or in `app.state`."""
    pieces: Mapping[str, Any] | None = scope.get("fastapi_prodkit")
    if pieces is not None:
        return pieces.get("rate_limit")
    store = getattr(scope["app"].state, "rate_limit", None)
    return store if isinstance(store, MemoryStore) else None
