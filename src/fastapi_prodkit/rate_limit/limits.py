"""Parse rate limits, and describe them to clients in headers and 429 problems.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10. Every response to a counted request has them.
"""

import operator
import time
from collections.abc import Collection, Sequence
from itertools import chain, count
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from starlette.types import Scope

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError

__all__ = [
    "Limit",
    "Quota",
    "Store",
    "add_quota_headers",
    "checked_cost",
    "cost_of",
    "parse_limits",
    "refusal",
    "text_of",
    "unavailable",
]

_Cost = TypeVar("_Cost")
_UNITS = {1: "second", 60: "minute", 3600: "hour", 86_400: "day"}
_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


class Limit:
    """A number of requests that a client may send in a number of seconds.

    Attributes:
        name: Name of the limit in headers and problems.
        amount: Number of requests allowed.
        seconds: Length of the window.
        policy: The limit as an item of the RateLimit-Policy header.
        header: `policy` as bytes.
        quota: Template of the item of the RateLimit header, with %d for requests left and for seconds until reset.
        id: Key of the limit in a shared store, equal in every process. A memory store counts by object instead.
    """

    __slots__ = ("amount", "header", "id", "name", "policy", "quota", "seconds")

    def __init__(self, name: str, amount: int, seconds: int, *, owner: str = "default") -> None:
        self.name = name
        self.amount = amount
        self.seconds = seconds
        self.policy = f'"{name}";q={amount};w={seconds}'
        self.header = self.policy.encode()
        self.quota = f'"{name}";r=%d;t=%d'.encode()
        self.belong_to(owner)

    def belong_to(self, owner: str) -> None:
        """Set the id from owner, name, amount and seconds: limits of different owners are counted separately."""
        self.id = f"{quote(owner, safe='/:#<>')}/{self.name}/{self.amount}/{self.seconds}"

    def beside(self, names: Collection[str]) -> "Limit":
        """Return the limit, renamed if one of `names` is equal to its name."""
        if self.name not in names:
            return self
        return Limit(_full_name(self.name, self.amount, self.seconds, names), self.amount, self.seconds)


# A limit, the requests left, and the seconds until more are allowed. A negative number of requests means that the limit
# refused this request. A plain tuple, because one is created for each request.
Quota = tuple[Limit, int, int]


class Store(Protocol):
    """A place where requests are counted."""

    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        """Count a request against each limit that still allows it, and return the quota of each limit.

        Raises:
            ProblemError: The store failed, and the policy denies requests that cannot be counted.
        """
        ...


def parse_limits(text: str, *, name: str, owner: str = "default") -> list[Limit]:
    """Parse a text such as `"10/second; 1000/hour"`.

    A single limit is called `name`; each of several limits is called `<name>-10-per-1s` and so on.

    Raises:
        ConfigurationError: The text is not in the notation of the `limits` package.
    """
    from limits import parse_many  # noqa: PLC0415 - on first use: its import takes longer than that of this package

    try:
        items = parse_many(text)
    except ValueError:
        raise ConfigurationError(
            f"rate limit {text!r} cannot be read: write it as '100/minute', '5 per 10 seconds' or '2/second; 100/hour'"
        ) from None
    names: list[str] = []
    for item in items:
        names.append(name if len(items) == 1 else _full_name(name, item.amount, item.get_expiry(), names))
    return [Limit(each, item.amount, item.get_expiry(), owner=owner) for each, item in zip(names, items, strict=True)]


def text_of(limits: Sequence[Limit]) -> str:
    """Return the text of limits, such as `2/second; 100/hour`, which `parse_limits` reads."""
    return "; ".join(f"{each.amount}/{_UNITS.get(each.seconds, f'{each.seconds} seconds')}" for each in limits)


def checked_cost(cost: _Cost) -> _Cost:
    """Return the cost unchanged if it is a function or a non-negative integer.

    Raises:
        ConfigurationError: The cost is something else.
    """
    if not callable(cost) and cost_of(cost) != cost:
        raise ConfigurationError(f"the cost of a rate limit is {cost}, which would give quota back: use 0 or more")
    return cost


def cost_of(value: Any) -> int:
    """Return a cost as an integer; a negative cost would give quota back, and is returned as zero.

    Raises:
        ConfigurationError: The value is not an integer.
    """
    try:
        return max(0, operator.index(value))
    except TypeError:
        raise ConfigurationError(
            f"the cost of a rate limit is of type {type(value).__name__}: it has to be an integer"
        ) from None


def refused(quotas: Sequence[Quota]) -> bool:
    """Return whether a request exceeds one of its limits."""
    return any(remaining < 0 for _, remaining, _ in quotas)


def refusal(quotas: Sequence[Quota]) -> ProblemError:
    """Return the 429 problem that names the exceeded limits, and add the reason to the access log."""
    violated = [quota for quota in quotas if quota[1] < 0]
    over = ", ".join(f"{limit.name} ({limit.amount} in {limit.seconds} s)" for limit, _, _ in violated)
    _context.refuse(Reason("rate_limited", f"over the limit {over}"))
    names: dict[str, Any] = {"violated-policies": [limit.name for limit, _, _ in violated]}
    wait = {"Retry-After": str(max(reset for _, _, reset in violated))}
    return ProblemError(429, "Too many requests; try again later.", type=_QUOTA_EXCEEDED, headers=wait, **names)


def unavailable(text: str) -> ProblemError:
    """Return the 503 problem of a request that cannot be counted, and add the reason to the access log."""
    _context.refuse(Reason("rate_limit_unavailable", text))
    return ProblemError(503, "The service cannot count requests at the moment.", headers={"Retry-After": "1"})


def add_quota_headers(scope: Scope, quotas: list[Quota], *, legacy: bool = False) -> dict[bytes, bytes]:
    """Set the rate limit headers for these quotas and those added earlier in the request; return the headers.

    The headers are sent by the exchange of the request. Without an exchange the caller has to send them.

    Args:
        scope: The request.
        quotas: Quotas of the request. The list is changed in place: a limit is renamed if an earlier one has its name.
        legacy: Send `X-RateLimit-*` as well. The first call for a request decides.
    """
    noted: _QuotaHeaders | tuple[dict[bytes, bytes], Quota] | None = scope.get(_scope.QUOTAS)
    if noted is None:
        exchange = Exchange.innermost(scope)
        noted = scope[_scope.QUOTAS] = _QuotaHeaders(
            [], {} if exchange is None else exchange.response_headers, legacy=legacy
        )
    elif isinstance(noted, tuple):
        headers, first = noted
        noted = scope[_scope.QUOTAS] = _QuotaHeaders([first], headers, legacy=legacy)
    noted.add(quotas)
    noted.write()
    return noted.headers


def add_first_quota_header(exchange: Exchange, limit: Limit, remaining: int, reset: int) -> None:
    """Set the headers for the first limit of a served request: a fast path, since most requests have one limit."""
    scope = exchange.scope
    if _scope.QUOTAS in scope:  # in a mounted app after others
        add_quota_headers(scope, [(limit, remaining, reset)])
        return
    headers = exchange.response_headers
    headers[b"ratelimit-policy"] = limit.header
    headers[b"ratelimit"] = limit.quota % (remaining, reset)
    scope[_scope.QUOTAS] = headers, (limit, remaining, reset)


def _full_name(name: str, amount: int, seconds: int, others: Collection[str]) -> str:
    """Return a name that states amount and window, and differs from `others`."""
    rate = f"-{amount}-per-{seconds}s"
    full = f"{name.removesuffix(rate)}{rate}"
    return next(each for each in chain([full], (f"{full}-{number}" for number in count(2))) if each not in others)


class _QuotaHeaders:
    def __init__(self, quotas: list[Quota], headers: dict[bytes, bytes], *, legacy: bool) -> None:
        self.quotas = quotas
        self.headers = headers
        self._legacy = legacy

    def add(self, quotas: list[Quota]) -> None:
        known = {limit.name for limit, _, _ in self.quotas}
        quotas[:] = [(limit.beside(known), remaining, reset) for limit, remaining, reset in quotas]
        self.quotas += quotas

    def write(self) -> None:
        quotas = self.quotas
        if not quotas:
            return
        items = [f'"{limit.name}";r={max(0, remaining)};t={reset}' for limit, remaining, reset in quotas]
        self.headers[b"ratelimit-policy"] = ", ".join([limit.policy for limit, _, _ in quotas]).encode()
        self.headers[b"ratelimit"] = ", ".join(items).encode()
        if self._legacy:
            self._write_legacy()

    def _write_legacy(self) -> None:
        """Write X-RateLimit-* headers, as GitHub and slowapi send them, for the limit with the fewest requests left."""
        limit, remaining, reset = min(self.quotas, key=lambda quota: quota[1])
        self.headers[b"x-ratelimit-limit"] = str(limit.amount).encode()
        self.headers[b"x-ratelimit-remaining"] = str(max(0, remaining)).encode()
        self.headers[b"x-ratelimit-reset"] = str(int(time.time()) + reset).encode()  # seconds since 1970
