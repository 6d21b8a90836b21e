"""slowapi's decorators, for those who have them: `@limiter.limit("5/minute")` on our store, keys and refusals.

A stock `slowapi.Limiter` has a synchronous client, which stops the event loop while a store is slow, and its default
limits skip every included router. This one is a `slowapi.Limiter` to whoever asks, and keeps its decorators; what
counts, and what is answered, is this package's.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

import slowapi
from anyio import from_thread
from slowapi.wrappers import Limit as SlowapiLimit
from slowapi.wrappers import LimitGroup
from starlette.requests import HTTPConnection
from starlette.responses import Response

from fastapi_prodkit._exchange import Exchange
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit.dependency import installed_store
from fastapi_prodkit.rate_limit.keys import bounded, client_key
from fastapi_prodkit.rate_limit.limits import Limit, Quota, Store, note, refusal, refused
from fastapi_prodkit.rate_limit.memory import MemoryStore

__all__ = ["Limiter"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Value = str | Callable[..., str]

# What a stock limiter is told and this one is not, and where it is said instead.
_REPLACED: Mapping[str, str] = {
    "default_limits": "RATE_LIMIT_DEFAULT, which holds for every request",
    "application_limits": "RATE_LIMIT_DEFAULT, which is one quota for all of a client's requests",
    "headers_enabled": "nothing: the headers are always sent; RATE_LIMIT_LEGACY_HEADERS adds the older ones",
    "strategy": "RATE_LIMIT_STRATEGY",
    "storage_uri": "RATE_LIMIT_STORAGE_URL",
    "storage_options": "RATE_LIMIT_STORAGE_URL and RATE_LIMIT_STORAGE_TIMEOUT",
    "swallow_errors": "RATE_LIMIT_ON_STORAGE_ERROR=allow",
    "in_memory_fallback": "RATE_LIMIT_ON_STORAGE_ERROR=memory, the default",
    "in_memory_fallback_enabled": "RATE_LIMIT_ON_STORAGE_ERROR=memory, the default",
    "key_prefix": "SERVICE_NAME, which begins each key",
    "key_style": "nothing: a limit is the endpoint's, whatever its path",
    "retry_after": "nothing: Retry-After is in seconds",
    "auto_check": "enabled",
    "config_filename": "the settings",
}


def address(request: HTTPConnection) -> str:
    """Return the client's address, which proxies that are trusted have told."""
    return client_key(request.scope)


class Limiter(slowapi.Limiter):
    """Limit endpoints with `@limiter.limit("5/minute")` and `@limiter.shared_limit("100/hour", scope="search")`.

    The store is the app's, or one in memory where the app has none. Every limit that is decorated onto an endpoint
    counts, and the default limit does as well.

    Args:
        key_func: Whose requests are counted together, by address unless given; takes `request`, or nothing.
        enabled: Whether limits are looked at.
        replaced: What a stock limiter takes beside these.

    Raises:
        ConfigurationError: An argument has another place here; the message says which.
    """

    def __init__(self, key_func: Callable[..., str] = address, *, enabled: bool = True, **replaced: Any) -> None:
        for name in replaced:
            if name not in _REPLACED:
                raise TypeError(f"Limiter() got an unexpected keyword argument {name!r}")
            raise ConfigurationError(f"Limiter({name}=...) is not used here; instead of it there is {_REPLACED[name]}")
        super().__init__(key_func, enabled=enabled, key_style="endpoint")
        self._own = MemoryStore()
        self._used: WeakSet[Any] = WeakSet()
        self._limits: dict[tuple[str, str, int, int], Limit] = {}

    def limit(self, limit_value: Value, *args: Any, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Limit an endpoint, with the arguments of slowapi's own; it needs a parameter `request`."""
        arguments = _bound(super().limit, limit_value, *args, **options)
        return functools.partial(self._decorate, limit_value, None, arguments)

    def shared_limit(
        self, limit_value: Value, scope: Value, *args: Any, **options: Any
    ) -> Callable[[Endpoint], Endpoint]:
        """Limit several endpoints with one quota, with the arguments of slowapi's own."""
        arguments = _bound(super().shared_limit, limit_value, scope, *args, **options)
        return functools.partial(self._decorate, limit_value, scope() if callable(scope) else scope, arguments)

    def exempt(self, endpoint: Endpoint) -> Endpoint:
        """Return the endpoint as it is: the default limit holds for it as for every other."""
        return endpoint

    def reset(self) -> None:
        """Forget every request that was counted in memory.

        Raises:
            ConfigurationError: They were counted in a store that only `await app.state.rate_limit.clear()` can clear.
        """
        self._own.clear()
        for store in self._used:
            if not isinstance(store, MemoryStore):
                raise ConfigurationError("a shared store is cleared with: await app.state.rate_limit.clear()")
            store.clear()

    def check_request_limit(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse slowapi's middlewares."""
        raise ConfigurationError("slowapi's middlewares are not used here: remove them; the edge counts every request")

    _check_request_limit = check_request_limit

    def _decorate(self, value: Value, scope: str | None, options: Any, endpoint: Any) -> Any:
        group = LimitGroup(
            value,
            options["key_func"] or self._key_func,
            scope,
            options.get("per_method", False),
            options.get("methods"),
            options["error_message"],
            options["exempt_when"],
            options["cost"],
            options["override_defaults"],
        )
        fixed = None if callable(value) else _read(group, value)
        where = f"{endpoint.__module__}.{endpoint.__qualname__}"
        position = _position(endpoint)

        async def check(args: Sequence[Any], kwargs: Mapping[str, Any]) -> HTTPConnection:
            connection: HTTPConnection = kwargs.get("request", kwargs.get("websocket")) or args[position]
            await self._check(connection, group if fixed is None else fixed, where)
            return connection

        if inspect.iscoroutinefunction(endpoint):

            @functools.wraps(endpoint)
            async def limited(*args: Any, **kwargs: Any) -> Any:
                if not self.enabled:
                    return await endpoint(*args, **kwargs)
                connection = await check(args, kwargs)
                return _with_headers(connection, await endpoint(*args, **kwargs), kwargs)

            limited.statuses = (429,)  # type: ignore[attr-defined]  # what the schema shows
            return limited

        @functools.wraps(endpoint)
        def limited_in_thread(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return endpoint(*args, **kwargs)
            connection = from_thread.run(check, args, kwargs)
            return _with_headers(connection, endpoint(*args, **kwargs), kwargs)

        limited_in_thread.statuses = (429,)  # type: ignore[attr-defined]
        return limited_in_thread

    async def _check(self, connection: HTTPConnection, limits: LimitGroup | list[SlowapiLimit], where: str) -> None:
        store: Store = installed_store(connection.scope) or self._own
        self._used.add(store)
        if isinstance(limits, LimitGroup):
            limits.request = connection  # type: ignore[assignment]  # for a limit that depends on it; read at once
        for limit in list(limits):
            for ours, key, cost in self._applying(connection, limit, where):
                quotas = await store.hit([ours], key, cost)
                note(connection.scope, quotas)
                if refused(quotas):
                    raise _refusal(quotas, limit)

    def _applying(self, connection: Any, limit: SlowapiLimit, where: str) -> Iterator[tuple[Limit, str, int]]:
        """Yield what a limit comes to for a request: nothing, or whom it counts for what."""
        method = connection.scope.get("method", "WEBSOCKET")
        if limit.is_exempt(connection) or (limit.methods is not None and method.lower() not in limit.methods):
            return
        key = _call(limit.key_func, connection)
        if key:
            home = f"{limit.scope or where}:{method}" if limit.per_method else limit.scope or where
            cost = limit.cost(connection) if callable(limit.cost) else limit.cost
            yield self._ours(home, limit), bounded(str(key)), cost

    def _ours(self, home: str, limit: SlowapiLimit) -> Limit:
        name = limit.scope if limit.scope and limit.scope.isidentifier() else "route"
        key = (home, name, limit.limit.amount, limit.limit.get_expiry())
        if key not in self._limits:
            self._limits[key] = Limit(name, key[2], key[3], home=home)
        return self._limits[key]


def _bound(method: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """Read the arguments as slowapi's own decorator does."""
    arguments = inspect.signature(method).bind(*args, **options)
    arguments.apply_defaults()
    return arguments.arguments


def _read(group: LimitGroup, value: str) -> list[SlowapiLimit]:
    try:
        return list(group)
    except ValueError:
        raise ConfigurationError(f"rate limit {value!r} cannot be read: write it as '100/minute'") from None


def _position(endpoint: Callable[..., Any]) -> int:
    names = list(inspect.signature(endpoint).parameters)
    for name in ("request", "websocket"):
        if name in names:
            return names.index(name)
    raise ConfigurationError(f"{endpoint.__qualname__} needs a parameter `request: Request` for its limit")


def _call(key_func: Callable[..., Any], connection: HTTPConnection) -> Any:
    return key_func(connection) if _takes_request(key_func) else key_func()


@functools.lru_cache(maxsize=256)
def _takes_request(key_func: Callable[..., Any]) -> bool:
    return "request" in inspect.signature(key_func).parameters


def _refusal(quotas: Sequence[Quota], limit: SlowapiLimit) -> Exception:
    problem = refusal(quotas)
    message = limit.error_message
    if message is not None:
        problem.detail = message() if callable(message) else message
    return problem


def _with_headers(connection: HTTPConnection, result: Any, kwargs: Mapping[str, Any]) -> Any:
    """Put the headers on the response, where no exchange sends them."""
    if Exchange.of(connection.scope) is None:
        response = result if isinstance(result, Response) else kwargs.get("response")
        if response is not None:
            headers = note(connection.scope, ())
            response.headers.update({name.decode(): value.decode() for name, value in headers.items()})
    return result
