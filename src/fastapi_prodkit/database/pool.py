"""A pool that hands out a working connection within its time-out, or says that it cannot."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import AsyncAdaptedQueuePool, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only  # under this name in SQLAlchemy 2.0 and 2.1

__all__ = ["BoundedPool", "check_idle_connections"]

_GRACE = 0.25  # seconds: the queue's own time-out comes first, for it knows that the pool is exhausted
_FRESH = 0.1  # seconds: too short for a restart, and longer than a connection lies idle under load
_LEAVE = 2.0  # seconds: a server that lives takes leave at once
_RETURNED_AT = "fastapi_prodkit.returned_at"

_logger = logging.getLogger("fastapi_prodkit.database")


class BoundedPool(AsyncAdaptedQueuePool):
    """Bound the whole checkout by the pool time-out: the wait for a turn, the test of the connection, a new one.

    SQLAlchemy bounds the wait alone. A new connection takes up to the connect time-out on top, and the test of an old
    one as long as a silent server pleases.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.BoundedPool"  # whose level is SQLAlchemy's, not the service's

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out.

        Raises:
            PoolTimeoutError: It took longer than the pool time-out and a quarter of a second.
        """
        bound = asyncio.timeout(self.timeout() + _GRACE)
        await_only(bound.__aenter__())
        try:
            connection = super().connect()
        except BaseException as error:
            self._leave(bound, error)
            raise
        await_only(bound.__aexit__(None, None, None))
        return connection

    def dispose(self) -> None:
        """Close what lies in the pool, within two seconds, and at once where the server lives.

        SQLAlchemy closes one connection after another and waits for each of them, even if the server is silent.
        """
        idle: list[ConnectionPoolEntry] = []
        while self._pool.qsize():
            idle.append(self._pool.get(False))
        await_only(_close([entry.driver_connection for entry in idle if entry.driver_connection is not None]))
        for entry in idle:
            self._pool.put(entry, False)
        super().dispose()

    def _leave(self, bound: asyncio.Timeout, error: BaseException) -> None:
        try:
            await_only(bound.__aexit__(type(error), error, error.__traceback__))
        except TimeoutError:
            raise PoolTimeoutError(f"the server gave no connection within {self.timeout()} s") from None


async def _close(connections: Sequence[Any]) -> None:
    """Close asyncpg's connections together; each of them drops its socket in the end."""
    closing = [connection.close(timeout=_LEAVE) for connection in connections]
    failed = [result for result in await asyncio.gather(*closing, return_exceptions=True) if result is not None]
    if failed:
        _logger.warning("%d connections were dropped: the server does not answer", len(failed))


def check_idle_connections(engine: AsyncEngine, timeout: float) -> None:
    """Replace a connection that has died in the pool before anybody works with it.

    The event loop already knows when the other end has closed it. Whether the server still answers is asked of a
    connection that has lain idle for a tenth of a second: one round trip, where SQLAlchemy's `pool_pre_ping` takes
    three each time.

    Args:
        engine: An engine of asyncpg's.
        timeout: How long the answer may take, seconds.
    """

    def returned(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED_AT] = time.monotonic()
        if connection is not None and connection.driver_connection.is_closed():
            record.invalidate()

    def taken(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        driver = connection.driver_connection
        if driver.is_closed():
            raise InvalidatePoolError
        if time.monotonic() - record.info.get(_RETURNED_AT, math.inf) > _FRESH:
            _ask(connection, timeout)

    event.listen(engine.sync_engine, "checkin", returned)
    event.listen(engine.sync_engine, "checkout", taken)


def _ask(connection: Any, timeout: float) -> None:
    try:
        connection.run_async(lambda driver: driver.execute("SELECT", timeout=timeout))  # asyncpg fails on an empty one
    except Exception as error:  # whatever is wrong with this connection, a new one is the answer
        raise InvalidatePoolError from error
