"""Translate database errors, and answer requests that end with one: 503, or 4xx for errors of the client.

If a server is down, silent, restarting, failing over or out of connections, asyncpg raises `OSError`, `TimeoutError`
and errors of three hierarchies. `translate_errors` turns them into SQLAlchemy's, as with other drivers, so that
`except DBAPIError` and `except sqlalchemy.exc.TimeoutError` (no connection in time) are sufficient.
"""

import logging
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from sqlalchemy import ExceptionContext, event
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.exc import DataError, DBAPIError, InvalidRequestError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import Response

from fastapi_prodkit import _context, _problem
from fastapi_prodkit._context import Reason
from fastapi_prodkit.database.cached_statements import is_outdated
from fastapi_prodkit.database.client_errors import CLIENT_ERRORS, checked_statuses, client_error
from fastapi_prodkit.exceptions import ProblemError

__all__ = ["add_outage_handlers", "is_transient", "is_unavailable", "raise_problem", "translate_errors"]

_RETRY_AFTER = "1"  # seconds; short enough for clients to wait

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_READ_ONLY = "25006"
_UNAVAILABLE_CLASSES = (
    "08",  # connection exception
    "53",  # insufficient resources: too many connections, disk full
    "57",  # operator intervention: shutdown, starting up, statement time-out
    "58",  # system error
)
_ROLLED_BACK = frozenset({"40001", "40P01"})  # serialization failure, deadlock: the server has rolled back
_ENDED = frozenset({"57P01", "57P02", "57P03"})  # an administrator or a crash has closed the connection
_UNAVAILABLE = _ROLLED_BACK | {"55P03", _READ_ONLY}  # lock time-out; a primary that has become a standby
# asyncpg's errors after which its state is undefined: the server closed the connection while a query was being sent; a
# composite type has changed since it was described.
_STATE_UNDEFINED = frozenset({"InternalClientError", "OutdatedSchemaCacheError"})

_SHARED = "the connection was closed while a statement ran on it: use another session in each task"

_logger = logging.getLogger(__name__)


class CannotConnectError(OperationalError):
    """A connection could not be opened; no statement has been sent."""


def translate_errors(engine: AsyncEngine) -> None:
    """Make the engine raise `DBAPIError` for every error of the connection to the server.

    `connection_invalidated` is True if the connection is lost, could not be opened, or leads to a server that has
    become read-only. The pool then opens new connections.
    """
    event.listen(engine.sync_engine, "do_connect", _connect)
    event.listen(engine.sync_engine, "handle_error", _handle_error)


def add_outage_handlers(app: Starlette, *, client_errors: Mapping[str, int] = CLIENT_ERRORS) -> None:
    """Answer 503, 409 or 422 if a handler raises the error of a session that it opened itself, by `session()`.

        add_outage_handlers(app, client_errors=database.client_errors)

    `SessionDep` needs no handler. An exception handler of the app for one of SQLAlchemy's exceptions takes precedence.

    Args:
        app: The app whose handlers open sessions.
        client_errors: SQLSTATE -> status of errors that the client has caused; if empty, only 503 is answered.

    Raises:
        ConfigurationError: The table has an invalid SQLSTATE or status.
    """
    if SQLAlchemyError not in app.exception_handlers:
        handler: Any = _ProblemHandler(client_errors)  # Starlette's type of the return value is too narrow
        app.add_exception_handler(SQLAlchemyError, handler)


def is_unavailable(error: BaseException) -> bool:
    """Return whether the database was unavailable, so that the same request may succeed later."""
    if isinstance(error, DBAPIError):
        state = _sqlstate(error)
        states = state in _UNAVAILABLE - {_READ_ONLY} or state[:2] in _UNAVAILABLE_CLASSES
        return states or error.connection_invalidated or is_outdated(error.orig)
    return isinstance(error, PoolTimeoutError)


def is_transient(error: BaseException) -> bool:
    """Return whether the transaction had no effect for certain, and may succeed if it is repeated from its start.

    If the connection is lost during COMMIT, it is unknown whether the commit happened: that is not retried. Time-outs
    are not retried, because each attempt would take as long.
    """
    if not isinstance(error, DBAPIError) or isinstance(error.orig, TimeoutError):
        return False
    if _sqlstate(error) in _ROLLED_BACK or isinstance(error, CannotConnectError) or is_outdated(error.orig):
        return True
    return error.connection_invalidated and error.statement is not None  # None for COMMIT


def raise_problem(error: BaseException, connection: HTTPConnection, client_errors: Mapping[str, int]) -> None:
    """Raise the problem for a database error; return if there is no problem for it, or if the app handles the error.

    Args:
        error: The exception that ended the request, of a session or not.
        connection: The request or WebSocket.
        client_errors: SQLSTATE -> status of errors that the client has caused.

    Raises:
        ProblemError: The database is unavailable, or refuses a value that the client has sent.
        WebSocketException: The same, if the connection is an accepted WebSocket.
        WebSocketDisconnect: The same, if the connection is a closed WebSocket.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # of a task group
        error = error.exceptions[0]
    if isinstance(error, SQLAlchemyError) and not _is_handled(error, connection.app):
        problem = _problem_of(error, client_errors)
        if problem is not None:
            raise _problem.raisable(connection, problem) from error


class _ProblemHandler:
    """Exception handler for errors of sessions that an app's handlers open themselves."""

    def __init__(self, client_errors: Mapping[str, int]) -> None:
        self._client_errors = checked_statuses(client_errors)

    async def __call__(self, connection: HTTPConnection, error: Exception) -> Response | None:
        """Return the problem's response; raise the error again if there is no problem for it."""
        problem = _problem_of(error, self._client_errors)
        if problem is None:
            raise error
        return await _problem.respond(connection, problem)


def _is_handled(error: Exception, app: Starlette) -> bool:
    """Return whether the app has an exception handler for the error; a handler for `Exception` does not count."""
    kinds = takewhile(lambda kind: kind is not Exception, type(error).__mro__)
    handlers = (app.exception_handlers[kind] for kind in kinds if kind in app.exception_handlers)
    return not isinstance(next(handlers, None), _ProblemHandler | None)


def _problem_of(error: Exception, client_errors: Mapping[str, int]) -> ProblemError | None:
    return _unavailable(error) if is_unavailable(error) else client_error(error, client_errors)


def _unavailable(error: BaseException) -> ProblemError:
    """Return the 503 for the error, and log the error's names and codes, but no text that could quote a value."""
    orig = getattr(error, "orig", None)
    cause = " ".join(filter(None, [type(error).__name__, _reason(orig), _sqlstate(error)]))
    _logger.warning("the database is unavailable: %s", cause)
    _context.refuse(Reason("database_unavailable", f"the database is unavailable: {cause}"))
    return ProblemError(503, "The database is not available.", headers={"Retry-After": _RETRY_AFTER})


def _connect(dialect: Dialect, _record: object, args: list[Any], kwargs: dict[str, Any]) -> DBAPIConnection:
    try:
        return dialect.connect(*args, **kwargs)
    except _connect_errors(dialect) as error:
        raise CannotConnectError(None, None, error, hide_parameters=True, connection_invalidated=True) from error


def _connect_errors(dialect: Dialect) -> tuple[type[Exception], ...]:
    """Return the exceptions of connecting; SQLAlchemy 2.0 does not translate asyncpg's exceptions there."""
    asyncpg = getattr(dialect.loaded_dbapi, "asyncpg", None)
    untranslated = (asyncpg.PostgresError, asyncpg.InterfaceError) if asyncpg is not None else ()
    return (OSError, dialect.loaded_dbapi.Error, *untranslated)  # a TimeoutError is an OSError


def _handle_error(context: ExceptionContext) -> SQLAlchemyError | None:
    error = context.original_exception
    if _is_closed_by_another_task(context):
        context.invalidate_pool_on_disconnect = False
        return InvalidRequestError(_SHARED)
    if _is_refused_by_sqlite(context):
        return DataError(context.statement, None, error, hide_parameters=True)
    if isinstance(error, OSError) or type(error).__name__ in _STATE_UNDEFINED:
        context.is_disconnect = True
        return OperationalError(context.statement, None, error, hide_parameters=True, connection_invalidated=True)
    state = getattr(error, "sqlstate", None)
    if state in _ENDED or (state == _READ_ONLY and not _asked_to_read(context)):
        context.is_disconnect = True
    return None


def _is_closed_by_another_task(context: ExceptionContext) -> bool:
    """Return whether another task ended the transaction during this statement."""
    cursor: Any = getattr(context.execution_context, "cursor", None)  # there is no cursor when a transaction ends
    driver = getattr(cursor, "_connection", None)  # not public
    return getattr(driver, "closed_here", False)


def _is_refused_by_sqlite(context: ExceptionContext) -> bool:
    """Return whether SQLite's driver cannot encode an argument: an integer over 64 bits or a lone surrogate."""
    refused = isinstance(context.original_exception, OverflowError | UnicodeEncodeError)
    return refused and context.execution_context is not None and context.dialect.name == "sqlite"


def _asked_to_read(context: ExceptionContext) -> bool:
    """Return whether we requested a read-only transaction; if not, the server is no longer the primary."""
    connection = context.connection
    return connection is not None and bool(connection.get_execution_options().get("postgresql_readonly"))


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _reason(orig: BaseException | None) -> str:
    """Return the name of the driver's exception, which SQLAlchemy wraps in a more general one."""
    cause = getattr(orig, "__cause__", None) or orig
    return type(cause).__name__ if cause is not None else ""
