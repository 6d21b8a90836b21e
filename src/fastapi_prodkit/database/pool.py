"""A pool that returns a working connection within its time-out, or raises."""

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

_GRACE = 0.25  # seconds: lets the queue's own time-out come first, whose error says that the pool is exhausted
_FRESH = 0.1  # seconds: shorter than a restart of the server, longer than a connection is idle under load
_CLOSE_TIMEOUT = 2.0  # seconds: a running server closes at once
_RETURNED_AT = "fastapi_prodkit.returned_at"

_logger = logging.getLogger("fastapi_prodkit.database")


class BoundedPool(AsyncAdaptedQueuePool):
    """Bound the whole checkout by the pool time-out: waiting in the queue, testing the connection, opening a new one.

    SQLAlchemy bounds only the wait in the queue. Opening a connection then takes up to the connect time-out, and
    testing an old one has no upper bound if the server does not respond.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.BoundedPool"  # so that SQLAlchemy's log level applies, not the service's
    _is_disposed = False

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out.

        Raises:
            PoolTimeoutError: The checkout took longer than the pool time-out plus 0.25 seconds.
        """
        bound = asyncio.timeout(self.timeout() + _GRACE)
        await_only(bound.__aenter__())
        try:
            connection = super().connect()
        except BaseException as error:
            self._raise_after(bound, error)
            raise
        await_only(bound.__aexit__(None, None, None))
        return connection

    def dispose(self) -> None:
        """Close all idle connections concurrently, within two seconds even if the server does not respond.

        SQLAlchemy would close one connection after another and wait for each. A connection in use is closed when it is
        returned; SQLAlchemy would keep it.
        """
        self._is_disposed = True
        idle: list[ConnectionPoolEntry] = []
        while self._pool.qsize():
            idle.append(self._pool.get(False))
        await_only(_close([entry.driver_connection for entry in idle if entry.driver_connection is not None]))
        for entry in idle:
            self._pool.put(entry, False)
        super().dispose()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._is_disposed:
            record.close()
        super()._do_return_conn(record)

    def _raise_after(self, bound: asyncio.Timeout, error: BaseException) -> None:
        try:
            await_only(bound.__aexit__(type(error), error, error.__traceback__))
        except TimeoutError:
            raise PoolTimeoutError(f"the server gave no connection within {self.timeout()} s") from None


async def _close(connections: Sequence[Any]) -> None:
    """Close asyncpg connections concurrently; each one aborts its socket after the time-out."""
    await asyncio.gather(*[connection.close(timeout=_CLOSE_TIMEOUT) for connection in connections])
    if aborted := sum(connection.was_aborted for connection in connections):
        _logger.warning("%d connections were dropped: the server does not answer", aborted)


def check_idle_connections(engine: AsyncEngine, timeout: float) -> None:
    """Replace a dead connection at checkout, before it is used.

    The event loop already knows if the server has closed a connection. If the connection was idle for 0.1 seconds, it
    is also tested by one round trip; SQLAlchemy's `pool_pre_ping` takes three in every checkout.

    Args:
        engine: An engine that uses asyncpg.
        timeout: Time-out of the test, seconds.
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
            _test(connection, timeout)

    event.listen(engine.sync_engine, "checkin", returned)
    event.listen(engine.sync_engine, "checkout", taken)


def _test(connection: Any, timeout: float) -> None:
    try:
        connection.run_async(lambda driver: driver.execute("SELECT", timeout=timeout))  # asyncpg fails on ""
    except Exception as error:  # any error means that the connection has to be replaced
        raise InvalidatePoolError from error
