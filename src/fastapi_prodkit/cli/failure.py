"""What went wrong, in one line for a terminal or a deployment's log, without secrets."""

import re
import traceback

from fastapi_prodkit.exceptions import ProdkitError

__all__ = ["describe"]

_CLASS = re.compile(r"^<class '[^']+'>: ")  # what SQLAlchemy's asyncpg dialect puts in front of a message
_LIBRARIES = ("site-packages", "fastapi_prodkit", "/lib/python", "<")


def describe(error: BaseException) -> str:
    """Return what went wrong; with the place for an error that nobody has expected."""
    if isinstance(error, ProdkitError):
        return str(error)  # our own texts hold no value
    from fastapi_prodkit._redact import Redactor  # noqa: PLC0415 - `--help` does not need it

    return Redactor().text(_text(error))


def _text(error: BaseException) -> str:
    library = type(error).__module__.partition(".")[0]
    if library == "alembic":
        return _first_line(str(error))
    if library == "sqlalchemy" or type(error).__name__ == "CannotConnectError":
        return _database(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {_first_line(str(error))}{_place(error)}"


def _database(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    reason = _first_line(_CLASS.sub("", str(cause))) or type(cause).__name__
    if type(error).__name__ == "CannotConnectError":
        return f"cannot connect to the database: {reason}"
    return f"the database says: {reason}"


def _place(error: BaseException) -> str:
    """Return the innermost line of the project's own: of a migration, most likely."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    own = next((frame for frame in frames if not any(part in frame.filename for part in _LIBRARIES)), None)
    return f" ({own.filename}:{own.lineno})" if own else ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
