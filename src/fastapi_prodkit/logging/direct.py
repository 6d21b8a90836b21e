"""Write an event without making a LogRecord of it, while nothing in the process could see the record.

A record and its way through the standard library cost several times what its line costs, and each request has a line.
The direct way skips filters, the record factory, functions of the standard library that agents patch, and processors.
All but the last may change while the service runs, so each event asks whether the direct way is open.
"""

import logging
from collections.abc import Callable
from logging import Handler, Logger, LogRecord
from types import FunctionType
from typing import Any, Final

from fastapi_prodkit.logging.handler import EventHandler

__all__ = ["DirectWriter"]


class DirectWriter:
    """Find the direct way for one kind of event.

    Args:
        logger: The logger that would make the record; whether it is enabled is for the caller to ask.
        event: What happened: the field `event` of the line.
        level: How severe it is.
    """

    def __init__(self, logger: Logger, event: str, level: int = logging.INFO) -> None:
        self._logger = logger
        self._level = level
        self._event = event
        self._handler: EventHandler | None = None  # the one that `_write` belongs to
        self._write: Callable[[dict[str, Any]], None] | None  # None where the handler has processors

    def find(self) -> Callable[[dict[str, Any]], None] | None:
        """Return a function that writes the fields of an event; None while a record has to be made."""
        handlers = logging.root.handlers
        if len(handlers) != 1 or type(handlers[0]) is not EventHandler:
            return None
        handler = handlers[0]
        if handler.filters or handler.level > self._level:
            return None
        if not _reaches_root_alone(self._logger) or not _is_standard(type(self._logger)):
            return None
        if handler is not self._handler:
            level = logging.getLevelName(self._level).lower()
            self._write = None if handler.processors else handler.writer(level, self._logger.name, self._event)
            self._handler = handler
        return self._write


def _reaches_root_alone(logger: Logger) -> bool:
    """Say whether a record of the logger passes no filter, and no handler before those of the root logger."""
    if logger.filters:
        return False
    while logger.parent is not None:
        if logger.handlers or not logger.propagate:
            return False
        logger = logger.parent
    return True


def _is_standard(logger_class: type[Logger]) -> bool:
    """Say whether a record is made by the standard library, and passes nothing but its functions."""
    return (
        logger_class.makeRecord is _MAKE_RECORD
        and logger_class.handle is _HANDLE
        and logger_class.filter is _FILTER
        and logger_class.callHandlers is _CALL_HANDLERS
        and Handler.handle is _HANDLER_HANDLE
        and LogRecord.__init__ is _RECORD_INIT
        and LogRecord.getMessage is _GET_MESSAGE
        and logging.getLogRecordFactory() is LogRecord
    )


def _unless_patched(function: Any) -> Any:
    """Return a function of the standard library, or None if an agent has replaced it before this module was loaded."""
    own = type(function) is FunctionType and function.__globals__ is vars(logging)
    return function if own else None


_MAKE_RECORD: Final = _unless_patched(Logger.makeRecord)
_HANDLE: Final = _unless_patched(Logger.handle)
_FILTER: Final = _unless_patched(Logger.filter)
_CALL_HANDLERS: Final = _unless_patched(Logger.callHandlers)
_HANDLER_HANDLE: Final = _unless_patched(Handler.handle)
_RECORD_INIT: Final = _unless_patched(LogRecord.__init__)
_GET_MESSAGE: Final = _unless_patched(LogRecord.getMessage)
