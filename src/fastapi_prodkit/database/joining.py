"""Two sessions of one request, for writing and for reading, on one connection.

Without a replica both use the primary's pool. If each took a connection, as many requests as the pool has connections
could hold one each and wait for the other, all of them until the pool time-out. So the session for reading joins the
transaction of the session for writing, as soon as the request has one.
"""

import re
from collections.abc import MutableMapping
from typing import Any

from sqlalchemy import ClauseElement, Connection, Engine, TextClause, UpdateBase
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.schema import ExecutableDDLElement

from fastapi_prodkit import _scope
from fastapi_prodkit.database.closing import ClosingSession

__all__ = ["JoiningSession", "announce_reading", "announce_writing"]

_WRITER = "fastapi_prodkit.writer"

# At the start of a statement, of a common table expression, or of what follows one.
_WRITES = re.compile(
    r"(?:^|[();])\s*(?:INSERT|UPDATE|DELETE|MERGE|COPY|CREATE|ALTER|DROP|TRUNCATE|GRANT|REVOKE)\s", re.IGNORECASE
)


class _JoiningSyncSession(Session):
    """A session that reads on the connection of another one, if there is one, and leaves its transaction to it."""

    _joined: Connection | None = None

    def get_bind(
        self, mapper: Any = None, *, clause: ClauseElement | None = None, **others: Any
    ) -> Engine | Connection:
        """Return what the statement runs on: the connection of the session for writing, or the engine without one.

        Raises:
            InvalidRequestError: The statement writes, as far as can be seen. PostgreSQL would refuse it in a
                transaction of this session's own, which is read only.
        """
        writer: AsyncSession | None = self.info.get(_WRITER)
        if writer is None:
            return super().get_bind(mapper, clause=clause, **others)
        if _writes(mapper, clause):
            raise InvalidRequestError("the session for reading writes nothing: use the session for writing")
        connection = writer.sync_session.connection()
        if connection is not self._joined:
            if self._joined is not None:
                self.commit()  # that is, let go of a connection whose transaction the other session has ended
            self._joined = connection
        return connection

    def rollback(self) -> None:
        """Roll back, but leave alone a transaction that is the other session's."""
        if self._joined is None:
            super().rollback()
        else:
            self.commit()


class JoiningSession(ClosingSession):
    """The session for reading of a request without a replica."""

    sync_session_class = _JoiningSyncSession


def announce_reading(scope: MutableMapping[str, Any], reader: AsyncSession) -> None:
    """Let the session for reading join that for writing, if the request has one already or will have one."""
    scope[_scope.READ_SESSION] = reader
    reader.info[_WRITER] = scope.get(_scope.SESSION)


async def announce_writing(scope: MutableMapping[str, Any], writer: AsyncSession) -> None:
    """Let the session for reading join this one; the connection that it has by now goes back to the pool first."""
    scope[_scope.SESSION] = writer
    reader: AsyncSession | None = scope.get(_scope.READ_SESSION)
    if reader is not None:
        await reader.commit()
        reader.info[_WRITER] = writer


def _writes(mapper: Any, clause: ClauseElement | None) -> bool:
    if clause is None:
        return mapper is not None  # a flush; a connection is asked for without a mapper
    if isinstance(clause, TextClause):
        return _WRITES.search(clause.text) is not None
    return isinstance(clause, UpdateBase | ExecutableDDLElement)
