"""Let the read session of a request use the connection of its write session.

Without a replica both sessions use the primary's pool. If each took a connection, many concurrent requests could hold
one connection each and wait for a second one until the pool time-out: a deadlock. So the read session joins the
transaction of the write session as soon as the request has one.
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

# Writing keywords at the start of a statement, of a common table expression, or of the statement after it.
_WRITES = re.compile(
    r"(?:^|[();])\s*(?:INSERT|UPDATE|DELETE|MERGE|COPY|CREATE|ALTER|DROP|TRUNCATE|GRANT|REVOKE)\s", re.IGNORECASE
)


class _JoiningSyncSession(Session):
    """A session that reads on the connection of a write session, if there is one, and never ends its transaction."""

    _joined: Connection | None = None

    def get_bind(
        self, mapper: Any = None, *, clause: ClauseElement | None = None, **others: Any
    ) -> Engine | Connection:
        """Return the connection of the write session, or the engine if there is no write session.

        Raises:
            InvalidRequestError: The statement appears to write. In this session's own read-only transaction, PostgreSQL
                would refuse it.
        """
        writer: AsyncSession | None = self.info.get(_WRITER)
        if writer is None:
            return super().get_bind(mapper, clause=clause, **others)
        if _writes(mapper, clause):
            raise InvalidRequestError("the session for reading cannot write: use the session for writing")
        connection = writer.sync_session.connection()
        if connection is not self._joined:
            if self._joined is not None:
                self.commit()  # releases a connection whose transaction the write session has ended
            self._joined = connection
        return connection

    def rollback(self) -> None:
        """Roll back this session's own transaction, but never that of the write session."""
        if self._joined is None:
            super().rollback()
        else:
            self.commit()


class JoiningSession(ClosingSession):
    """The read session of a request if there is no replica."""

    sync_session_class = _JoiningSyncSession


def announce_reading(scope: MutableMapping[str, Any], reader: AsyncSession) -> None:
    """Register the read session of a request, so that it joins the write session, present or future."""
    scope[_scope.READ_SESSION] = reader
    reader.info[_WRITER] = scope.get(_scope.SESSION)


async def announce_writing(scope: MutableMapping[str, Any], writer: AsyncSession) -> None:
    """Register the write session; the read session returns its connection to the pool, then joins this one."""
    scope[_scope.SESSION] = writer
    reader: AsyncSession | None = scope.get(_scope.READ_SESSION)
    if reader is not None:
        await reader.commit()
        reader.info[_WRITER] = writer


def _writes(mapper: Any, clause: ClauseElement | None) -> bool:
    if clause is None:
        return mapper is not None  # True for a flush; a plain request for a connection has no mapper
    if isinstance(clause, TextClause):
        return _WRITES.search(clause.text) is not None
    return isinstance(clause, UpdateBase | ExecutableDDLElement)
