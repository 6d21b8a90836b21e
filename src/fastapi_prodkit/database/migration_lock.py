"""Run one migration at a time, by an advisory lock in PostgreSQL and by BEGIN IMMEDIATE in SQLite."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.exceptions import MigrationError

__all__ = ["LOCK", "MigrationLock", "exclude_other_writers", "foreign_key_violations"]

LOCK = 5_208_119_736_012  # key of the advisory lock; a maintenance script can lock it as well

_BETWEEN_ATTEMPTS = 0.25  # seconds

_logger = logging.getLogger(__name__)


class MigrationLock:
    """Hold PostgreSQL's advisory lock while migrations run; does nothing for other databases.

    The lock is acquired by polling, each attempt in a separate transaction. A process that waited inside
    `pg_advisory_lock()` would hold a snapshot, and CREATE INDEX CONCURRENTLY waits for every older snapshot: the
    migration and the waiting process would wait for each other, and PostgreSQL does not detect this deadlock.

    The lock belongs to the session, not to the transaction, because `transaction_per_migration` and
    `autocommit_block()` commit between revisions. The same session runs the migrations, so both end together.

    Through a pooler that assigns connections per transaction, a session lock would remain on one of the pooler's
    connections. There the lock belongs to the transaction.

    Args:
        connection: The connection of the migrations. If the caller has begun a transaction, the lock belongs to this
            transaction.
        timeout: Longest wait for another process, seconds.
        pooled: Whether a pooler is between this process and the server.
    """

    def __init__(self, connection: Connection, timeout: float, *, pooled: bool = False) -> None:
        self._connection = connection
        self._timeout = timeout
        self._applies = connection.dialect.name == "postgresql"
        self._by: Literal["session", "transaction"] = (
            "transaction" if pooled or connection.in_transaction() else "session"
        )

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the lock of the session around all transactions.

        Raises:
            MigrationError: Another process still holds it after the time-out.
        """
        if not self._applies or self._by == "transaction":
            yield
            return
        self._acquire("select pg_try_advisory_lock(:key)")
        try:
            yield
        finally:
            # If the connection is lost, so is the lock, and the first error tells the reason.
            with suppress(DBAPIError, OSError):
                self._connection.rollback()
                self._query("select pg_advisory_unlock(:key)")

    def transaction(self) -> None:
        """Acquire the lock for the current transaction, if the session cannot hold it."""
        if self._applies and self._by == "transaction" and self._connection.in_transaction():
            self._acquire("select pg_try_advisory_xact_lock(:key)")

    def _acquire(self, statement: str) -> None:
        deadline = time.monotonic() + self._timeout
        waiting = False
        while not self._query(statement):
            if time.monotonic() >= deadline:
                raise MigrationError(
                    f"another process is migrating this database and did not end within {self._timeout:g} s; "
                    "see pg_locks with locktype = 'advisory'"
                )
            if not waiting:
                waiting = True
                _logger.warning("another process is migrating this database: waiting up to %g s", self._timeout)
            time.sleep(_BETWEEN_ATTEMPTS)

    def _query(self, statement: str) -> bool:
        inside = self._connection.in_transaction()
        answer = bool(self._connection.execute(text(statement), {"key": LOCK}).scalar_one())
        if not inside:
            self._connection.commit()
        return answer


def exclude_other_writers(connection: Connection) -> None:
    """Make SQLite begin each transaction with BEGIN IMMEDIATE, so that other writers wait and DDL is rolled back.

    Python's driver does not begin a transaction before DDL, so a migration that fails would be applied partially.
    """
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def foreign_key_violations(connection: Connection) -> list[str]:
    """Return tables whose rows violate a foreign key; enforcement is off while tables are rebuilt."""
    rows = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return sorted({f"{table} -> {parent}" for table, _, parent, _ in rows})
