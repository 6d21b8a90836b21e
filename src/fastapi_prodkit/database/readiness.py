"""Readiness checks of the database: it answers, and has the migrations that this release needs."""

import logging
import sys
from collections.abc import Awaitable, Callable

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.database.migrations import alembic_config
from fastapi_prodkit.database.probing import probe
from fastapi_prodkit.database.session import Database
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError, MigrationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["migrations_check", "readiness_checks"]

_Check = Callable[[], Awaitable[None]]

_logger = logging.getLogger(__name__)


def readiness_checks(database: Database, settings: DatabaseSettings | None) -> dict[str, _Check]:
    """Return the checks by name; the check of migrations requires settings with `migrations_config`.

    Raises:
        ConfigurationError: The scripts cannot be found.
        MissingExtraError: Alembic is not installed.
    """
    if settings is None or settings.migrations == "off" or settings.migrations_config is None:
        return {"database": database.check}
    return {"database": database.check, "migrations": migrations_check(database.engine, settings)}


def migrations_check(
    engine: AsyncEngine,
    settings: DatabaseSettings,
    *,
    version_table: str = "alembic_version",
    schema: str | None = None,
) -> _Check:
    """Return a readiness check that fails, or warns, while the database lacks migrations of this release.

    A database that is ahead passes, because a rolled back release has to run on the newer schema. The scripts are read
    once, by this function; the check is one query.

    Args:
        engine: The engine of the database.
        settings: `migrations_config` locates the scripts; `migrations` says whether pending ones fail or warn.
        version_table: Alembic's version table, if `env.py` renames it.
        schema: Schema of the version table.

    Raises:
        ConfigurationError: The scripts cannot be found.
        MissingExtraError: Alembic is not installed.
    """
    heads, known = _revisions(settings.migrations_config)
    table = Table(version_table, MetaData(), Column("version_num", String), schema=schema)
    pending = CheckWarning if settings.migrations == "warn" else MigrationError
    seen = heads

    async def check() -> None:
        nonlocal seen
        found = await probe(engine, lambda connection: connection.run_sync(_present, table))
        present = seen if found is None else found
        text = f"the database is at {_names(present)}, and this release needs {_names(heads)}"
        if present != seen:  # once per state, not at each probe
            seen = present
            _logger.warning("%s", text)
        if present != heads and present <= known:
            raise pending(text)

    return check


def _revisions(path: str | None) -> tuple[frozenset[str], frozenset[str]]:
    """Return the head revisions of the scripts, and all revisions."""
    config = alembic_config(path)
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - on first use
    from alembic.util import CommandError  # noqa: PLC0415 - on first use

    before = list(sys.path)
    try:
        scripts = ScriptDirectory.from_config(config)
        return frozenset(scripts.get_heads()), frozenset(script.revision for script in scripts.walk_revisions())
    except CommandError as error:
        raise ConfigurationError(f"DATABASE_MIGRATIONS_CONFIG: {error}") from error
    finally:
        sys.path[:] = before  # undo `prepend_sys_path`, which is for processes that only migrate


def _present(connection: Connection, table: Table) -> frozenset[str]:
    if not inspect(connection).has_table(table.name, schema=table.schema):
        return frozenset()
    return frozenset(connection.execute(select(table.c.version_num)).scalars())


def _names(revisions: frozenset[str]) -> str:
    return ", ".join(sorted(revisions)) or "the state before the first migration"
