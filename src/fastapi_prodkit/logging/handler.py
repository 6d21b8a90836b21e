"""The handler that formats and writes every log line of the process."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from fastapi_prodkit import _context, sections
from fastapi_prodkit._terminal import coloured
from fastapi_prodkit.logging.output import LineWriter
from fastapi_prodkit.logging.redaction import Redactor, may_hold_secret
from fastapi_prodkit.logging.repetition import inputs

if TYPE_CHECKING:
    from structlog.types import Processor

__all__ = ["EVENT_DICT", "EVENT_NAME", "EventHandler"]

# Maximum size of a line, including the line break: log drivers and agents split lines at 256 KB. With 26 bytes of
# overhead, this was CloudWatch's limit of an event (PutLogEvents; 1 MB since 2025).
_LIMIT = 262_144 - 26 - 1
_SIZE = 200_000  # maximum characters of a redacted event
_SMALL_SIZE = 40_000  # used if the line is too long: a character takes at most 6 bytes, so this always fits

_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
_OURS = "request_id"  # our own key in a context; its value is a plain string
_PLAIN = frozenset({str, int, float, bool, type(None)})  # types that need no conversion and contain no keys

EVENT_DICT = "_structlog"  # attribute of a record for structlog's fields, which may have any names
EVENT_NAME = "_prodkit_event"  # attribute that names the event, if the message is a sentence for other handlers
# Not makeLogRecord, which calls the record factory: attributes that a factory adds are not standard.
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    *("message", "asctime", "color_message", EVENT_DICT, EVENT_NAME)
}

# Characters that JSON allows in a string, but that terminals or line-based readers interpret: C1 controls, line and
# paragraph separators, and marks of text direction.
_UNSAFE = re.compile("[\x80-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROL_IN_BLOCK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# Renders a line from the standard fields, the fields of the event, and the values to mask in every field.
_Render: TypeAlias = Callable[[dict[str, Any], dict[str, Any], Sequence[str]], bytes]


class EventHandler(logging.Handler):
    """Write each record to standard output, as one line.

    `configure_logging` adds it to the root logger. A `logging.config` file can name it as well, so that a server's
    parent process, which never imports an app, writes JSON.

    Args:
        settings: Format and further key names to mask. The field `level` is not used.
        service: Name of the service, in every line.
        version: Version of the service, in every line.
        environment: Name of the environment, in every line.
        processors: Called with each event, in this order, before it is masked and rendered; see `configure_logging`.

    Attributes:
        output: Writer of the lines, with the numbers of lost lines.
        processors: The given processors.
    """

    def __init__(
        self,
        settings: "sections.LogSettings | None" = None,
        *,
        service: str = "fastapi-service",
        version: str = "0.0.0",
        environment: str = "dev",
        processors: "Iterable[Processor]" = (),
    ) -> None:
        from structlog.contextvars import get_contextvars  # noqa: PLC0415 - structlog is loaded where it is used

        super().__init__()
        settings = settings or sections.LogSettings()  # loaded here: access_log does not need it
        self._contextvars = get_contextvars
        self._redactor = Redactor(settings.redact)
        self._known_safe_keys: set[str] = set()  # keys of earlier events that need no masking
        self._static: dict[str, str] = {}
        self.output = LineWriter(settings.queue)
        self.processors = tuple(processors)
        self._render: _Render
        if settings.format == "json":
            self._static = {"service": service, "environment": environment, "version": version}
            self._render = self._json
        else:
            self._render = _Console(self._redactor)
        self._process = _processing(self.processors, self._render) if self.processors else self._render

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of the standard library or structlog. Never raises."""
        head = self._head(datetime.fromtimestamp(record.created, UTC), record.levelname.lower(), record.name)
        extras = {**self._contextvars(), **_context.of(record)}
        try:
            head["event"] = vars(record).get(EVENT_NAME) or record.getMessage().rstrip()
        except Exception as error:  # noqa: BLE001 - the message does not match its arguments, or a __str__ fails
            head["event"] = record.msg
            extras |= {"logging_error": error, "args": record.args}
        try:
            extras |= _record_fields(record)
            line = self._process(head, extras, [text for error in _errors(record) for text in inputs(error)])
        except Exception as error:  # noqa: BLE001 - logging must never raise; the line names the error
            line = self._render(head, {"logging_error": type(error).__name__}, ())
        if line:
            self._write(line)

    def writer(self, level: str, logger: str, event: str) -> Callable[[dict[str, Any]], None]:
        """Return a function that writes such events without a LogRecord: the fast path for lines of requests.

        The function takes the event's fields. Their values must be of plain types and their names must not be secret.
        It calls no processors.

        Args:
            level: In lower case. The caller has to check whether it is enabled.
            logger: Name of the logger.
            event: Value of the field `event`.
        """
        # Rendered once: the constant part of each line, inserted at the first comma, which is after the timestamp.
        head = orjson.dumps({"level": level, "event": event, "logger": logger, **self._static})
        rest, structured = b",%b," % head[1:-1], bool(self._static)

        def write(fields: dict[str, Any]) -> None:
            now = datetime.now(UTC)
            context = {**self._contextvars(), **(_context.current() or {})}
            if structured and fields and ((len(context) == 1 and _OURS in context) or self._is_plain(context)):
                line = _dump({"timestamp": now, **context, **fields})
                if line is not None:
                    self._write(line.replace(b",", rest, 1))
                    return
            self._write(self._render(self._head(now, level, logger) | {"event": event}, {**context, **fields}, ()))

        return write

    def _head(self, timestamp: datetime, level: str, logger: str) -> dict[str, Any]:
        return {"timestamp": timestamp, "level": level, "event": "", "logger": logger, **self._static}

    def _json(self, head: dict[str, Any], extras: dict[str, Any], withheld: Sequence[str]) -> bytes:
        # Fast path: the event has nothing to mask, to convert or to cut.
        if not withheld and self._is_plain(extras) and (quick := _dump(head | extras)) is not None:
            return quick
        fields = _join(head, extras)
        line = _encode(self._redactor.fields(fields, size=_SIZE, withheld=withheld))
        if len(line) > _LIMIT:
            line = _encode(self._redactor.fields(fields, size=_SMALL_SIZE, withheld=withheld))
        if len(self._known_safe_keys) < 1_000:  # noqa: PLR2004 - more than a program uses
            self._known_safe_keys |= {
                key for key in extras if type(key) is str and key not in head and not self._redactor.is_secret(key)
            }
        return line

    def _is_plain(self, extras: dict[str, Any]) -> bool:
        return self._known_safe_keys.issuperset(extras) and _PLAIN.issuperset(map(type, extras.values()))

    def close(self) -> None:
        """Wait up to two seconds until the queue, if there is one, has been written."""
        self.output.close()
        super().close()

    def _write(self, line: bytes) -> None:
        with self.lock:  # type: ignore[union-attr]  # so that a line is written in one piece; logging.Handler creates it
            self.output.write(line)


class _Console:
    """Render readable lines for development, with colours on a terminal."""

    def __init__(self, redactor: Redactor) -> None:
        from structlog.dev import ConsoleRenderer, plain_traceback  # noqa: PLC0415 - loaded where it is used

        self._redactor = redactor
        # structlog needs another package for colours on Windows.
        colours = sys.stdout is not None and os.name != "nt" and coloured(sys.stdout)
        # The other renderers of tracebacks show local variables, which may be secrets.
        self._render = ConsoleRenderer(colors=colours, exception_formatter=plain_traceback)

    def __call__(self, head: dict[str, Any], extras: dict[str, Any], withheld: Sequence[str]) -> bytes:
        fields: dict[str, Any] = {}
        for key, value in self._redactor.fields(_join(head, extras), size=_SIZE, withheld=withheld).items():
            control = _CONTROL_IN_BLOCK if key in ("exception", "stack") else _CONTROL
            fields[_CONTROL.sub(_escape, key)] = control.sub(_escape, value) if isinstance(value, str) else value
        if "timestamp" in head:
            fields["timestamp"] = head["timestamp"].astimezone().strftime("%H:%M:%S")
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return f"{self._render(None, '', fields)}\n".encode(encoding, "backslashreplace")


def _processing(processors: "Iterable[Processor]", render: _Render) -> _Render:
    """Return a renderer that calls the processors first; it returns b"" for an event that a processor drops."""
    from structlog import DropEvent  # noqa: PLC0415 - structlog is loaded where it is used

    def process(head: dict[str, Any], extras: dict[str, Any], withheld: Sequence[str]) -> bytes:
        event: Any = _join(head, extras)
        logger = logging.getLogger(head["logger"])
        try:
            for each in processors:
                event = each(logger, head["level"], event)
        except DropEvent:
            return b""
        fields = dict(event)
        # A processor may have changed any field, so all fields are masked, except the timestamp.
        time = {"timestamp": fields.pop("timestamp")} if isinstance(fields.get("timestamp"), datetime) else {}
        return render(time, fields, withheld)

    return process


def _errors(record: logging.LogRecord) -> Iterator[BaseException]:
    """Yield the exceptions in a record's `exc_info`, message and arguments."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    info = record.exc_info if isinstance(record.exc_info, tuple) else ()
    yield from (each for each in (*info[1:2], record.msg, *arguments) if isinstance(each, BaseException))


def _record_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return a record's fields, the most important first, because a large event is truncated at its end."""
    attributes = vars(record)
    extra = {key: attributes[key] for key in attributes if key not in _STANDARD}
    if EVENT_DICT in attributes:
        extra |= attributes[EVENT_DICT]
    if extra.get(_OURS) == _context.NO_REQUEST:  # set by RequestIDFilter for other handlers
        del extra[_OURS]
    fields: dict[str, Any] = {}
    if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        fields["exception"] = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    if record.stack_info:
        fields["stack"] = record.stack_info
    return _join(fields, extra) if fields else extra


def _join(head: dict[str, Any], extras: dict[str, Any]) -> dict[str, Any]:
    """Add fields to the standard ones; if a name exists already, `_` is appended to it."""
    return head | {(f"{key}_" if key in head else key): value for key, value in extras.items()}


def _dump(plain: dict[str, Any]) -> bytes | None:
    try:
        line = orjson.dumps(plain, option=_OPTIONS)
    except TypeError:  # a lone surrogate, or an integer over 64 bits
        return None
    if len(line) >= _SMALL_SIZE or may_hold_secret(line):
        return None
    return line if line.isascii() else _UNSAFE.sub(_escape, line.decode()).encode()


def _encode(plain: dict[str, Any]) -> bytes:
    return _UNSAFE.sub(_escape, orjson.dumps(plain, option=_OPTIONS).decode()).encode()


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]
