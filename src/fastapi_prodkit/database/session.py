"""The database of an app, and the session of a request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.requests import HTTPConnection

from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["Database", "SessionDep", "get_session"]


class Database:
    """Hold the connection pool of one database and open sessions on it.

    Nothing connects before the first statement, so neither construction nor start-up needs the database to be up.
    A session's objects stay readable after the commit, and a closed session refuses further work: it would otherwise
    take another connection, which nobody gives back.

    Attributes:
        engine: SQLAlchemy's engine.
        sessionmaker: Makes sessions that neither commit nor close by themselves; `session` is the one that does.

    Raises:
        ConfigurationError: The URL or the CA file cannot be used. The message does not repeat the URL.
        MissingExtraError: The driver of the URL is not installed.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self.engine = create_engine(settings)
        self.sessionmaker = async_sessionmaker(self.engine, expire_on_commit=False, close_resets_only=False)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a session for a job, a script or a background task: commit at the end, roll back on any exception."""
        async with self.sessionmaker() as session:
            yield session
            await session.commit()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Close every connection at shutdown: `FastAPI(lifespan=database.lifespan)`."""
        try:
            yield
        finally:
            await self.engine.dispose()

    async def check(self) -> None:
        """Raise unless the database answers; for readiness, within the pool, connect and command time-outs."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))


async def get_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Open the session of the request; `app.dependency_overrides[get_session]` replaces it in tests.

    Raises:
        ConfigurationError: The app has no database.
    """
    async with _database(connection).session() as session:
        yield session


# The scope decides when the commit happens: "function" is after the handler and before the response is sent.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


def _database(connection: HTTPConnection) -> Database:
    pieces = connection.scope.get("fastapi_prodkit", {})
    database: Database | None = pieces.get("database") or getattr(connection.app.state, "database", None)
    if database is None:
        raise ConfigurationError(
            "the app has no database: set DATABASE_URL for create_app, or app.state.database = Database(...)"
        )
    return database
