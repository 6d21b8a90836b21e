"""Map database errors that the client has caused to 4xx: a value that is not accepted, or a conflict with stored rows.

    Database(settings, client_errors={**CLIENT_ERRORS, "23514": 422})  # also check violations
    Database(settings, client_errors={})  # none: each is a 500

`CLIENT_ERRORS` maps SQLSTATE to status. An error that asyncpg or SQLite raises without PostgreSQL has no SQLSTATE; the
SQLSTATE that PostgreSQL would report in its place is used.
"""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.exceptions import ConfigurationError, ProblemError

__all__ = ["CLIENT_ERRORS", "checked_statuses", "client_error"]

# https://www.postgresql.org/docs/current/errcodes-appendix.html
CLIENT_ERRORS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "22000": 422,  # data exception: only of a range whose lower bound is greater than its upper bound
        "22001": 422,  # string data right truncation
        "22003": 422,  # numeric value out of range
        "22007": 422,  # invalid datetime format
        "22008": 422,  # datetime field overflow
        "22009": 422,  # invalid time zone displacement value
        "2200M": 422,  # invalid XML document
        "2200N": 422,  # invalid XML content
        "22015": 422,  # interval field overflow
        "2201B": 422,  # invalid regular expression
        "22021": 422,  # character not in repertoire
        "22023": 422,  # invalid parameter value
        "22025": 422,  # invalid escape sequence
        "22026": 422,  # string data length mismatch: bit strings
        "2201W": 422,  # invalid row count in limit clause
        "2201X": 422,  # invalid row count in result offset clause
        "22030": 422,  # duplicate JSON object key value
        "22P02": 422,  # invalid text representation
        "22P05": 422,  # untranslatable character
        "23001": 409,  # restrict violation: ON DELETE RESTRICT, since PostgreSQL 18; 23503 before
        "23503": 409,  # foreign key violation
        "23505": 409,  # unique violation
        "23P01": 409,  # exclusion violation
        "54000": 422,  # program limit exceeded: a text that is too long for its index
        "54001": 422,  # statement too complex: JSON, or a text of another type, that is nested too deeply
    }
)

_TOO_COMPLEX = "54001"  # also raised for infinite recursion, which is an error of the app
_DATA_EXCEPTION = "22000"  # also asyncpg's SQLSTATE for every argument that it cannot encode
_CHECKS_BOUNDS = "range_serialize"  # PostgreSQL's function that refuses an inverted range
_REFUSED_BY_DRIVER = ((OverflowError, "22003"), (UnicodeError, "22021"), (ValueError, "22P02"))
_SQLITE = {  # https://www.sqlite.org/rescode.html
    "SQLITE_CONSTRAINT_FOREIGNKEY": "23503",
    "SQLITE_CONSTRAINT_PRIMARYKEY": "23505",
    "SQLITE_CONSTRAINT_ROWID": "23505",
    "SQLITE_CONSTRAINT_UNIQUE": "23505",
}
_DETAILS = {409: "The request conflicts with what is stored.", 422: "The request is not valid."}
_INVALID = {"loc": [], "msg": "The database does not accept a value of the request", "type": "value_error"}

# Names in error messages. A message may also contain a value: no pattern may match a part of a value.
_NAMES = (
    ("constraint", re.compile(r"UNIQUE constraint failed: (.+)")),
    ("argument", re.compile(r"invalid input for query argument (\$\d+)")),
    ("type", re.compile(r"invalid input (?:syntax for type|value for enum) ([\w ]+)")),
    ("type", re.compile(r"value too long for type ([\w ]+(?:\(\d+\))?)")),
    ("type", re.compile(r'value ".*" is out of range for type ([\w ]+)$', re.DOTALL)),
    ("type", re.compile(r"value out of (\w+) range$")),
    ("type", re.compile(r"(smallint|integer|bigint|date|timestamp) out of range")),
)

_logger = logging.getLogger(__name__)


def client_error(error: BaseException, statuses: Mapping[str, int]) -> ProblemError | None:
    """Return the problem for an error that the client has caused, and log it without values; None for other errors.

    Args:
        error: The exception that a session has raised.
        statuses: SQLSTATE -> status, such as `CLIENT_ERRORS`.
    """
    if not isinstance(error, DBAPIError):
        return None
    state = _sqlstate(error)
    status = statuses.get(state)
    if status is None or _is_error_of_the_app(error, state):
        return None
    _logger.warning("the database refused the request: %s", _described(error, state))
    extensions: dict[str, Any] = {"errors": [_INVALID]} if status == HTTPStatus.UNPROCESSABLE_ENTITY else {}
    return ProblemError(status, _DETAILS.get(status), **extensions)


def checked_statuses(statuses: Mapping[str, int]) -> Mapping[str, int]:
    """Return the table if each SQLSTATE has five characters and each status is 400 to 499.

    Raises:
        ConfigurationError: An SQLSTATE or a status is invalid.
    """
    for state, status in statuses.items():
        if not re.fullmatch(r"[0-9A-Z]{5}", state):
            raise ConfigurationError(f"client_errors: {state!r} is no SQLSTATE, which has five digits or capitals")
        if not 400 <= status <= 499:  # noqa: PLR2004 - RFC 9110, section 15.5
            raise ConfigurationError(f"client_errors: {status} for {state} is no client error; use 400 to 499")
    return statuses


def _sqlstate(error: DBAPIError) -> str:
    """Return the SQLSTATE of the error, or the one that PostgreSQL would have given it; "" if there is none."""
    orig: Any = error.orig
    state: str | None = getattr(orig, "sqlstate", None)
    if state is None or state == _DATA_EXCEPTION:
        root = _root(orig)
        for kind, equivalent in _REFUSED_BY_DRIVER:
            if isinstance(root, kind):
                return equivalent
        if isinstance(root, TypeError) and "offset-naive" in str(root):  # with or without a zone
            return "22007"
    return state or _SQLITE.get(getattr(orig, "sqlite_errorname", ""), "")


def _is_error_of_the_app(error: DBAPIError, state: str) -> bool:
    """Return whether an SQLSTATE that a client or the app may cause was caused by the app."""
    driver: Any = getattr(error.orig, "__cause__", None)
    if state == _DATA_EXCEPTION:
        return getattr(driver, "server_source_function", None) != _CHECKS_BOUNDS
    # In nested function calls PostgreSQL's context has several lines.
    return state == _TOO_COMPLEX and "\n" in (getattr(driver, "context", None) or "")


def _described(error: DBAPIError, state: str) -> str:
    """Return the exception's name and the names of constraint, column and the like that it mentions."""
    orig: Any = error.orig
    driver = orig.__cause__ or orig
    names = {
        "constraint": getattr(driver, "constraint_name", None),
        "column": getattr(driver, "column_name", None),
        "type": getattr(driver, "data_type_name", None),
    }
    messages = {str(driver), str(_root(orig))}
    for name, pattern in _NAMES:
        for found in filter(None, map(pattern.match, messages)):
            names[name] = names.get(name) or found[1]
    mentioned = [f"{name} {value}" for name, value in names.items() if value]
    return ", ".join([f"{type(driver).__name__} {state}", *mentioned])


def _root(error: BaseException) -> BaseException:
    """Return the root cause, also if asyncpg has hidden it with `from None`, as for elements of arrays."""
    while error.__suppress_context__ and (cause := error.__cause__ or error.__context__):
        error = cause
    return error
