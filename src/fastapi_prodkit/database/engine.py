"""Create the engine for a URL and its settings."""

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL, AsyncAdaptedQueuePool, Connection, ExceptionContext, event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fastapi_prodkit import _extras
from fastapi_prodkit.database.cached_statements import retry_outdated_statements
from fastapi_prodkit.database.passwords import PasswordProvider, password_provider
from fastapi_prodkit.database.pool import BoundedPool, check_idle_connections
from fastapi_prodkit.database.session_state import reset_session_state
from fastapi_prodkit.database.sizing import warn_if_pools_exceed_server
from fastapi_prodkit.database.tls import ssl_context, stricter
from fastapi_prodkit.database.url import POSTGRESQL, is_in_memory, parameters, parse, read_options, read_seconds
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["create_engine"]

# How often the server checks whether the client of a running query is still connected: one system call each time.
_CHECK_INTERVAL = "1s"

# Keys of `Connection.info`, for SQLite.
_WROTE = "fastapi_prodkit.wrote"  # whether a transaction was open before the latest statement
_LOST = "fastapi_prodkit.lost"  # whether a statement has ended the transaction

# With a pooler each transaction may run on another server connection, where earlier prepared statements do not exist.
_POOLERS: Mapping[str | None, Mapping[str, int]] = {
    None: {},
    "pgbouncer": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


def create_engine(settings: DatabaseSettings, *, password: PasswordProvider | None = None) -> AsyncEngine:
    """Return an engine; it connects on first use.

    Args:
        settings: How to reach the database.
        password: Provider of the password, called for each new PostgreSQL connection; replaces that of the settings.

    Raises:
        ConfigurationError: The URL or the CA file cannot be used. The message does not repeat the URL.
        MissingExtraError: The driver of the URL is not installed.
    """
    try:
        url = parse(settings.url.get_secret_value())
        return _postgresql(url, settings, password) if url.drivername in POSTGRESQL else _sqlite(url, settings)
    except ConfigurationError as error:
        problem = str(error)
    others = ("read_url", "migrations_url")
    name = next((name for name in others if getattr(settings, name) is settings.url), "url")
    raise ConfigurationError(problem.replace("DATABASE_URL", f"DATABASE_{name.upper()}"))


def _postgresql(url: URL, settings: DatabaseSettings, password: PasswordProvider | None) -> AsyncEngine:
    _extras.require("asyncpg", extra="database")
    plain, asked = parameters(url)
    provider = password or password_provider(url, settings)
    engine = create_async_engine(
        plain,
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout,
        pool_recycle=settings.pool_recycle,
        poolclass=BoundedPool,
        hide_parameters=True,
        connect_args=_connect_args(asked, settings, provider),
    )
    event.listen(engine.sync_engine, "handle_error", _hide_detail)
    retry_outdated_statements(engine)
    _detect_dead_server(engine, settings)
    if settings.pooler is None:  # a pooler's connections are not server sessions
        warn_if_pools_exceed_server(engine, settings)
        reset_session_state(engine, settings.pool_timeout / 2)
    return engine


def _detect_dead_server(engine: AsyncEngine, settings: DatabaseSettings) -> None:
    """Detect a dead or silent server within half the pool time-out; the other half is for a new connection."""
    from fastapi_prodkit.database.cancellation import set_close_timeout  # noqa: PLC0415 - it needs asyncpg

    set_close_timeout(engine, settings.pool_timeout / 2)
    check_idle_connections(engine, settings.pool_timeout / 2)


def _connect_args(
    asked: Mapping[str, str], settings: DatabaseSettings, password: PasswordProvider | None
) -> dict[str, Any]:
    from fastapi_prodkit.database.cancellation import CancellableConnection  # noqa: PLC0415 - it needs asyncpg
    from fastapi_prodkit.database.connecting import Connector  # noqa: PLC0415 - it needs asyncpg

    mode = stricter(settings.ssl, *(asked[name] for name in ("sslmode", "ssl") if name in asked))
    sessions = {name: asked[name] for name in ("target_session_attrs",) if name in asked}
    return {
        **sessions,
        **_POOLERS[settings.pooler],
        "ssl": ssl_context(mode, asked.get("sslrootcert", settings.ssl_root_cert)),
        "timeout": read_seconds(asked["connect_timeout"]) if "connect_timeout" in asked else settings.connect_timeout,
        "command_timeout": settings.command_timeout,
        "server_settings": _server_settings(asked, settings),
        "connection_class": CancellableConnection,
        "async_creator_fn": Connector(password),
    }


def _server_settings(asked: Mapping[str, str], settings: DatabaseSettings) -> dict[str, str]:
    """Return the settings of each new server session; a pooler shares sessions and accepts only a name."""
    named = {"application_name": asked["application_name"]} if "application_name" in asked else {}
    options = read_options(asked.get("options", ""))
    if settings.pooler is not None:
        if options:
            raise ConfigurationError(
                "DATABASE_URL: a pooler refuses `options`; set them for the role: ALTER ROLE ... SET"
            )
        return named
    times = {
        "statement_timeout": settings.statement_timeout,
        "lock_timeout": settings.lock_timeout,
        "idle_in_transaction_session_timeout": settings.idle_transaction_timeout,
    }
    # Rounded up, because 0 would mean no time-out.
    milliseconds = {name: str(math.ceil(seconds * 1000)) for name, seconds in times.items() if seconds is not None}
    return {**milliseconds, "client_connection_check_interval": _CHECK_INTERVAL, **named, **options}


def _sqlite(url: URL, settings: DatabaseSettings) -> AsyncEngine:
    _extras.require("aiosqlite", extra="database")
    if url.host or url.username or url.password:
        raise ConfigurationError("DATABASE_URL: a SQLite file is sqlite:///relative.db or sqlite:////absolute.db")
    # A database in memory exists as long as its only connection. Sessions use it one after another; if they shared it,
    # SQLAlchemy's default, a rollback of one session would undo writes of another.
    in_memory = is_in_memory(url)
    engine = create_async_engine(
        url.set(drivername="sqlite+aiosqlite"),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1 if in_memory else settings.pool_size,
        max_overflow=0 if in_memory else settings.max_overflow,
        pool_timeout=settings.pool_timeout,
        hide_parameters=True,
        connect_args={"timeout": settings.command_timeout},  # longest wait for another writer, seconds
    )
    event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
    event.listen(engine.sync_engine, "savepoint", _begin_before_savepoint)
    _notice_lost_transactions(engine)
    return engine


def _hide_detail(context: ExceptionContext) -> None:
    """Remove PostgreSQL's DETAIL, which quotes the row, from tracebacks; it stays in `error.orig.detail`."""
    error: Any = context.original_exception
    driver_error: Any = error.__cause__
    detail = getattr(driver_error, "detail", None)
    if detail is None:
        return
    error.detail, driver_error.detail = detail, None
    copies = filter(None, (error, context.sqlalchemy_exception))  # SQLAlchemy 2.0 copies the text into both
    for each in copies:
        each.args = (str(each.args[0]).replace(f"\nDETAIL:  {detail}", ""), *each.args[1:])


def _enforce_foreign_keys(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_before_savepoint(connection: Connection, _name: str) -> None:
    """Begin a transaction before a savepoint: without one, SQLite commits when the savepoint is released."""
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN")


def _notice_lost_transactions(engine: AsyncEngine) -> None:
    """Refuse to commit if a statement has ended the transaction, or has failed so that SQLite rolled it back.

    SQLite rolls back for ON CONFLICT ROLLBACK, RAISE(ROLLBACK), a full disk and similar errors. Later statements then
    run in a new transaction, and COMMIT would save only those.
    """

    def in_transaction(connection: Connection) -> bool:
        driver: Any = connection.connection.driver_connection
        return bool(driver.in_transaction) and driver.isolation_level is not None  # None is AUTOCOMMIT

    def before(connection: Connection, *_: object) -> None:
        connection.info[_WROTE] = in_transaction(connection)

    def after(connection: Connection | None, *_: object) -> None:
        if connection is not None and connection.info.get(_WROTE) and not in_transaction(connection):
            connection.info[_LOST] = True

    def ended(connection: Connection) -> None:
        if connection.info.pop(_LOST, False):
            raise PendingRollbackError("COMMIT would save a part only: a statement has ended the transaction")

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "after_cursor_execute", after)
    event.listen(engine.sync_engine, "handle_error", lambda context: after(context.connection))
    event.listen(engine.sync_engine, "commit", ended)
    event.listen(engine.sync_engine, "rollback", lambda connection: connection.info.pop(_LOST, None))
