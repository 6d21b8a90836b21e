"""Retry prepared statements that a migration has made invalid.

After `ALTER TABLE ... ALTER COLUMN ... TYPE`, or after a type is dropped and created again, PostgreSQL refuses to
execute statements that were prepared before, and aborts the transaction. SQLAlchemy then discards the prepared
statements of all connections, but raises the error.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["is_outdated", "retry_outdated_statements"]


def is_outdated(error: BaseException | None) -> bool:
    """Return whether the error means that a prepared statement was made for an older schema; it had no effect."""
    driver = getattr(error, "__cause__", None)
    # The second is an internal error of the server, for a dropped type. The server does not translate such messages.
    return type(driver).__name__ == "InvalidCachedStatementError" or "cache lookup failed for type" in str(driver)


def retry_outdated_statements(engine: AsyncEngine) -> None:
    """Prepare and execute an invalid statement again if it is the first of its transaction, so nothing else was undone.

    Args:
        engine: An engine that uses asyncpg.
    """
    for name in ("do_execute", "do_executemany"):
        event.listen(engine.sync_engine, name, _retrying(name))


def _retrying(name: str) -> Callable[..., bool]:
    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        connection = context.root_connection.connection
        is_first = not connection.dbapi_connection.driver_connection.is_in_transaction()
        execute = getattr(context.dialect, name)
        try:
            execute(cursor, statement, parameters, context)
        except context.dialect.loaded_dbapi.Error as error:
            if not is_first or not is_outdated(error):
                raise
            connection.rollback()
            context.handle_dbapi_exception(error)  # discards the prepared statements, as SQLAlchemy does
            context.pre_exec()  # makes the cursor prepare again
            execute(cursor, statement, parameters, context)
        return True

    return execute
