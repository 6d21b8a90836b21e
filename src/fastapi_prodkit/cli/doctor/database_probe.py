"""Query the database once, within a time-out."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi_prodkit.cli.doctor.facts import Server
from fastapi_prodkit.cli.failure import describe
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError, MigrationError, MissingExtraError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["ask", "migration_scripts"]

_SUPERUSER = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
_SCRIPTS = "alembic.ini"  # the usual configuration file, in the directory of the service


def ask(settings: DatabaseSettings, timeout: float) -> Server:
    """Return limits, privileges and pending migrations of the database, or why it could not be queried.

    Args:
        settings: Settings of the database; one connection is opened.
        timeout: Time-out for everything, seconds.
    """
    try:
        return asyncio.run(_query(settings, timeout))
    except TimeoutError:
        return Server(failure=f"it does not answer within {timeout:g} s")
    except Exception as error:  # noqa: BLE001 - any error is reported as the reason
        return Server(failure=describe(error))


def migration_scripts(settings: DatabaseSettings) -> str | None:
    """Return the file that configures the migrations; None if it is unknown."""
    return settings.migrations_config or (_SCRIPTS if Path(_SCRIPTS).is_file() else None)


async def _query(settings: DatabaseSettings, longest: float) -> Server:
    from fastapi_prodkit.database.engine import create_engine  # noqa: PLC0415 - it needs an extra
    from fastapi_prodkit.database.failure import translate_errors  # noqa: PLC0415 - it needs an extra

    few = {"pool_size": 1, "max_overflow": 0, "connect_timeout": min(longest, settings.connect_timeout)}
    engine = create_engine(settings.model_copy(update=few))
    translate_errors(engine)
    try:
        async with asyncio.timeout(longest):
            async with engine.connect() as connection:
                allowed, superuser = await _limits(connection)
            return Server(allowed=allowed, superuser=superuser, pending=await _pending(engine, settings))
    finally:
        await engine.dispose()


async def _limits(connection: Any) -> tuple[int | None, bool]:
    from fastapi_prodkit.database.sizing import ALLOWED_CONNECTIONS_SQL  # noqa: PLC0415 - it needs an extra

    if connection.dialect.name != "postgresql":
        return None, False
    allowed = (await connection.exec_driver_sql(ALLOWED_CONNECTIONS_SQL)).scalar_one()
    return allowed, bool((await connection.exec_driver_sql(_SUPERUSER)).scalar_one())


async def _pending(engine: Any, settings: DatabaseSettings) -> str | None:
    from fastapi_prodkit.database.readiness import migrations_check  # noqa: PLC0415 - it needs an extra

    scripts = migration_scripts(settings)
    if scripts is None:
        return None
    try:
        await migrations_check(engine, settings.model_copy(update={"migrations_config": scripts}))()
    except (MigrationError, CheckWarning, ConfigurationError, MissingExtraError) as error:
        return str(error)
    return None
