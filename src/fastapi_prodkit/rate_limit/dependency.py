"""A limit on a route, a router or an app: `Depends(RateLimit("5/minute"))`."""

import inspect
import re
from collections.abc import Callable, Sequence

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import walk_dependencies, walk_routes
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit.keys import Key, bounded, by_address
from fastapi_prodkit.rate_limit.limits import (
    Store,
    add_quota_headers,
    checked_cost,
    cost_of,
    parse_limits,
    refusal,
    refused,
    text_of,
)
from fastapi_prodkit.rate_limit.memory import MemoryStore
from fastapi_prodkit.rate_limit.shared import SharedStore

__all__ = ["RateLimit"]

_UNNAMED = "route"


class RateLimit:
    """Count the requests of a route or router against a separate limit: `Depends(RateLimit("5/minute"))`.

    Routes that depend on the same object share its quota. A request counts once per object, even if several of its
    dependencies use the object. The default limit counts as well. In a shared store a limit is identified by the first
    of the app's routes that depend on it, and by its name, amount and time, so its key is equal in every process.

    Args:
        limit: Such as `"5/minute"`, or `"2/second; 100/hour"` for several at once.
        name: Name of the limit in headers and in the 429 problem.
        key: Function that identifies the client: requests with equal keys share a quota. It takes the connection, may
            be async, and returns a text, bytes, an integer or a UUID, or None for a request that is not limited.
            Default: the client's address. See `by_user` and `by_header`.
        cost: How many requests one request counts as, 0 or more; or a function of the connection that returns this
            number. Negative results count as zero. A request that costs more than the limit is refused.

    Raises:
        ConfigurationError: The limit cannot be read, the name is not valid in a header, or the cost is negative. During
            a request: the key function or the cost function returns a value of another type; or the limit needs a
            name, because a shared store has an equal one, or no route depends on it.
    """

    statuses = (429,)  # listed in the OpenAPI schema of routes that depend on this

    def __init__(
        self,
        limit: str,
        *,
        name: str = _UNNAMED,
        key: Key = by_address,
        cost: int | Callable[[HTTPConnection], int] = 1,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
            raise ConfigurationError(f"the name {name!r} is not valid in a header: use letters, digits and any of _.:-")
        self._limits = parse_limits(limit, name=name, owner="")
        self._key = key
        self._cost = checked_cost(cost)
        self._store = MemoryStore()
        self._name = name
        self._owner: str | None = None
        self._identified_for: Store = self._store

    def __str__(self) -> str:
        """Return the limits, such as `2/second; 100/hour`."""
        return text_of(self._limits)

    async def __call__(self, connection: HTTPConnection, response: Response) -> None:
        """Count the request, or raise the 429 problem."""
        key = self._key(connection)
        if inspect.isawaitable(key):
            key = await key
        if key is None:
            return
        cost = cost_of(self._cost(connection)) if callable(self._cost) else self._cost
        scope = connection.scope
        store = installed_store(scope) or self._store
        if store is not self._identified_for:
            self._identify(store, scope["app"].routes)
        quotas = await store.hit(self._limits, bounded(key), cost)
        headers = add_quota_headers(scope, quotas)
        own = {}
        if Exchange.innermost(scope) is None:  # with an exchange, the exchange sends the headers
            own = {name.decode(): value.decode() for name, value in headers.items()}
            response.headers.update(own)
        if refused(quotas):
            problem = refusal(quotas)
            problem.headers = {**own, **(problem.headers or {})}
            raise problem

    def _identify(self, store: Store, routes: Sequence[BaseRoute]) -> None:
        """Set the ids of the limits, which a shared store uses as keys, equal in every process."""
        if self._owner is None and not isinstance(store, MemoryStore):
            self._owner = _first_route(self, routes)
            if not self._owner and self._name == _UNNAMED:
                raise ConfigurationError(
                    "no route depends on a rate limit that is counted in a shared store: give it a name, "
                    "RateLimit(..., name=...)"
                )
            for limit in self._limits:
                limit.belong_to(self._owner)
        if isinstance(store, SharedStore):
            store.register(self._limits)
        self._identified_for = store


def installed_store(scope: Scope) -> Store | None:
    """Return the app's store, from the layers of the edge or from `app.state`; None if there is none."""
    installed = _scope.installed(scope)
    if installed is not None:
        return installed.get("rate_limit")
    store: Store | None = getattr(scope["app"].state, "rate_limit", None)
    return store if hasattr(store, "hit") else None


def _first_route(limit: RateLimit, routes: Sequence[BaseRoute]) -> str:
    """Return methods and path of the first route that depends on the limit; an empty text if there is none."""
    for path, route in walk_routes(routes):
        if limit in walk_dependencies(getattr(route, "dependant", None)):
            return f"{'+'.join(sorted(route.methods or ['WEBSOCKET']))}:{path}"
    return ""
