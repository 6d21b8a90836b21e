"""A session that gives its connection back, whatever another task does with it at the moment.

SQLAlchemy's session serves one task. Where two tasks share one, as in `asyncio.gather(session.scalar(a),
session.scalar(b))`, the first error ends the handler while the other task goes on. Closing the session fails then if
that task is about to obtain the connection, which nobody gives back afterwards.
"""

from sqlalchemy import Connection, event
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["ClosingSession"]


class ClosingSession(AsyncSession):
    """Close although another task is obtaining the connection: that task gives the connection back, and fails.

    A statement that another task is running ends with the connection; see `cancellation.CancellableConnection`.

    Attributes:
        is_closed: It was closed.
        closed_idle: It was closed when nothing was left to commit.
    """

    is_closed = closed_idle = False

    async def close(self) -> None:
        """Roll back, give the connection back, and refuse further work."""
        if not self.is_closed:
            self.is_closed, self.closed_idle = True, not self.in_transaction()
        try:
            await super().close()
        except IllegalStateChangeError:
            event.listen(self.sync_session, "after_begin", _give_back)


def _give_back(_session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    connection.close()
    raise InvalidRequestError("the session was closed while another task used it: give each task a session of its own")
