"""Write an event without a LogRecord, if nothing in the process could observe the record.

Creating a record and passing it through the standard library costs several times as much as writing its line, and each
request writes a line. The direct path skips filters, the record factory, functions of the standard library that agents
patch, and processors. All of these except processors may change while the service runs, so they are checked for each
event.
"""

import logging
from collections.abc import Callable
from logging import Handler, Logger, LogRecord
from types import FunctionType
from typing import Any, Final

from fastapi_prodkit.logging.handler import EventHandler

__all__ = ["DirectWriter"]


class DirectWriter:
    """Write one kind of event without a record where possible.

    Args:
        logger: The logger that would create the record. The caller has to check whether the level is enabled.
        event: Value of the field `event`.
        level: Level of the event.
    """

    def __init__(self, logger: Logger, event: str, level: int = logging.INFO) -> None:
        self._logger = logger
        self._level = level
        self._event = event
        self._handler: EventHandler | None = None  # the handler that made `_write`
        self._write: Callable[[dict[str, Any]], None] | None  # None if the handler has processors

    def find(self) -> Callable[[dict[str, Any]], None] | None:
        """Return a function that writes the fields of an event; None if a record is needed."""
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
    """Return whether the logger's records pass no filters, and no handlers except those of the root logger."""
    if logger.filters:
        return False
    while logger.parent is not None:
        if logger.handlers or not logger.propagate:
            return False
        logger = logger.parent
    return True


def _is_standard(logger_class: type[Logger]) -> bool:
    """Return whether records are created and handled by unpatched functions of the standard library."""
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
    """Return a function of the standard library; None if an agent replaced it before this module was imported."""
    own = type(function) is FunctionType and function.__globals__ is vars(logging)
    return function if own else None


_MAKE_RECORD: Final = _unless_patched(Logger.makeRecord)
_HANDLE: Final = _unless_patched(Logger.handle)
_FILTER: Final = _unless_patched(Logger.filter)
_CALL_HANDLERS: Final = _unless_patched(Logger.callHandlers)
_HANDLER_HANDLE: Final = _unless_patched(Handler.handle)
_RECORD_INIT: Final = _unless_patched(LogRecord.__init__)
_GET_MESSAGE: Final = _unless_patched(LogRecord.getMessage)
