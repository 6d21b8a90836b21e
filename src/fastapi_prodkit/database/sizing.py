"""Compare the connections that the service may open with those that the server allows."""

import logging
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit._config.worker_count import configured_workers
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["ALLOWED_CONNECTIONS_SQL", "max_connections", "warn_if_pools_exceed_server"]

_logger = logging.getLogger("fastapi_prodkit.database")

# Settings that older servers lack are null, which least() ignores.
ALLOWED_CONNECTIONS_SQL = """
SELECT least(
  current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
    - coalesce(current_setting('reserved_connections', true)::int, 0),
  (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user AND NOT rolsuper),
  (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
)"""


def max_connections(settings: DatabaseSettings) -> int:
    """Return the maximum number of connections of all workers of one container."""
    return (settings.pool_size + settings.max_overflow) * (configured_workers() or 1)


def warn_if_pools_exceed_server(engine: AsyncEngine, settings: DatabaseSettings) -> None:
    """Warn at the first connection if the pools of all workers together exceed the server's limit.

    The limit is the lowest of the server's configuration, the role and the database. Connections of other containers
    are not known here: size the pools for all containers together.
    """
    most = max_connections(settings)

    def compare(connection: Any, _record: object) -> None:
        try:
            # Without SQLAlchemy, which would begin a transaction and leave it open for the first session.
            allowed = connection.run_async(lambda driver: driver.fetchval(ALLOWED_CONNECTIONS_SQL))
        except Exception as error:  # noqa: BLE001 - a failed check must not stop the service
            _logger.warning("the server's limit of connections is unknown: %s", type(error).__name__)
            return
        if most > allowed:
            _logger.warning(
                "the pools may open %d connections (DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW, for each worker), "
                "and the server allows %d for all its clients",
                most,
                allowed,
            )

    event.listen(engine.sync_engine, "first_connect", compare)
