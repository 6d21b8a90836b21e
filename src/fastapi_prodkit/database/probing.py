"""Query a pool's server for readiness, without waiting for a busy pool.

If all connections of the pool are in use, this says nothing about the server. In this case the query runs on one extra
connection, which is closed afterwards; it fails if the server is down.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool

from fastapi_prodkit.database.url import is_in_memory

__all__ = ["probe"]

_T = TypeVar("_T")
_TOO_MANY_CONNECTIONS = "53300"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


async def probe(engine: AsyncEngine, question: Callable[[AsyncConnection], Awaitable[_T]]) -> _T | None:
    """Return the result of `question`; None if the pool is exhausted and the server refuses one more connection.

    Args:
        engine: The engine whose server is queried.
        question: Called with a connection of the pool, or with an extra connection.

    Raises:
        DBAPIError: The server does not answer.
        TimeoutError: SQLAlchemy's; no connection could be obtained within the pool time-out.
    """
    if not _is_exhausted(engine):
        async with engine.connect() as connection:
            return await question(connection)
    spare = _with_separate_pool(engine)
    try:
        async with spare.connect() as connection:
            return await question(connection)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _TOO_MANY_CONNECTIONS:
            raise
        return None
    finally:
        await spare.dispose()


def _is_exhausted(engine: AsyncEngine) -> bool:
    """Return whether a checkout would wait, and an extra connection would reach the same database."""
    pool = engine.sync_engine.pool
    if not isinstance(pool, QueuePool) or is_in_memory(engine.url):
        return False
    return pool.checkedout() >= pool.size() + pool._max_overflow  # noqa: SLF001 - not public


def _with_separate_pool(engine: AsyncEngine) -> AsyncEngine:
    """Return an engine with the same URL and listeners, but a new pool."""
    sync = engine.sync_engine
    return AsyncEngine(Engine(sync.pool.recreate(), sync.dialect, sync.url, hide_parameters=True))
