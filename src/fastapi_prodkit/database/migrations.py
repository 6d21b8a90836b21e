"""Run migrations with Alembic, by an `env.py` of a few lines.

    from alembic import context
    from fastapi_prodkit.database.migrations import run_migrations
    from shop.models import Base
    from shop.settings import ShopSettings

    run_migrations(context, Base.metadata, ShopSettings)

It works under `fastapi-prodkit db`, Alembic's own command line and `alembic.command`, with async and sync drivers, and
from within a running event loop. It does not change logging. An app never migrates at start-up: replicas would
compete, and a long migration would look like a failed start.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit import _extras
from fastapi_prodkit.database.migration_lock import MigrationLock, exclude_other_writers, foreign_key_violations
from fastapi_prodkit.database.migration_steps import Steps, timeouts
from fastapi_prodkit.database.migration_target import (
    Source,
    dialect,
    engine_for,
    is_pooled,
    target,
    with_asked_timeouts,
)
from fastapi_prodkit.exceptions import ConfigurationError, MigrationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["alembic_config", "run_migrations"]

_POOLED = (
    "migrations go through a pooler, so the lock between two processes holds for one transaction only: "
    "set DATABASE_MIGRATIONS_URL to a URL of PostgreSQL itself"
)

_logger = logging.getLogger(__name__)


def run_migrations(context: Any, target_metadata: Any = None, settings: Source | None = None, **options: Any) -> None:
    """Run the current Alembic command; the last line of an `env.py`.

    Args:
        context: `alembic.context`.
        target_metadata: The metadata of the models, which `--autogenerate` and `check` compare with the database.
        settings: Settings that name the database, or a function that returns them, such as the class. A `connection`
            or `settings` in `config.attributes` takes precedence. Without any of these, the database is DATABASE_URL as
            read by `fastapi-prodkit db`, or else `sqlalchemy.url` of alembic.ini.
        options: Arguments of Alembic's `context.configure`, which replace ours.

    Raises:
        ConfigurationError: There is no database, or its URL cannot be used. The message does not repeat the URL.
        MigrationError: Another process is migrating and does not finish in time; a revision did not get its locks; or
            rows in SQLite would violate a foreign key.
        MissingExtraError: The driver of the URL is not installed.
    """
    run = _Run(context, target_metadata, options)
    connection: Connection | None = context.config.attributes.get("connection")
    if connection is not None:
        database = with_asked_timeouts(context.config, DatabaseSettings(url=connection.dialect.name))
    else:
        database = target(context.config, settings)
    if context.is_offline_mode():
        run.offline(database)
        return
    if connection is not None:
        run.online(connection, database, own=False)
        return
    engine = engine_for(database)
    if pooled := is_pooled(database, engine):
        _logger.warning(_POOLED)
    if isinstance(engine, AsyncEngine):
        _finish(_with_connection(engine, lambda connection: run.online(connection, database, pooled=pooled)))
        return
    try:
        with engine.connect() as connection:
            run.online(connection, database, pooled=pooled)
    finally:
        engine.dispose()


def alembic_config(path: str | Path | None = None) -> Any:
    """Return Alembic's configuration from a file, by default from `alembic.ini` or `pyproject.toml` here.

    Args:
        path: An `alembic.ini`, or a `pyproject.toml` with a table `[tool.alembic]`.

    Raises:
        ConfigurationError: The file does not exist, or does not configure migrations.
        MissingExtraError: Alembic is not installed.
    """
    _extras.require("alembic", extra="database")
    from alembic.config import Config  # noqa: PLC0415 - on first use

    candidates = [Path(path)] if path else [Path("alembic.ini"), Path("pyproject.toml")]
    files = {file.suffix == ".toml": file for file in candidates if file.is_file()}
    config = Config(files.get(False), files.get(True), stdout=sys.stdout, output_buffer=sys.stdout)
    if config.get_alembic_option("script_location") is None:
        place = f"in {path}" if path else f"in alembic.ini or pyproject.toml in {Path.cwd()}"
        raise ConfigurationError(f"no migrations are configured {place}: name the file, or run `alembic init`")
    return config


class _Run:
    """One run of `env.py`."""

    def __init__(self, context: Any, target_metadata: Any, options: Mapping[str, Any]) -> None:
        self._context = context
        applied = options.get("on_version_apply") or ()
        self._callbacks: tuple[Callable[..., None], ...] = (applied,) if callable(applied) else tuple(applied)
        self._options = {"target_metadata": target_metadata, **options}
        self._since = 0.0

    def offline(self, database: DatabaseSettings) -> None:
        """Write SQL for `--sql`, without a connection."""
        name = dialect(database)
        ours = {"dialect_name": name, "literal_binds": True, "dialect_opts": {"paramstyle": "named"}}
        postgresql = name == "postgresql"
        self._context.configure(**{**ours, "transaction_per_migration": postgresql, **self._options})
        for statement in timeouts(database) if postgresql else ():
            self._context.execute(statement)
        with self._context.begin_transaction():
            self._context.run_migrations()

    def online(
        self, connection: Connection, database: DatabaseSettings, *, pooled: bool = False, own: bool = True
    ) -> None:
        """Run on the connection; if it is the caller's, keep its transaction and time-outs."""
        sqlite = connection.dialect.name == "sqlite"
        postgresql = own and connection.dialect.name == "postgresql"
        separate = {"transaction_per_migration": postgresql and not pooled}
        ours: dict[str, Any] = {"render_as_batch": sqlite} | ({"transactional_ddl": True} if sqlite and own else {})
        options = {**ours, **separate, **self._options, "on_version_apply": (self._applied, *self._callbacks)}
        self._context.configure(connection=connection, **options)
        found: dict[str, Any] = self._context.get_context().opts
        if found.get("dont_mutate"):  # `alembic current` does not wait for another process that migrates
            self._context.run_migrations()
            return
        if sqlite and own:
            event.listen(connection, "begin", exclude_other_writers)
        lock = MigrationLock(connection, database.migrations_lock_timeout, pooled=pooled)
        with lock.session():
            self._since = time.monotonic()
            if not postgresql:
                self._attempt(lock)
                return
            find = found["fn"]
            steps = Steps(connection, find, database, separate=options["transaction_per_migration"], pooled=pooled)
            self._context.configure(connection=connection, **options, fn=steps)
            try:
                steps.run(lambda: self._attempt(lock))
            finally:
                found["fn"] = find  # Alembic uses it in the next call of its `run_migrations`

    def _attempt(self, lock: MigrationLock) -> None:
        with self._context.begin_transaction():
            lock.transaction()
            self._context.run_migrations()

    def _applied(self, *, ctx: Any, step: Any, **_: Any) -> None:
        """Log a finished migration, before its commit: SQLite rolls back one that violates foreign keys."""
        if ctx.connection.dialect.name == "sqlite" and (alone := foreign_key_violations(ctx.connection)):
            raise MigrationError(f"{step.up_revision_id} would violate foreign keys: {', '.join(alone)}")
        now = time.monotonic()
        _logger.info("%s done in %.2f s", step.up_revision_id or "stamp", now - self._since)
        self._since = now


async def _with_connection(engine: AsyncEngine, work: Callable[[Connection], None]) -> None:
    try:
        async with engine.connect() as connection:
            await connection.run_sync(work)
    finally:
        await engine.dispose()


def _finish(work: Any) -> None:
    """Run the coroutine to its end; in a new thread if this thread has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, work).result()
