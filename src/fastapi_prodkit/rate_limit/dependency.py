"""A limit on a route, a router or an app: `Depends(RateLimit("5/minute"))`."""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from fastapi_prodkit import _scope
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
)
from fastapi_prodkit.rate_limit.memory import MemoryStore

__all__ = ["RateLimit"]

_owners: Counter[str] = Counter()  # how many limits each line of the program has made


class RateLimit:
    """Count the requests of a route or router against a limit of its own: `Depends(RateLimit("5/minute"))`.

    Routes that depend on the same object share its quota; a request counts once, however many of its dependencies
    do. The default limit counts as well. In a shared store a limit is known by the line of the program that made it,
    so that every process knows the same ones.

    Args:
        limit: Such as `"5/minute"`, or `"2/second; 100/hour"` for several at once.
        name: What the headers and the 429 problem call it.
        key: Whose requests are counted together: a function of the connection, async or not, that returns a text,
            bytes, an integer or a UUID, or None for a request that is not limited. By address unless given; see
            `by_header`.
        cost: What a request counts for, 0 or more; or a function of the connection that says so, whose negative
            results count as zero. A request that costs more than the limit is refused.

    Raises:
        ConfigurationError: The limit cannot be read, the name cannot stand in a header, or the cost is negative; or,
            on a request, the key function or the cost function returns something else.
    """

    statuses = (429,)  # what the schema shows on routes that depend on it

    def __init__(
        self,
        limit: str,
        *,
        name: str = "route",
        key: Key = by_address,
        cost: int | Callable[[HTTPConnection], int] = 1,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
            raise ConfigurationError(f"the name {name!r} cannot stand in a header: use letters, digits and any of _.:-")
        self._limits = parse_limits(limit, name=name, owner=_owner())
        self._key = key
        self._cost = checked_cost(cost)
        self._store = MemoryStore()

    async def __call__(self, connection: HTTPConnection, response: Response) -> None:
        """Count the request, or raise the 429 problem."""
        key = self._key(connection)
        if inspect.isawaitable(key):
            key = await key
        if key is None:
            return
        cost = cost_of(self._cost(connection)) if callable(self._cost) else self._cost
        scope = connection.scope
        quotas = await (installed_store(scope) or self._store).hit(self._limits, bounded(key), cost)
        headers = add_quota_headers(scope, quotas)
        own = {}
        if Exchange.innermost(scope) is None:  # an exchange sends them with every kind of response
            own = {name.decode(): value.decode() for name, value in headers.items()}
            response.headers.update(own)
        if refused(quotas):
            problem = refusal(quotas)
            problem.headers = {**own, **(problem.headers or {})}
            raise problem


def installed_store(scope: Scope) -> Store | None:
    """Find the app's store: in the edge's pieces, or in `app.state`."""
    installed = _scope.installed(scope)
    if installed is not None:
        return installed.get("rate_limit")
    store: Store | None = getattr(scope["app"].state, "rate_limit", None)
    return store if hasattr(store, "hit") else None


def _owner() -> str:
    """Name the line that makes a limit, and which one of those it makes."""
    caller = sys._getframe(2)  # noqa: SLF001 - Python's own way to the caller; __init__ is in between
    line = f"{caller.f_globals.get('__name__')}:{caller.f_lineno}"
    _owners[line] += 1
    return f"{line}#{_owners[line]}"
