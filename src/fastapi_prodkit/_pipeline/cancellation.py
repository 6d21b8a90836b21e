"""Find what serves a request that is to be cancelled."""

from starlette.types import Scope

from fastapi_prodkit._pipeline.exchange import Exchange

__all__ = ["cancellable_exchange"]


def cancellable_exchange(scope: Scope) -> Exchange | None:
    """Return the innermost exchange of the request whose task may be cancelled."""
    exchange = Exchange.innermost(scope)
    while exchange is not None and exchange.task is None:
        exchange = exchange.outer
    return exchange
