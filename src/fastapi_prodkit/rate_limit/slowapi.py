"""A replacement for `slowapi.Limiter`: its decorators, `@limiter.limit("5/minute")`, with our store and problems.

slowapi's own Limiter has a synchronous client, which blocks the event loop while a store is slow, and its default
limits skip every included router. This class is a subclass of `slowapi.Limiter` and takes the same decorators. Counting
and responses are those of this package.
"""

import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakSet

import slowapi
from limits import RateLimitItem, parse_many
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_ipaddr, get_remote_address
from slowapi.wrappers import Limit as SlowapiLimit
from starlette.config import Config
from starlette.requests import HTTPConnection
from starlette.responses import Response

from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.rate_limit.decorated import DecoratedLimit, Hit, decorate
from fastapi_prodkit.rate_limit.dependency import installed_store
from fastapi_prodkit.rate_limit.endpoints import exempt_from_all, exempt_from_default
from fastapi_prodkit.rate_limit.keys import by_address
from fastapi_prodkit.rate_limit.limits import Limit, Quota, Store, add_quota_headers, refusal, refused
from fastapi_prodkit.rate_limit.memory import MemoryStore

__all__ = ["Limiter"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Value = str | Callable[..., str]

_logger = logging.getLogger("fastapi_prodkit.rate_limit")
_MEMORY = "RATE_LIMIT_ON_STORAGE_ERROR=memory, the default"
# Arguments of slowapi's Limiter that this one refuses, and what to use in place of each.
_REPLACED: Mapping[str, str] = {
    "default_limits": "RATE_LIMIT_DEFAULT, which holds for every request",
    "application_limits": "RATE_LIMIT_DEFAULT, which is one quota for all of a client's requests",
    "headers_enabled": "nothing: the headers are always sent; RATE_LIMIT_LEGACY_HEADERS adds the older ones",
    "strategy": "RATE_LIMIT_STRATEGY",
    "storage_uri": "RATE_LIMIT_STORAGE_URL",
    "storage_options": "RATE_LIMIT_STORAGE_URL and RATE_LIMIT_STORAGE_TIMEOUT",
    "swallow_errors": "RATE_LIMIT_ON_STORAGE_ERROR=allow",
    "in_memory_fallback": _MEMORY,
    "in_memory_fallback_enabled": _MEMORY,
    "key_prefix": "SERVICE_NAME, which begins each key",
    "key_style": "nothing: a limit belongs to the endpoint, whatever its path",
    "retry_after": "nothing: Retry-After is in seconds",
    "auto_check": "enabled",
    "config_filename": "the settings",
}
# Variables that slowapi's Limiter reads from the environment and `.env`, and what replaces each.
_REPLACED_VARIABLES: Mapping[str, str] = {
    "RATELIMIT_DEFAULT": _REPLACED["default_limits"],
    "RATELIMIT_APPLICATION": _REPLACED["application_limits"],
    "RATELIMIT_STORAGE_URL": _REPLACED["storage_uri"],
    "RATELIMIT_STORAGE_OPTIONS": _REPLACED["storage_options"],
    "RATELIMIT_STRATEGY": _REPLACED["strategy"],
    "RATELIMIT_SWALLOW_ERRORS": _REPLACED["swallow_errors"],
    "RATELIMIT_IN_MEMORY_FALLBACK": _MEMORY,
    "RATELIMIT_IN_MEMORY_FALLBACK_ENABLED": _MEMORY,
    "RATELIMIT_KEY_PREFIX": _REPLACED["key_prefix"],
}


class Limiter(slowapi.Limiter):
    """Limit endpoints with `@limiter.limit("5/minute")` and `@limiter.shared_limit("100/hour", scope="search")`.

    The app's store counts the requests, or a memory store if the app has none. Every decorated limit of an endpoint
    counts, and so does the default limit.

    Args:
        key_func: Function that identifies the client, with the request as its argument or with none. Default: the
            client's address. slowapi's `get_remote_address` and `get_ipaddr` are replaced by this default.
        enabled: Whether limits are checked; RATELIMIT_ENABLED=false turns them off as well.
        replaced: Other arguments of slowapi's Limiter, to refuse them with a hint.

    Raises:
        ConfigurationError: An argument or a variable of slowapi is not used here; the message names its replacement.
    """

    def __init__(self, key_func: Callable[..., Any] = by_address, *, enabled: bool = True, **replaced: Any) -> None:
        for name in replaced:
            if name not in _REPLACED:
                raise TypeError(f"Limiter() got an unexpected keyword argument {name!r}")
            raise ConfigurationError(f"Limiter({name}=...) is not supported; use {_REPLACED[name]}")
        variables = Config(".env" if os.path.isfile(".env") else None)  # noqa: PTH113 - as slowapi itself checks
        for name, place in _REPLACED_VARIABLES.items():
            if variables(name, default=None) is not None:
                raise ConfigurationError(f"the variable {name} is slowapi's; use {place}")
        self._warned = False
        super().__init__(key_func, strategy="fixed-window", storage_uri="memory://")
        self.enabled = enabled and variables("RATELIMIT_ENABLED", cast=bool, default=True)
        self._own = MemoryStore()
        self._used: WeakSet[Any] = WeakSet()
        self._limits: dict[str, Limit] = {}  # by id: equal limits of one scope share a quota
        self._owners: Counter[str] = Counter()

    def limit(self, limit_value: Value, *args: Any, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Limit an endpoint, with the arguments of slowapi's own decorator.

        The default limit counts as well, unless `override_defaults=True` is passed.
        """
        return self._decorator(None, _bound(super().limit, limit_value, *args, **options))

    def shared_limit(
        self, limit_value: Value, scope: Value, *args: Any, **options: Any
    ) -> Callable[[Endpoint], Endpoint]:
        """Limit several endpoints with one quota, with the arguments of slowapi's own decorator."""
        return self._decorator(scope, _bound(super().shared_limit, limit_value, scope, *args, **options))

    def exempt(self, endpoint: Endpoint) -> Endpoint:
        """Exempt an endpoint from every limit, including the default limit."""
        exempt_from_all(endpoint)
        return endpoint

    def reset(self) -> None:
        """Reset all counters in memory.

        Raises:
            ConfigurationError: A shared store was used; reset it with `await app.state.rate_limit.clear()`.
        """
        self._own.clear()
        for store in self._used:
            if not isinstance(store, MemoryStore):
                raise ConfigurationError("a shared store is cleared with: await app.state.rate_limit.clear()")
            store.clear()

    @property
    def _auto_check(self) -> bool:
        """Return False, so that slowapi's middlewares do not count; log once that they are in use."""
        if not self._warned:
            self._warned = True
            _logger.warning("slowapi's middlewares have no effect here, cost time and break streams: remove them")
        return False

    @_auto_check.setter
    def _auto_check(self, value: bool) -> None:
        """Ignore the value that slowapi's constructor assigns."""

    def _inject_headers(self, response: Response, current_limit: Any) -> Response:
        """Add the headers to a response; called by exception handlers that were written for slowapi."""
        response.headers.update(current_limit.headers)
        return response

    def _decorator(self, scope: Value | None, options: dict[str, Any]) -> Callable[[Endpoint], Endpoint]:
        options["key_func"] = _key_func(options.get("key_func") or self._key_func)

        def decorator(endpoint: Any) -> Any:
            shared = _scope_name(scope, endpoint.__name__) if callable(scope) else scope
            owner = self._owner(endpoint) if shared is None else f"scope:{shared}"
            rule = DecoratedLimit(options, owner=owner, name=shared, endpoint=endpoint, known=self._limits)

            async def count(connection: HTTPConnection, hit: Hit) -> None:
                await self._count(connection, rule, hit)

            limited = decorate(endpoint, rule, count, lambda: self.enabled)
            if options.get("override_defaults"):
                exempt_from_default(limited)
            return limited

        return decorator

    def _owner(self, endpoint: Any) -> str:
        """Return the endpoint's name and a number, because several endpoints may have one name."""
        name = f"{endpoint.__module__}.{endpoint.__qualname__}"
        self._owners[name] += 1
        return f"{name}#{self._owners[name]}"

    async def _count(self, connection: HTTPConnection, rule: DecoratedLimit, hit: Hit) -> None:
        store: Store = installed_store(connection.scope) or self._own
        self._used.add(store)
        quotas = await store.hit(hit.limits, hit.key, hit.cost)
        headers = add_quota_headers(connection.scope, quotas)
        if refused(quotas):
            raise _refusal(connection, rule, hit, quotas, headers)


class _Exceeded(ProblemError, RateLimitExceeded):  # noqa: N818 - named like slowapi's class
    """Our problem, which existing handlers and `except` clauses catch as slowapi's exception."""

    def __init__(self, problem: ProblemError, limit: SlowapiLimit) -> None:
        ProblemError.__init__(self, 429, problem.detail, headers=problem.headers, type=problem.type)
        self.extensions = problem.extensions
        self.limit = limit


class _ViewRateLimit(tuple[RateLimitItem, list[str]]):  # noqa: SLOT001 - slots and a tuple exclude each other
    """The value of slowapi's `request.state.view_rate_limit`: the exceeded limit, and the key of the client."""

    headers: dict[str, str]


def _refusal(
    connection: HTTPConnection, rule: DecoratedLimit, hit: Hit, quotas: list[Quota], noted: dict[bytes, bytes]
) -> ProblemError:
    problem = refusal(quotas)
    headers = {name.decode(): value.decode() for name, value in noted.items() if name.startswith(b"ratelimit")}
    headers.update(problem.headers or {})
    if Exchange.innermost(connection.scope) is None:  # no exchange sends the headers
        problem.headers = headers
    message = rule.message()
    problem.detail = message or problem.detail
    handler = getattr(connection.scope.get("app"), "exception_handlers", {}).get(RateLimitExceeded)
    if handler is slowapi._rate_limit_exceeded_handler:  # noqa: SLF001 - its documented name
        return problem  # the handler of slowapi's tutorial is replaced by our problem
    item = parse_many(hit.text)[next(place for place, quota in enumerate(quotas) if quota[1] < 0)]
    if handler is not None:  # a handler of the app gets the exception and the state that slowapi sets
        problem.detail = message or str(item)
        noted[b"retry-after"] = headers["Retry-After"].encode()
        view = connection.state.view_rate_limit = _ViewRateLimit((item, [hit.key, rule.owner]))
        view.headers = headers
    return _Exceeded(problem, rule.as_slowapi_limit(SlowapiLimit, item))


def _bound(method: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments by the parameter names of slowapi's decorator, without those that were not passed."""
    return inspect.signature(method).bind(*args, **options).arguments


def _key_func(key_func: Callable[..., Any]) -> Callable[..., Any]:
    """Replace slowapi's address functions: one IPv6 client has 2^64 addresses, and `get_ipaddr` trusts a header."""
    return by_address if key_func in (get_remote_address, get_ipaddr) else key_func


def _scope_name(function: Callable[..., str], name: str) -> str:
    """Call a scope function; if it has a parameter, pass the endpoint's name, as flask-limiter does."""
    return function(name) if inspect.signature(function).parameters else function()
