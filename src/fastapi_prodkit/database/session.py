"""The database of an app, and the sessions of a request."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Response
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.requests import HTTPConnection

from fastapi_prodkit import _extras, _scope
from fastapi_prodkit.database.client_errors import CLIENT_ERRORS, checked_statuses
from fastapi_prodkit.database.closing import ClosingSession
from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.database.failure import is_transient, is_unavailable, raise_problem, translate_errors
from fastapi_prodkit.database.joining import JoiningSession, announce_reading, announce_writing
from fastapi_prodkit.database.observation import observe, observe_waits
from fastapi_prodkit.database.passwords import PasswordProvider
from fastapi_prodkit.database.probing import probe
from fastapi_prodkit.database.response_status import expose_response_status
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Database", "ReadSessionDep", "SessionDep", "get_read_session", "get_session"]

_T = TypeVar("_T")
_DISPOSAL = 5.0  # seconds, for closing all connections
_BETWEEN_ATTEMPTS = 0.5  # seconds, between attempts to connect at start-up

_logger = logging.getLogger(__name__)


class Database:
    """Hold the connection pool of one database and open sessions on it.

    It connects at the first statement, so construction and start-up work while the database is down. The objects of a
    session stay readable after the commit. A closed session refuses further work, because it would check out another
    connection that is never returned.

    Attributes:
        engine: SQLAlchemy's engine.
        read_engine: The engine of the replica, or `engine` without a replica; its transactions are read-only.
        sessionmaker: Makes sessions that the caller has to commit and close; `session` does both.
        read_sessionmaker: Makes sessions for reading, which the caller has to close; see `read_session`.
        client_errors: SQLSTATE -> status of errors that the client has caused.

    Args:
        settings: URL, pool, time-outs and the other fields of the section.
        password: Function or coroutine function that returns the password, called for each new connection; replaces
            the settings' password.
        registry: Registry of the metrics. Default: prometheus_client's default registry.
        client_errors: SQLSTATE -> status of errors that count as caused by the client if they end a request.

    Raises:
        ConfigurationError: The URL, the CA file or `client_errors` cannot be used. The message does not repeat the URL.
        MissingExtraError: The driver of the URL is not installed.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        *,
        password: PasswordProvider | None = None,
        registry: "CollectorRegistry | None" = None,
        client_errors: Mapping[str, int] = CLIENT_ERRORS,
    ) -> None:
        self.client_errors = checked_statuses(client_errors)
        self.engine = create_engine(settings, password=password)
        translate_errors(self.engine)
        observe(self.engine.sync_engine, settings, pool="primary", registry=registry)
        replica, pool = self.engine, "primary"
        if settings.read_url is not None:
            replica, pool = (
                create_engine(settings.model_copy(update={"url": settings.read_url}), password=password),
                "replica",
            )
            translate_errors(replica)
            observe(replica.sync_engine, settings, pool=pool, registry=registry)
        self.read_engine = replica.execution_options(postgresql_readonly=True)
        observe_waits(self.read_engine.sync_engine, pool=pool, registry=registry)
        options: dict[str, Any] = {"expire_on_commit": False, "close_resets_only": False}
        reading = JoiningSession if replica is self.engine else ClosingSession
        self.sessionmaker = async_sessionmaker(self.engine, class_=ClosingSession, **options)
        self.read_sessionmaker = async_sessionmaker(
            self.read_engine, class_=reading, join_transaction_mode="rollback_only", **options
        )
        self._startup_timeout = settings.startup_timeout

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a session for a job, a script or a background task: commit at the end, roll back on any exception."""
        async with self.sessionmaker() as session:
            yield session
            await session.commit()

    @asynccontextmanager
    async def read_session(self) -> AsyncIterator[AsyncSession]:
        """Open a session for reading, on the replica if there is one; PostgreSQL refuses writes in it."""
        async with self.read_sessionmaker() as session:
            yield session
            await session.commit()

    async def transact(self, work: Callable[[AsyncSession], Awaitable[_T]], *, attempts: int = 3) -> _T:
        """Run `work` in a new session and commit; repeat it after a transient failure.

        Transient failures are: a serialization failure, a deadlock, a prepared statement that a migration has made
        invalid, and a connection that was refused, or lost before the commit. The failed transaction has had no effect;
        other effects of `work` are repeated.

        Args:
            work: Called with a new session in each attempt. It must not keep objects of an earlier attempt.
            attempts: Maximum number of attempts; the pauses between them grow from 0.1 to 1 second.

        Raises:
            Exception: The exception of the last attempt.
        """
        _extras.require("stamina", extra="database")
        import stamina  # noqa: PLC0415 - on first use

        retries = stamina.retry_context(on=is_transient, attempts=attempts, timeout=None, wait_max=1.0, wait_jitter=0.1)
        async for attempt in retries:
            with attempt:
                async with self.session() as session:
                    result = await work(session)
        return result

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Close every connection at shutdown: `FastAPI(lifespan=database.lifespan)`."""
        try:
            await self._wait_for_the_server()
            yield
        finally:
            await self._dispose()

    async def _dispose(self) -> None:
        try:
            async with asyncio.timeout(_DISPOSAL):
                engines = {engine.sync_engine.pool: engine for engine in (self.engine, self.read_engine)}
                await asyncio.gather(*[engine.dispose() for engine in engines.values()])
        except TimeoutError:
            _logger.warning("connections were not closed in time: the server does not answer")

    async def check(self) -> None:
        """Raise unless the database answers within the pool, connect and command time-outs; for readiness.

        If all connections of the pool are in use, an extra connection is opened: a busy service is still ready.
        """
        await probe(self.engine, lambda connection: connection.execute(text("SELECT 1")))

    async def _wait_for_the_server(self) -> None:
        """Wait for the database up to the configured time, with log lines, then start anyway: readiness reports it."""
        deadline = time.monotonic() + self._startup_timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                return await asyncio.wait_for(self.check(), left)
            except Exception as error:
                if not (is_unavailable(error) or isinstance(error, TimeoutError)):
                    raise
                _logger.warning("waiting for the database, %.1f s left: %s", left, type(error).__name__)
            await asyncio.sleep(min(_BETWEEN_ATTEMPTS, max(0.0, deadline - time.monotonic())))
        if self._startup_timeout:
            _logger.error("starting without the database, which did not answer within %s s", self._startup_timeout)
        return None


async def get_session(connection: HTTPConnection, response: Response) -> AsyncIterator[AsyncSession]:
    """Open the session of the request; `app.dependency_overrides[get_session]` replaces it in tests.

    Raises:
        ConfigurationError: The app has no database, or the dependency lacks `scope="function"`.
        ProblemError: 503: the database is unavailable. 409 or 422: the database refuses a value of the client. If the
            app has an exception handler for the error, the error itself is raised.
    """
    expose_response_status(connection.scope, _SESSIONS)
    handled, session = sys.exc_info()[1], _database(connection).sessionmaker()
    try:
        await announce_writing(connection.scope, session)
        yield session
        if not session.closed_idle:
            await _end(session, response, handled)
    except BaseException as error:
        await _roll_back(session, error, connection)
        raise


async def get_read_session(connection: HTTPConnection, response: Response) -> AsyncIterator[AsyncSession]:
    """Open the request's session for reading, on the replica if there is one.

    Raises:
        ConfigurationError: The app has no database.
        ProblemError: 503, 409 or 422; see `get_session`.
    """
    expose_response_status(connection.scope, _SESSIONS)
    handled, session = sys.exc_info()[1], _database(connection).read_sessionmaker()
    if isinstance(session, JoiningSession):
        announce_reading(connection.scope, session)
    try:
        yield session
        if not session.is_closed:
            await _end(session, response, handled)
    except BaseException as error:
        await _roll_back(session, error, connection)
        raise


_SESSIONS = (get_session, get_read_session)

# The scope decides when the commit happens: "function" is after the handler and before the response is sent.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
ReadSessionDep = Annotated[AsyncSession, Depends(get_read_session, scope="function")]


async def _end(session: ClosingSession, response: Response, handled: BaseException | None) -> None:
    """Commit or roll back, and close the session.

    Args:
        session: The session of the request.
        response: The injected response, with the status of the response that will be sent.
        handled: The exception that was being handled before the request's handler was called. If another one is being
            handled now, it has left the handler: a dependency that has suppressed it does not make a success of it.
    """
    if sys.exc_info()[1] is not handled or (response.status_code or 0) >= 400:  # noqa: PLR2004 - an error response
        await session.rollback()
    else:
        await session.commit()
    if session.in_transaction():  # an after_commit hook of the app has begun another transaction
        await session.close()
    else:
        session.sync_session.close()  # there is nothing to await


async def _roll_back(session: AsyncSession, error: BaseException, connection: HTTPConnection) -> None:
    try:
        await session.__aexit__(None, None, None)  # unlike close(), it finishes even if the request is cancelled again
    except DBAPIError as lost:  # the server rolls back when a connection is lost
        _logger.warning("a transaction ended with its connection: %s", type(lost.orig).__name__)
    raise_problem(error, connection, _database(connection).client_errors)


def _database(connection: HTTPConnection) -> Database:
    own = getattr(connection.app.state, "database", None)  # of a mounted app, if it has one
    database: Database | None = (
        own if isinstance(own, Database) else (_scope.installed(connection.scope) or {}).get("database")
    )
    if database is None:
        raise ConfigurationError(
            "the app has no database: set DATABASE_URL for create_app, or app.state.database = Database(...)"
        )
    return database
