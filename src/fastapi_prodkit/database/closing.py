"""A session that always returns its connection to the pool, even if another task is using the session.

SQLAlchemy's session is for one task. If two tasks share a session, as in `asyncio.gather(session.scalar(a),
session.scalar(b))`, the first error ends the handler while the other task continues. Closing the session fails if that
task is obtaining a connection at this moment, and the connection would never be returned.
"""

from sqlalchemy import Connection, event
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["ClosingSession"]


class ClosingSession(AsyncSession):
    """A session that closes even while another task obtains a connection: that task returns it, and gets an error.

    If another task runs a statement, the connection is closed; see `cancellation.CancellableConnection`.

    Attributes:
        is_closed: Whether the session was closed.
        closed_idle: Whether it was closed with nothing left to commit.
    """

    is_closed = closed_idle = False

    async def close(self) -> None:
        """Roll back, return the connection to the pool, and refuse further work."""
        if not self.is_closed:
            self.is_closed, self.closed_idle = True, not self.in_transaction()
        try:
            await super().close()
        except IllegalStateChangeError:
            event.listen(self.sync_session, "after_begin", _return_connection)


def _return_connection(_session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    connection.close()
    raise InvalidRequestError("the session was closed while another task used it: use another session in each task")
