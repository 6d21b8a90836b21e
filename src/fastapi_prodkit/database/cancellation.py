"""A connection to PostgreSQL on which a cancelled query really ends, and which does not wait for a silent server.

asyncpg ends a cancelled query as PostgreSQL wants it: with a cancel request on a connection of its own. That takes a
moment, during which SQLAlchemy waits in `close()`. A second cancellation, and an anyio cancel scope repeats its own
until the task has left it, ends this wait and makes SQLAlchemy call `terminate()`, which stops the cancel request as
well: the query then runs on in PostgreSQL, with nobody to read its result, for as long as it takes.

asyncpg ignores a cancellation that arrives while it sends the rows of an `executemany`: it goes on to wait, until the
command time-out, for an answer that PostgreSQL gives only once it has all rows.

PostgreSQL rolls a transaction back whose statement has failed, and says so only in its answer to COMMIT: no error, but
the tag ROLLBACK, which asyncpg does not read. Where there is no transaction, because a statement of the program's has
ended it, the answer to COMMIT is a warning.

asyncpg refuses COMMIT and ROLLBACK while another task runs a statement on the connection. SQLAlchemy then keeps the
connection until it is collected as garbage, or takes it back into the pool, open and in its transaction.
"""

import asyncio
from asyncio import CancelledError, Future
from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no annotations for us
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.database.session_state import RESET, leaves_state

__all__ = ["CancellableConnection", "set_close_timeout"]

# PostgreSQL answers these at once, whatever the tables are like and whoever locks them; not COMMIT, which may check
# deferred constraints and wait for a replica.
_ANSWERED_AT_ONCE = ("BEGIN", "ROLLBACK")
_COMMIT, _END_OF_TRANSACTION = "COMMIT;", ("COMMIT;", "ROLLBACK;")  # in asyncpg's words
_ABORTED = "COMMIT saved nothing: the transaction was aborted by a statement that had failed"
_ENDED = "there is no transaction to commit: a statement has ended it; use the session's commit() and rollback()"


class CancellableConnection(asyncpg.Connection):  # type: ignore[misc]  # likewise
    """Let a close that has begun end by itself, within its own time; pass it to asyncpg as `connection_class`.

    Attributes:
        close_timeout: Longest wait for the answer to BEGIN and ROLLBACK and for a close, seconds.
        has_session_state: Whether a statement that leaves something in the server's session was prepared or executed.
        closed_here: Whether this process has begun to close it; what then goes wrong on it is no fault of the server's.
        needs_reset: Whether something may have been left in the server's session since the connection was obtained.
    """

    close_timeout = 2.0  # what SQLAlchemy gives a close
    has_session_state = False
    closed_here = False
    needs_reset = False
    _closing = False

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's signature
        """Cancel what is running and take leave of the server; drop the connection if that takes too long."""
        self._closing = self.closed_here = True
        try:
            await super().close(timeout=min(timeout or self.close_timeout, self.close_timeout))
        finally:
            self._closing = False

    def terminate(self) -> None:
        """Drop the connection, unless it is being closed: then its cancel request is on the way."""
        self.closed_here = True
        if not self._closing:
            super().terminate()

    async def prepare(self, query: str, **options: Any) -> Any:
        """Prepare a statement; SQLAlchemy does so for all but those that begin and end transactions."""
        self.has_session_state = self.has_session_state or leaves_state(query)
        return await super().prepare(query, **options)

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
        """Execute a script; SQLAlchemy does so only to begin and end transactions, a `connect` listener for its own.

        COMMIT and ROLLBACK close a connection that is busy with a statement of another task: the server ends both.

        Raises:
            asyncpg.InFailedSQLTransactionError: PostgreSQL has answered COMMIT with ROLLBACK.
            asyncpg.NoActiveSQLTransactionError: There is no transaction to commit.
        """
        if query.startswith(_ANSWERED_AT_ONCE):
            timeout = self.close_timeout if timeout is None else timeout
        elif query != _COMMIT:
            self.has_session_state = self.has_session_state or leaves_state(query) or ";" in query
        elif not (self.is_in_transaction() or self.is_closed()):
            raise asyncpg.NoActiveSQLTransactionError(_ENDED)
        try:
            status: str = await super().execute(query, *args, timeout=timeout)
        except asyncpg.InterfaceError:
            if self.is_closed() or query not in _END_OF_TRANSACTION:
                raise
            await self.close()
            if query == _COMMIT:
                raise
            return "ROLLBACK"
        if status == "ROLLBACK" and query == _COMMIT:
            raise asyncpg.InFailedSQLTransactionError(_ABORTED)
        return status

    def get_reset_query(self) -> str:
        """Return what `reset` executes."""
        return RESET

    async def executemany(
        self,
        command: str,
        args: Iterable[Sequence[object]],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - asyncpg's
    ) -> None:
        """Execute a statement for each row; a cancellation is raised at once, and SQLAlchemy closes the connection."""
        executing = asyncio.ensure_future(super().executemany(command, args, timeout=timeout))
        try:
            await asyncio.shield(executing)
        except CancelledError:
            executing.add_done_callback(_ignore_outcome)
            executing.cancel()  # whether or not asyncpg ignores this, `close` ends what it waits for
            raise


def _ignore_outcome(executing: "Future[None]") -> None:
    """Take the exception of a cancelled `executemany`, which asyncio would log as never retrieved."""
    if not executing.cancelled():
        executing.exception()


def set_close_timeout(engine: AsyncEngine, seconds: float) -> None:
    """Set the close time-out of each connection that the engine makes."""

    def connected(connection: Any, _record: object) -> None:
        connection.driver_connection.close_timeout = seconds

    event.listen(engine.sync_engine, "connect", connected)
