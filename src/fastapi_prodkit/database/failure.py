"""What of a database error is the database's fault, and what a client is told of it.

A server that is down, silent, restarting, failing over or out of connections makes asyncpg raise `OSError`,
`TimeoutError` and errors of three hierarchies. `translate_errors` makes all of them what other drivers raise, so that
`except DBAPIError` and `except sqlalchemy.exc.TimeoutError` (no connection in time) are enough.
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

_RETRY_AFTER = "1"  # seconds; what a client that honours it at all is willing to wait, and a fail-over's granularity

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_READ_ONLY = "25006"
_UNAVAILABLE_CLASSES = (
    "08",  # connection exception
    "53",  # insufficient resources: too many connections, disk full
    "57",  # operator intervention: shutdown, starting up, statement time-out
    "58",  # system error
)
_ROLLED_BACK = frozenset({"40001", "40P01"})  # serialization failure, deadlock: the server says that nothing was done
_ENDED = frozenset({"57P01", "57P02", "57P03"})  # an administrator or a crash has ended the connection
_UNAVAILABLE = _ROLLED_BACK | {"55P03", _READ_ONLY}  # lock time-out; a primary that has become a standby
# The server closed the connection while a query was being sent; a composite type has changed since it was described.
_STATE_UNDEFINED = frozenset({"InternalClientError", "OutdatedSchemaCacheError"})

_SHARED = "the connection was closed while a statement ran on it: give each task a session of its own"

_logger = logging.getLogger(__name__)


class CannotConnectError(OperationalError):
    """No connection could be made, whatever the reason; nothing has been sent."""


def translate_errors(engine: AsyncEngine) -> None:
    """Make the engine raise `DBAPIError` for whatever goes wrong between here and the server.

    `connection_invalidated` is True where the connection is lost, was never made, or leads to a server that no longer
    takes writes; then the pool makes new ones.
    """
    event.listen(engine.sync_engine, "do_connect", _connect)
    event.listen(engine.sync_engine, "handle_error", _handle_error)


def add_outage_handlers(app: Starlette, *, client_errors: Mapping[str, int] = CLIENT_ERRORS) -> None:
    """Answer 503, 409 or 422 where a handler lets the error of a session through that it opened itself, `session()`.

        add_outage_handlers(app, client_errors=database.client_errors)

    `SessionDep` needs no handler. A handler that the app has for one of SQLAlchemy's exceptions stays in charge of it.

    Args:
        app: The app whose handlers open sessions.
        client_errors: SQLSTATE -> status of errors that are the client's; an empty table for 503 alone.

    Raises:
        ConfigurationError: The table cannot be used.
    """
    if SQLAlchemyError not in app.exception_handlers:
        handler: Any = _ProblemHandler(client_errors)  # Starlette types the answer too narrowly
        app.add_exception_handler(SQLAlchemyError, handler)


def is_unavailable(error: BaseException) -> bool:
    """Tell whether the database could not serve, so that the same request may succeed later."""
    if isinstance(error, DBAPIError):
        state = _sqlstate(error)
        states = state in _UNAVAILABLE - {_READ_ONLY} or state[:2] in _UNAVAILABLE_CLASSES
        return states or error.connection_invalidated or is_outdated(error.orig)
    return isinstance(error, PoolTimeoutError)


def is_transient(error: BaseException) -> bool:
    """Tell whether the transaction surely left nothing behind and may succeed if it is run again, from its start.

    A connection that is lost while COMMIT is on its way leaves open whether the commit happened: that is not retried.
    Nor is anything that takes as long as a time-out.
    """
    if not isinstance(error, DBAPIError) or isinstance(error.orig, TimeoutError):
        return False
    if _sqlstate(error) in _ROLLED_BACK or isinstance(error, CannotConnectError) or is_outdated(error.orig):
        return True
    return error.connection_invalidated and error.statement is not None  # COMMIT is none to SQLAlchemy


def raise_problem(error: BaseException, connection: HTTPConnection, client_errors: Mapping[str, int]) -> None:
    """Raise the problem that the client gets for the error; return if there is none, or if the app handles the error.

    Args:
        error: What a session, or anything else, has raised.
        connection: The request that ends with it.
        client_errors: SQLSTATE -> status of errors that are the client's.

    Raises:
        ProblemError: The database is unavailable, or refuses what the client has sent.
        WebSocketException: Likewise, where the connection is a WebSocket that was accepted.
        WebSocketDisconnect: Likewise, where it is closed.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # of a task group
        error = error.exceptions[0]
    if isinstance(error, SQLAlchemyError) and not _is_handled(error, connection.app):
        problem = _problem_of(error, client_errors)
        if problem is not None:
            raise _problem.raisable(connection, problem) from error


class _ProblemHandler:
    """The exception handler for errors of sessions that the handlers of an app open themselves."""

    def __init__(self, client_errors: Mapping[str, int]) -> None:
        self._client_errors = checked_statuses(client_errors)

    async def __call__(self, connection: HTTPConnection, error: Exception) -> Response | None:
        """Answer with the problem; raise the error on if there is none."""
        problem = _problem_of(error, self._client_errors)
        if problem is None:
            raise error
        return await _problem.respond(connection, problem)


def _is_handled(error: Exception, app: Starlette) -> bool:
    """Tell whether the app has a handler of its own for the error; one for `Exception` is for unhandled errors."""
    kinds = takewhile(lambda kind: kind is not Exception, type(error).__mro__)
    handlers = (app.exception_handlers[kind] for kind in kinds if kind in app.exception_handlers)
    return not isinstance(next(handlers, None), _ProblemHandler | None)


def _problem_of(error: Exception, client_errors: Mapping[str, int]) -> ProblemError | None:
    return _unavailable(error) if is_unavailable(error) else client_error(error, client_errors)


def _unavailable(error: BaseException) -> ProblemError:
    """Return the 503 for the error, and log what happened: names and codes, no text that could quote a value."""
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
    """Return what connecting raises: SQLAlchemy 2.0 translates none of asyncpg's exceptions there."""
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
    """Whether a task has ended the transaction while this one executes a statement in it."""
    cursor: Any = getattr(context.execution_context, "cursor", None)  # there is none where a transaction ends
    driver = getattr(cursor, "_connection", None)  # not public
    return getattr(driver, "closed_here", False)


def _is_refused_by_sqlite(context: ExceptionContext) -> bool:
    """Whether the driver cannot express an argument, an integer of more than 64 bits or a lone surrogate."""
    refused = isinstance(context.original_exception, OverflowError | UnicodeEncodeError)
    return refused and context.execution_context is not None and context.dialect.name == "sqlite"


def _asked_to_read(context: ExceptionContext) -> bool:
    """Whether the transaction is read only by our wish; if not, the server was the primary when we connected."""
    connection = context.connection
    return connection is not None and bool(connection.get_execution_options().get("postgresql_readonly"))


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _reason(orig: BaseException | None) -> str:
    """Name the driver's own exception, which SQLAlchemy wraps in one of a more general name."""
    cause = getattr(orig, "__cause__", None) or orig
    return type(cause).__name__ if cause is not None else ""
