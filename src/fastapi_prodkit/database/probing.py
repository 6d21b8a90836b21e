"""Questions of readiness to the server of a pool, which a busy pool does not keep waiting.

That all connections are in use says how much there is to do, and nothing about the server. So the question then goes
over one more connection, which is closed again; it fails if the server is gone.
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
    """Return the answer to the question; None if the server has no connection beyond those of the pool, all in use.

    Args:
        engine: The engine whose server is asked.
        question: Called with a connection of the pool, or with one more.

    Raises:
        DBAPIError: The server does not answer.
        TimeoutError: SQLAlchemy's; the server gives no connection within the pool time-out.
    """
    if not _is_exhausted(engine):
        async with engine.connect() as connection:
            return await question(connection)
    spare = _with_pool_of_its_own(engine)
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
    """Whether a checkout has to wait, and another connection could lead to the same database."""
    pool = engine.sync_engine.pool
    if not isinstance(pool, QueuePool) or is_in_memory(engine.url):
        return False
    return pool.checkedout() >= pool.size() + pool._max_overflow  # noqa: SLF001 - not public


def _with_pool_of_its_own(engine: AsyncEngine) -> AsyncEngine:
    """Return an engine that connects as the other one does, with its listeners, and counts its own connections."""
    sync = engine.sync_engine
    return AsyncEngine(Engine(sync.pool.recreate(), sync.dialect, sync.url, hide_parameters=True))
