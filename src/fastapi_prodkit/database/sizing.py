"""Whether the server has room for the connections that the service may open."""

import logging
import os
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["check_room"]

_logger = logging.getLogger("fastapi_prodkit.database")


def check_room(engine: AsyncEngine, settings: DatabaseSettings) -> None:
    """Warn with the first connection if the pools of all workers together are larger than the server allows.

    What other machines open is not known here: leave room for as many tasks as there may be.
    """
    workers = os.environ.get("WEB_CONCURRENCY", "")
    processes = int(workers) if workers.isdigit() else 1
    wanted = (settings.pool_size + settings.max_overflow) * max(1, processes)

    def compare(connection: Any, _record: object) -> None:
        allowed = _ask(connection, "max_connections") - _ask(connection, "superuser_reserved_connections")
        if wanted > allowed:
            _logger.warning(
                "the pools may open %d connections (DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW, for each worker), "
                "and the server allows %d for all its clients",
                wanted,
                allowed,
            )

    event.listen(engine.sync_engine, "first_connect", compare)


def _ask(connection: Any, name: str) -> int:
    cursor = connection.cursor()
    cursor.execute(f"SHOW {name}")
    value = int(cursor.fetchone()[0])
    cursor.close()
    return value
