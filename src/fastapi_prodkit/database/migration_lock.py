"""One migration at a time: an advisory lock of PostgreSQL, and a write transaction from the start on SQLite."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.exceptions import MigrationError

__all__ = ["LOCK", "MigrationLock", "exclude_other_writers", "foreign_key_violations"]

LOCK = 5_208_119_736_012  # the key, for `select pg_advisory_lock(...)` in a maintenance script; no program shares it

_BETWEEN_ATTEMPTS = 0.25  # seconds

_logger = logging.getLogger(__name__)


class MigrationLock:
    """Hold PostgreSQL's advisory lock while migrations run; nothing on other databases.

    It is taken by asking again and again, and each question is a transaction of its own. A process that waited inside
    `pg_advisory_lock()` would hold a snapshot, and CREATE INDEX CONCURRENTLY waits for every older snapshot to end: the
    migration would wait for the process that waits for the migration, and PostgreSQL would see no deadlock in that.

    The session holds it, not the transaction, because `transaction_per_migration` and `autocommit_block()` commit in
    between. It is the session of the migrations themselves: one cannot end without the other.

    A pooler that hands out connections by transaction breaks that: the lock would stay behind on a connection of the
    pooler's. There the transaction holds it, as long as it lasts.

    Args:
        connection: The connection of the migrations. In a transaction that somebody else has begun, and ends, the lock
            belongs to that.
        timeout: Longest wait for another process, seconds.
        pooled: A pooler is in between.
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
        """Hold the lock around all transactions.

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
            # A connection that is lost has lost its lock as well, and what went wrong is told by the first error.
            with suppress(DBAPIError, OSError):
                self._connection.rollback()
                self._ask("select pg_advisory_unlock(:key)")

    def transaction(self) -> None:
        """Take the lock inside the transaction that has begun, where the session cannot hold it."""
        if self._applies and self._by == "transaction" and self._connection.in_transaction():
            self._acquire("select pg_try_advisory_xact_lock(:key)")

    def _acquire(self, statement: str) -> None:
        deadline = time.monotonic() + self._timeout
        waiting = False
        while not self._ask(statement):
            if time.monotonic() >= deadline:
                raise MigrationError(
                    f"another process is migrating this database and did not end within {self._timeout:g} s; "
                    "see pg_locks with locktype = 'advisory'"
                )
            if not waiting:
                waiting = True
                _logger.warning("another process is migrating this database: waiting up to %g s", self._timeout)
            time.sleep(_BETWEEN_ATTEMPTS)

    def _ask(self, statement: str) -> bool:
        inside = self._connection.in_transaction()
        answer = bool(self._connection.execute(text(statement), {"key": LOCK}).scalar_one())
        if not inside:
            self._connection.commit()
        return answer


def exclude_other_writers(connection: Connection) -> None:
    """Have SQLite begin each transaction as a writer, so that it contains the DDL and others wait their turn.

    Python's driver begins none before DDL by itself, and a migration that fails half-way would stay half-way.
    """
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def foreign_key_violations(connection: Connection) -> list[str]:
    """Return the tables with rows that refer to nothing; SQLite did not watch while tables were rebuilt."""
    rows = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return sorted({f"{table} -> {parent}" for table, _, parent, _ in rows})
