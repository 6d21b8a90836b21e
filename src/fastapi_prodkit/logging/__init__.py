"""Log in one format: structlog, the standard library, the server and uncaught exceptions write lines of JSON.

    configure_logging(LogSettings(), service="orders", version="1.4.2", environment="prod")

One handler on the root logger turns each record into one line and writes the line to standard output in one call.
structlog's events go through the same handler, so level, fields, masking and maximum size do not depend on the library.
Values are data, never markup: a line break, a terminal sequence or a failing `__repr__` cannot forge, split or lose a
line.

`configure_logging` has process-wide effects: it sets the root logger's level, replaces its handlers that write to the
terminal, and configures the servers' loggers, structlog, `warnings` and the three hooks for uncaught exceptions.
Another call replaces the effects of the previous one.
"""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastapi_prodkit import _context, _scope, sections
from fastapi_prodkit._context import bind
from fastapi_prodkit.logging.handler import EVENT_DICT, EventHandler

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from structlog.types import Processor

__all__ = ["EventHandler", "RequestIDFilter", "bind", "configure_logging"]

_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "hypercorn.error", "gunicorn.error")
# Beginnings of uvicorn's lines that are dropped: access lines of WebSockets, which contain the query string with its
# tokens, and the message for every handshake that was refused with a response.
_REPEATED_LINES = ('%s - "WebSocket %s"', "ASGI callable returned without completing handshake.")
_SERVER_ACCESS = ("uvicorn.access", "hypercorn.access", "gunicorn.access")


def configure_logging(
    settings: "sections.LogSettings | None" = None,
    *,
    service: str = "fastapi-service",
    version: str = "0.0.0",
    environment: str = "dev",
    processors: "Iterable[Processor]" = (),
) -> None:
    """Write every log line of the process as one JSON object, or as readable text with `LOG_FORMAT=console`.

    Handlers that write to files or elsewhere stay. Handlers of other libraries' loggers stay as well.

    Args:
        settings: Level, format and further key names to mask.
        service: Name of the service, in every line.
        version: Version of the service, in every line.
        environment: Where it runs, in every line.
        processors: Called in this order for each event, before masking and rendering, with the logger, the level in
            lower case, and the fields of the line. Each returns the fields for the next one, or raises
            `structlog.DropEvent` to drop the line. After any other exception, the line has only `logging_error`, the
            message and the standard fields.

            def add_region(logger, method_name, event_dict):
                return {**event_dict, "region": "eu-central-1"}

            configure_logging(processors=[add_region])
    """
    settings = settings or sections.LogSettings()
    root = logging.getLogger()
    handler = EventHandler(settings, service=service, version=version, environment=environment, processors=processors)
    for existing in root.handlers[:]:
        if isinstance(existing, EventHandler) or _writes_to_terminal(existing):
            root.removeHandler(existing)
        if isinstance(existing, EventHandler):
            existing.close()
    root.addHandler(handler)
    root.setLevel(settings.level)
    _redirect_servers()
    for name in (*_SERVERS, *_SERVER_ACCESS):
        logging.getLogger(name).addFilter(_server_line)
    _configure_structlog()
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


class RequestIDFilter(logging.Filter):
    """Set the attribute `request_id` on each record, for your own formats.

        handler.addFilter(RequestIDFilter())
        handler.setFormatter(logging.Formatter("%(asctime)s %(request_id)s %(message)s"))

    Outside of a request it is `-`. A record that already has a `request_id` keeps it. `EventHandler` does not need it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attribute and return True."""
        vars(record).setdefault("request_id", _context.of(record).get("request_id") or _context.NO_REQUEST)
        return super().filter(record)


class LostLines:
    """Collector of prometheus_client that counts log lines that could not be written to standard output."""

    def collect(self) -> "Iterator[Metric]":
        """Yield the counter."""
        from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415 - loaded already where there is a registry

        lost = CounterMetricFamily("log_lines_lost", "Lines of the log that were not written.", labels=["reason"])
        outputs = [each.output for each in logging.root.handlers if isinstance(each, EventHandler)]
        lost.add_metric(["queue_full"], sum(output.dropped for output in outputs))
        lost.add_metric(["write_failed"], sum(output.failed for output in outputs))
        yield lost


def _writes_to_terminal(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return type(handler) is logging.StreamHandler and any(handler.stream is stream for stream in streams)


def _redirect_servers() -> None:
    """Send the servers' lines to the root handler; drop their access lines, which the access log replaces."""
    loggers = [logging.getLogger(name) for name in (*_SERVERS, *_SERVER_ACCESS)]
    theirs = [(logger, handler) for logger in loggers for handler in logger.handlers if _writes_to_terminal(handler)]
    for logger, handler in theirs:
        logger.removeHandler(handler)
    for name in _SERVERS if theirs else ():
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in _SERVER_ACCESS:
        # Like `uvicorn --no-access-log`: uvicorn checks hasHandlers() and then does not create a record.
        logging.getLogger(name).propagate = False


def _server_line(record: logging.LogRecord) -> bool:
    """Filter that sends a server's line to the root handler, and drops lines that repeat the access log.

    `uvicorn.run(app)` configures its loggers later than `configure_logging`. It replaces handlers but not filters, so
    this filter removes its handlers before the first line is written.
    """
    _redirect_servers()
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if _scope.take_logged_mark(error) or str(record.msg).startswith(_REPEATED_LINES):
        return False
    return record.levelno >= logging.getLogger(record.name).getEffectiveLevel()


def _configure_structlog() -> None:
    import structlog  # noqa: PLC0415 - structlog is loaded where it is used

    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, _to_record],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a cached logger would keep an older configuration
    )


def _to_record(_logger: Any, _method: str, event: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Processor that turns an event into the arguments of a standard library logger; the last one."""
    known = {key: event.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in event}
    arguments = (event.pop("event", None), *event.pop("positional_args", ()))
    return arguments, {**known, "extra": {EVENT_DICT: event}}


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("sys.excepthook").critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else None
        logging.getLogger("threading.excepthook").error(
            "uncaught exception in a thread", exc_info=args.exc_value, extra={"thread_name": name}
        )


def _unraisable(args: Any) -> None:  # sys.UnraisableHookArgs exists for type checkers only
    logging.getLogger("sys.unraisablehook").error(
        args.err_msg or "exception ignored", exc_info=args.exc_value, extra={"ignored_in": args.object}
    )
