"""A PostgreSQL connection that stops cancelled queries in the server, and never waits long for a silent server.

asyncpg stops a cancelled query by PostgreSQL's protocol: it sends a cancel request on a second connection. Meanwhile
SQLAlchemy waits in `close()`. A second cancellation interrupts this wait; an anyio cancel scope repeats its
cancellation until the task has left the scope. SQLAlchemy then calls `terminate()`, which also stops the cancel
request, so the query keeps running in PostgreSQL although nothing will read its result.

asyncpg ignores a cancellation that arrives while it sends the rows of an `executemany`. It then waits until the command
time-out for an answer, which PostgreSQL sends only after the last row.

If a statement of a transaction has failed, PostgreSQL rolls back on COMMIT and reports no error: the command tag of its
answer is ROLLBACK, which asyncpg does not read. If a statement of the app has already ended the transaction, the answer
to COMMIT is a warning.

asyncpg refuses COMMIT and ROLLBACK while another task runs a statement on the connection. SQLAlchemy then keeps the
connection until it is garbage collected, or returns it to the pool with its transaction open.
"""

import asyncio
from asyncio import CancelledError, Event, Future
from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no annotations for us
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.database.session_state import RESET, leaves_state

__all__ = ["CancellableConnection", "set_close_timeout"]

# Commands that PostgreSQL answers at once, independent of tables and locks. COMMIT is not among them: it may check
# deferred constraints and wait for a replica.
_ANSWERED_AT_ONCE = ("BEGIN", "ROLLBACK")
_COMMIT, _END_OF_TRANSACTION = "COMMIT;", ("COMMIT;", "ROLLBACK;")  # as asyncpg writes them
_ABORTED = "COMMIT saved nothing: a failed statement has aborted the transaction"
_ENDED = "there is no transaction to commit: a statement has ended it; use the session's commit() and rollback()"


class CancellableConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection whose `close` is never interrupted, but has a time-out; pass it to asyncpg as `connection_class`.

    Attributes:
        close_timeout: Time-out of BEGIN, of ROLLBACK and of a close, seconds.
        has_session_state: Whether a statement that changes the state of the server's session was prepared or executed.
        closed_here: Whether this process has begun to close it; later errors are not the server's fault.
        needs_reset: Whether the state of the server's session may have changed since the checkout.
        was_aborted: Whether a close has failed, so that the connection was aborted.
    """

    close_timeout = 2.0  # SQLAlchemy's own time-out of a close
    has_session_state = False
    closed_here = False
    needs_reset = False
    was_aborted = False
    _closing = False
    _closed: Event | None = None  # whether the first `close` has ended; None before it

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's signature
        """Cancel the running statement and close the connection; abort the connection after the time-out.

        A failed close raises nothing: SQLAlchemy may no longer wait for it, and asyncio would log the exception.

        A second caller waits for the first. Two tasks of one session may both let the pool close the connection, and
        the pool clears the connection's place when `close` returns. The first to return frees this place for another
        request, which would lose its connection when the other returns later.
        """
        if self._closed is not None:
            await self._closed.wait()
            return
        self._closed = Event()
        try:
            await self._close(timeout or self.close_timeout)
        finally:
            self._closed.set()

    async def _close(self, seconds: float) -> None:
        self._closing = self.closed_here = True
        try:
            await super().close(timeout=min(seconds, self.close_timeout))
        except (OSError, asyncpg.PostgresError):  # a TimeoutError is an OSError; asyncpg has aborted the connection
            self.was_aborted = True
        finally:
            self._closing = False

    def terminate(self) -> None:
        """Abort the connection, unless `close` is running: its cancel request must not be stopped."""
        self.closed_here = True
        if not self._closing:
            super().terminate()

    async def prepare(self, query: str, **options: Any) -> Any:
        """Prepare a statement; SQLAlchemy prepares all statements except those that begin and end transactions."""
        self.has_session_state = self.has_session_state or leaves_state(query)
        return await super().prepare(query, **options)

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
        """Execute a script: SQLAlchemy begins and ends transactions by it, and a `connect` listener may use it.

        If another task runs a statement on the connection, COMMIT and ROLLBACK close it, and the server rolls back.

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
            await self._close(self.close_timeout)
            if query == _COMMIT:
                raise
            return "ROLLBACK"
        if status == "ROLLBACK" and query == _COMMIT:
            raise asyncpg.InFailedSQLTransactionError(_ABORTED)
        return status

    def get_reset_query(self) -> str:
        """Return the SQL that `reset` executes."""
        return RESET

    async def executemany(
        self,
        command: str,
        args: Iterable[Sequence[object]],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - asyncpg's
    ) -> None:
        """Execute a statement for each row. A cancellation is raised at once; SQLAlchemy then closes the connection."""
        executing = asyncio.ensure_future(super().executemany(command, args, timeout=timeout))
        try:
            await asyncio.shield(executing)
        except CancelledError:
            executing.add_done_callback(_ignore_outcome)
            executing.cancel()  # even if asyncpg ignores this, `close` ends its wait
            raise


def _ignore_outcome(executing: "Future[None]") -> None:
    """Retrieve the exception of a cancelled `executemany`, so that asyncio does not log it."""
    if not executing.cancelled():
        executing.exception()


def set_close_timeout(engine: AsyncEngine, seconds: float) -> None:
    """Set the close time-out of each connection that the engine makes."""

    def connected(connection: Any, _record: object) -> None:
        connection.driver_connection.close_timeout = seconds

    event.listen(engine.sync_engine, "connect", connected)
