"""Statements that the driver has prepared for a schema which a migration has changed since.

After `ALTER TABLE ... ALTER COLUMN ... TYPE`, or where a type is dropped and made anew, PostgreSQL refuses the next
execution of what was prepared before, and aborts the transaction. SQLAlchemy then prepares everything again, on all
connections, but raises the error.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["is_outdated", "retry_outdated_statements"]


def is_outdated(error: BaseException | None) -> bool:
    """Tell whether a driver's exception says that a statement was prepared for another schema; it did nothing then."""
    driver = getattr(error, "__cause__", None)
    # The second is an internal error of the server, of a type that was dropped; such messages are not translated.
    return type(driver).__name__ == "InvalidCachedStatementError" or "cache lookup failed for type" in str(driver)


def retry_outdated_statements(engine: AsyncEngine) -> None:
    """Prepare and execute such a statement again where it is the first of its transaction, so that nothing is undone.

    Args:
        engine: An engine of asyncpg's.
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
            context.handle_dbapi_exception(error)  # forgets what was prepared, as SQLAlchemy does
            context.pre_exec()  # tells the cursor so
            execute(cursor, statement, parameters, context)
        return True

    return execute
