"""Run revisions on PostgreSQL while a service uses the same tables.

While a statement waits for a lock on a table, every later statement on that table waits behind it, even a plain SELECT,
because locks are granted in order. So each statement of a migration waits only briefly for a lock. After this time-out
the transaction of the revision is rolled back, which releases its locks, and the revision runs again after a pause.

A revision that has committed a part of itself, for example by an autocommit block, is not repeated.
"""

import logging
import math
import random
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.exceptions import MigrationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["Steps", "timeouts"]

_LOCK_TIMEOUT, _DEADLOCK = "55P03", "40P01"  # https://www.postgresql.org/docs/current/errcodes-appendix.html

_FIRST_PAUSE = 1.0  # seconds; statements that queued behind the migration run meanwhile
_LONGEST_PAUSE = 30.0  # seconds

_SHOWN = 300  # characters of a statement in a message

# Indexes of partitioned tables are left out: without indexes of their partitions they are INVALID on purpose.
_INVALID_INDEXES = text(
    "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
    "WHERE NOT indisvalid AND relkind = 'i' ORDER BY 1"
)

_logger = logging.getLogger(__name__)


def timeouts(settings: DatabaseSettings) -> tuple[str, str]:
    """Return the statements that set a migration's time-outs: short for locks, none for statements."""
    wait = settings.migrations_statement_lock_timeout
    milliseconds = 0 if wait is None else math.ceil(wait * 1000)
    return f"SET lock_timeout = {milliseconds}", "SET statement_timeout = 0"


class Steps:
    """The revisions of one run; at each attempt Alembic iterates over the remaining ones.

    The revisions are determined once: after one of them is committed, `+1` and `-1` would mean other revisions.

    Args:
        connection: The connection of the migrations.
        find: Function that returns the revisions for the heads of the database; `fn` in Alembic's options.
        settings: The time-outs, and how long a revision is repeated.
        separate: Whether each revision has its own transaction; if not, all revisions share one.
        pooled: Whether a pooler is between: then time-outs are set per transaction.
    """

    def __init__(
        self,
        connection: Connection,
        find: Callable[..., Any],
        settings: DatabaseSettings,
        *,
        separate: bool,
        pooled: bool,
    ) -> None:
        self._connection = connection
        self._find = find
        self._timeouts = timeouts(settings)
        self._retry_for = settings.migrations_retry_for
        self._separate = separate
        self._pooled = pooled
        self._left: list[Any] | None = None
        self._name = "the migration"
        self._transaction: int | None = None  # PostgreSQL's id of the transaction in which the revision begins
        self._repeat_until: float | None = None
        self._failures = 0

    def __call__(self, heads: Any, context: Any) -> Iterator[Any]:
        """Yield the remaining revisions; called by Alembic."""
        self._transaction = None  # the transaction of the previous attempt was rolled back
        if self._left is None:
            self._left = list(self._find(heads, context))
        for step in list(self._left):
            self._name = step.info.up_revision_id or "stamp"
            self._transaction = self._transaction or self._scalar("SELECT txid_current()")
            yield step
            if self._separate:
                self._left.remove(step)
                self._transaction, self._repeat_until, self._failures = None, None, 0

    def run(self, attempt: Callable[[], None]) -> None:
        """Call `attempt`, which runs the remaining revisions, until each one has acquired its locks.

        Raises:
            DBAPIError: A revision failed, and not because of a lock.
            MigrationError: A revision did not get a lock in time, or had already committed a part of itself.
        """
        event.listen(self._connection, "begin", self._set_timeouts)
        while True:
            try:
                attempt()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise
                self._connection.rollback()
                self._refuse_partial(error)
                if _sqlstate(error) not in (_LOCK_TIMEOUT, _DEADLOCK):
                    raise
                pause = self._next_pause(error)
            else:
                self._connection.commit()  # creates the version table, if there was no revision to run
                return
            time.sleep(pause)

    def _set_timeouts(self, connection: Connection) -> None:
        """Set the time-outs in each transaction: a revision may change them, and a rollback reverts them."""
        for statement in self._timeouts:
            if not self._pooled:
                connection.exec_driver_sql(statement)
            elif connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
                connection.exec_driver_sql(statement.replace("SET", "SET LOCAL"))

    def _next_pause(self, error: DBAPIError) -> float:
        """Return the pause before the next attempt in seconds: exponential backoff with jitter.

        Raises:
            MigrationError: The time for attempts is over.
        """
        now = time.monotonic()
        self._repeat_until = self._repeat_until or now + self._retry_for
        if now >= self._repeat_until:
            raise MigrationError(
                f"{self._refusal(error)} It is rolled back. It was tried for {self._retry_for:g} s: look for "
                "transactions that stay open in pg_stat_activity, and run it again."
            ) from error
        longest = min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        pause = min(random.uniform(longest / 2, longest), self._repeat_until - now)  # noqa: S311 - not a secret
        self._failures += 1
        _logger.warning("%s It is rolled back and runs again in %.1f s.", self._refusal(error), pause)
        return pause

    def _refuse_partial(self, error: DBAPIError) -> None:
        """If a part of the revision is committed, log what is left behind, or raise if a lock was the reason."""
        if self._transaction is None or not self._is_committed(self._transaction):
            return
        invalid = list(self._connection.execute(_INVALID_INDEXES).scalars())
        self._connection.rollback()
        drop = "".join(f" The index {name} is INVALID: DROP INDEX CONCURRENTLY {name}." for name in invalid)
        state = (
            f"A part of {self._name} is committed, as an autocommit block does, so it is not repeated.{drop} Undo its "
            "other changes, and run it again"
        )
        if _sqlstate(error) not in (_LOCK_TIMEOUT, _DEADLOCK):
            _logger.warning("%s.", state)
            return
        raise MigrationError(
            f"{self._refusal(error)} {state}, with a longer --statement-lock-timeout if transactions last longer."
        ) from error

    def _is_committed(self, transaction: int) -> bool:
        status = self._scalar("SELECT txid_status(:transaction)", transaction=transaction)
        self._connection.rollback()
        return bool(status == "committed")

    def _refusal(self, error: DBAPIError) -> str:
        reason = "was in a deadlock" if _sqlstate(error) == _DEADLOCK else "did not get a lock in time"
        return f"{self._name} {reason}: {textwrap.shorten(error.statement or 'COMMIT', _SHOWN, placeholder=' ...')}."

    def _scalar(self, statement: str, **parameters: Any) -> Any:
        return self._connection.execute(text(statement), parameters).scalar_one()


def _sqlstate(error: DBAPIError) -> str | None:
    """Return the SQLSTATE; asyncpg and psycopg name the attribute `sqlstate`, psycopg2 `pgcode`."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
