"""Find the database to migrate, and create an engine for it."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.database.failure import translate_errors
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["HasDatabase", "Source", "dialect", "engine_for", "is_pooled", "target", "with_asked_timeouts"]

_COMMAND_TIMEOUT = 86_400.0  # seconds; a migration may rebuild a large table
_OURS = ("postgresql", "postgres", "postgresql+asyncpg", "sqlite", "sqlite+aiosqlite")
_PGBOUNCER_PORT = 6432


class HasDatabase(Protocol):
    """Settings with a section for the database, such as `Settings` and its subclasses."""

    @property
    def database(self) -> DatabaseSettings | None:
        """The database section; None if it is not configured."""


Source: TypeAlias = DatabaseSettings | HasDatabase | Callable[[], HasDatabase]


def target(config: Any, settings: Source | None) -> DatabaseSettings:
    """Return the settings for migrations: long time-outs, and a direct connection if one is configured beside a pooler.

    Args:
        config: Alembic's configuration. The first one that is set counts: `attributes["settings"]`, the argument
            `settings`, `attributes["default_settings"]` as read by `fastapi-prodkit db`, and `sqlalchemy.url`.
        settings: The argument of `run_migrations` in `env.py`.

    Raises:
        ConfigurationError: None of them names a database.
    """
    section = with_asked_timeouts(config, _section(config, settings))
    changes: dict[str, Any] = {
        "command_timeout": _COMMAND_TIMEOUT,
        "statement_timeout": None,
        "lock_timeout": None,
        "idle_transaction_timeout": None,
    }
    if section.migrations_url is not None:
        changes |= {"url": section.migrations_url, "pooler": None}
    patient = section.model_copy(update=changes)
    if dialect(patient) == "sqlite":  # there the time-out is the wait for another writer, such as another migration
        patient = patient.model_copy(update={"command_timeout": section.migrations_lock_timeout})
    return patient


def with_asked_timeouts(config: Any, settings: DatabaseSettings) -> DatabaseSettings:
    """Return the settings with the time-outs in `attributes`, seconds: `lock_timeout` and `statement_lock_timeout`.

    A `statement_lock_timeout` of 0 turns this time-out off, as in PostgreSQL.
    """
    changes: dict[str, float | None] = {}
    if (asked := config.attributes.get("lock_timeout")) is not None:
        changes["migrations_lock_timeout"] = asked
    if (asked := config.attributes.get("statement_lock_timeout")) is not None:
        changes["migrations_statement_lock_timeout"] = asked or None
    return settings.model_copy(update=changes)


def dialect(settings: DatabaseSettings) -> str:
    """Return SQLAlchemy's name of the dialect, such as "postgresql"."""
    name = _driver(settings).partition("+")[0]
    return "postgresql" if name == "postgres" else name


def is_pooled(settings: DatabaseSettings, engine: Engine | AsyncEngine) -> bool:
    """Return whether a pooler between here and PostgreSQL assigns connections per transaction."""
    return settings.pooler is not None or engine.url.port == _PGBOUNCER_PORT


def engine_for(settings: DatabaseSettings) -> Engine | AsyncEngine:
    """Return our own engine if it supports the URL's driver, else an engine by SQLAlchemy's `create_engine`.

    Raises:
        ConfigurationError: The URL cannot be used. The message does not repeat it.
        MissingExtraError: The driver is one of ours and is not installed.
    """
    raw = settings.url.get_secret_value()
    if _driver(settings) in _OURS or "://" not in raw:
        return _rebuildable(create_engine(settings))
    try:
        return sqlalchemy.create_engine(raw, hide_parameters=True)
    except (ArgumentError, NoSuchModuleError, ValueError):
        problem = "is not one that SQLAlchemy understands"
    except ModuleNotFoundError as error:
        problem = f"needs a driver that is not installed: {error.name}"
    # Raised outside of the except blocks, so that it is not chained: those errors may quote a part of the password.
    # The scheme is not repeated either: in a misspelt URL, the text before the colon may be the password.
    raise ConfigurationError(f"the URL of the database {problem}")


def _section(config: Any, settings: Source | None) -> DatabaseSettings:
    attributes = config.attributes
    for source in (attributes.get("settings"), settings, attributes.get("default_settings")):
        made: Any = source() if callable(source) else source
        section: DatabaseSettings | None = getattr(made, "database", made)
        if section is not None:
            return section
    url = config.get_alembic_option("sqlalchemy.url")
    if not url:
        raise ConfigurationError(
            "there is no database to migrate: set DATABASE_URL, or pass the settings to run_migrations() in env.py"
        )
    return DatabaseSettings(url=url)


def _driver(settings: DatabaseSettings) -> str:
    return settings.url.get_secret_value().partition(":")[0]


def _rebuildable(engine: AsyncEngine) -> AsyncEngine:
    """Turn off foreign keys in SQLite, because rebuilding a table drops the old one, which would delete referring rows.

    See https://www.sqlite.org/lang_altertable.html section 7. Foreign keys cannot be turned off inside a transaction.
    """
    translate_errors(engine)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _ignore_foreign_keys)
    return engine


def _ignore_foreign_keys(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = OFF")
    cursor.close()
