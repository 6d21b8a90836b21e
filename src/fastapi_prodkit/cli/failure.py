"""Describe an error without secrets: in one line for a terminal, or with its traceback for the log of a service."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from fastapi_prodkit.exceptions import ProdkitError, SettingsError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

__all__ = ["describe", "logged_failure"]

_CLASS = re.compile(r"^<class '[^']+'>: ")  # prefix of messages of SQLAlchemy's asyncpg dialect
_LIBRARIES = ("site-packages", "fastapi_prodkit", "/lib/python", "<")


def describe(error: BaseException) -> str:
    """Return a description of an error; for an unexpected error, with file and line."""
    ours = _settings_error(error) or error
    if isinstance(ours, ProdkitError):
        return str(ours)  # our own messages contain no values
    from fastapi_prodkit.logging.redaction import REDACTED, Redactor  # noqa: PLC0415 - `--help` does not need it
    from fastapi_prodkit.logging.repetition import inputs, mask  # noqa: PLC0415 - `--help` does not need it

    return mask(Redactor().text(_text(error)), inputs(error), REDACTED)


@contextmanager
def logged_failure() -> Iterator[None]:
    """Log an error that prevents a service from starting, and raise it again; an unknown app is not logged.

    Raises:
        typer.Exit: Loading the app ended the process. The exit code is never 0, because the service has not started.
    """
    try:
        yield
    except typer.TyperException:
        raise
    except SystemExit as end:
        _log(end, "the process was ended while the app was loaded")
        code = end.code if isinstance(end.code, int) else 1
        raise typer.Exit(code % 256 or 1) from end  # an exit code has eight bits
    except Exception as error:
        settings = _settings_error(error)
        # Not `NAME: text`, because the log would mask the text if the name is that of a secret.
        wrong = [f"{name} ({text})" for name, text in settings.problems.items()] if settings else []
        _log(error, f"settings cannot be used: {'; '.join(wrong)}" if wrong else describe(error))
        raise


def _log(error: BaseException, reason: str) -> None:
    """Write a record with the traceback, in the format of the service."""
    from fastapi_prodkit.logging import EventHandler, configure_logging  # noqa: PLC0415 - `--help` does not need it
    from fastapi_prodkit.sections import LogSettings  # noqa: PLC0415 - `--help` does not need it

    if not any(isinstance(handler, EventHandler) for handler in logging.root.handlers):
        environment = os.environ.get("ENVIRONMENT", "dev")
        console = os.environ.get("LOG_FORMAT") == "console" or (environment == "dev" and sys.stdout.isatty())
        redact = tuple(filter(None, os.environ.get("LOG_REDACT", "").split(",")))
        settings = LogSettings(format="console" if console else "json", redact=redact)
        configure_logging(settings, environment=environment)
    logging.getLogger("fastapi_prodkit.serve").critical("the service cannot start: %s", reason, exc_info=error)


def _settings_error(error: BaseException) -> SettingsError | None:
    """Return the problems by variable name, for our settings or settings classes of the project; else None."""
    from pydantic import ValidationError  # noqa: PLC0415 - `--help` does not need it
    from pydantic_settings import BaseSettings  # noqa: PLC0415 - `--help` does not need it

    from fastapi_prodkit._config import variables  # noqa: PLC0415 - `--help` does not need it

    if isinstance(error, ValidationError):
        for model in _subclasses(BaseSettings):
            if model.__name__ == error.title:
                return SettingsError(variables.problems(error, model, str(model.model_config.get("env_prefix", ""))))
    return error if isinstance(error, SettingsError) else None


def _subclasses(model: "type[BaseModel]") -> "Iterator[type[BaseModel]]":
    for each in model.__subclasses__():
        yield each
        yield from _subclasses(each)


def _text(error: BaseException) -> str:
    from pydantic import ValidationError  # noqa: PLC0415 - `--help` does not need it

    if isinstance(error, ValidationError):
        return _invalid(error)
    library = type(error).__module__.partition(".")[0]
    if library == "alembic":
        return _first_line(str(error))
    if library == "sqlalchemy" or type(error).__name__ == "CannotConnectError":
        return _database(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {_first_line(str(error))}{_place(error)}"


def _invalid(error: "ValidationError") -> str:
    wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False))
    return f"{error.title}: {'; '.join(wrong)}{_place(error)}"


def _database(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    reason = _first_line(_CLASS.sub("", str(cause))) or type(cause).__name__
    if type(error).__name__ == "CannotConnectError":
        return f"cannot connect to the database: {reason}"
    return f"the database reports: {reason}"


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame in the project's code, such as a migration."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    own = next((frame for frame in frames if not any(part in frame.filename for part in _LIBRARIES)), None)
    return f" ({own.filename}:{own.lineno})" if own else ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
