"""Events without a record: only while nothing in the process could observe the record."""

import functools
import logging
import subprocess
import sys

import pytest

from fastapi_prodkit.logging.direct import DirectWriter
from fastapi_prodkit.logging.handler import EventHandler

LOGGER = "test_logging_direct.child"


@pytest.fixture
def direct(monkeypatch):
    """Return a function that makes a writer, with only these handlers on the root logger."""

    def make(*handlers):
        monkeypatch.setattr(logging.root, "handlers", list(handlers or [EventHandler()]))
        return DirectWriter(logging.getLogger(LOGGER), "request")

    return make


def test_direct_line_equals_that_of_a_record(direct, capsys):
    """A line written without a record has the level, event and logger of a record and the given fields."""
    direct().find()({"number": 7})

    out = capsys.readouterr().out
    assert '"level":"info","event":"request","logger":"test_logging_direct.child"' in out
    assert out.endswith('"number":7}\n')


def test_direct_writer_uses_the_current_handler(direct, monkeypatch, capsys):
    """`configure_logging` may be called again."""
    writer = direct()
    assert writer.find() is writer.find()
    monkeypatch.setattr(logging.root, "handlers", [EventHandler(service="second")])

    writer.find()({"number": 7})

    assert '"service":"second"' in capsys.readouterr().out


@functools.cache
def loggers():
    """Return the logger, its parent, and the root."""
    return logging.getLogger(LOGGER), logging.getLogger("test_logging_direct"), logging.root


@pytest.mark.parametrize("logger", loggers(), ids=lambda logger: logger.name)
def test_another_handler_requires_records_while_it_is_added(direct, logger):
    """On the logger, a parent, or the root."""
    writer, further = direct(), logging.NullHandler()

    logger.addHandler(further)
    closed = writer.find()
    logger.removeHandler(further)

    assert closed is None
    assert writer.find() is not None


class OwnHandler(EventHandler):
    """A subclass of our handler."""


@pytest.mark.parametrize("handler", [logging.NullHandler, OwnHandler])
def test_subclass_of_the_handler_requires_records(direct, handler):
    """The direct writer is unavailable if the root handler is a subclass of `EventHandler` or another class."""
    assert direct(handler()).find() is None


def test_processors_require_records(direct, monkeypatch):
    """Processors on the handler disable the direct writer until a handler without processors replaces it."""
    writer = direct(EventHandler(processors=[lambda _logger, _method, event: event]))
    assert writer.find() is None

    monkeypatch.setattr(logging.root, "handlers", [EventHandler()])

    assert writer.find() is not None


def test_missing_handler_requires_records(direct, monkeypatch):
    """`dictConfig` may have removed it."""
    writer = direct()
    monkeypatch.setattr(logging.root, "handlers", [])

    assert writer.find() is None


def test_filters_require_records(direct):
    """Of the handler and of the logger."""
    handler = EventHandler()
    writer = direct(handler)

    for each in (handler, logging.getLogger(LOGGER)):
        each.addFilter(bool)
        assert writer.find() is None
        each.removeFilter(bool)

    assert writer.find() is not None


def test_handler_level_and_propagation_require_records(direct, monkeypatch):
    """A handler level above INFO, or a logger that does not propagate, disables the direct writer."""
    handler = EventHandler()
    writer = direct(handler)

    handler.setLevel(logging.WARNING)
    assert writer.find() is None
    handler.setLevel(logging.INFO)
    assert writer.find() is not None

    for logger in loggers()[:2]:
        with monkeypatch.context() as patch:
            patch.setattr(logger, "propagate", False)
            assert writer.find() is None


@pytest.mark.parametrize("factory", [functools.partial(logging.LogRecord), type("Own", (logging.LogRecord,), {})])
def test_record_factory_requires_records(direct, factory):
    """A custom record factory disables the direct writer, because the factory may add fields to the line."""
    writer = direct()

    logging.setLogRecordFactory(factory)
    try:
        assert writer.find() is None
    finally:
        logging.setLogRecordFactory(logging.LogRecord)

    assert writer.find() is not None


PATCHED = [
    *((logging.Logger, name) for name in ("makeRecord", "handle", "filter", "callHandlers")),
    *((logging.Handler, "handle"), (logging.LogRecord, "__init__"), (logging.LogRecord, "getMessage")),
]


class Proxy:
    """A proxy around a function, as wrapt makes: it compares equal to the function, and has its attributes."""

    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def __eq__(self, other):
        return self.wrapped == other

    __hash__ = None


def wrapper(function):
    """Return a wrapper with the name and module of the function."""

    @functools.wraps(function)
    def call(*args, **options):
        return function(*args, **options)

    return call


@pytest.mark.parametrize(("owner", "name"), PATCHED, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("wrap", [Proxy, wrapper])
def test_patched_function_requires_records(direct, monkeypatch, owner, name, wrap):
    """Patched before or after the app is built."""
    writer = direct()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrap(getattr(owner, name)))
        assert writer.find() is None

    assert writer.find() is not None


def test_logger_class_requires_records(direct, monkeypatch):
    """A logger class with its own `makeRecord` disables the direct writer, because it may change records."""
    own = type("Own", (logging.Logger,), {"makeRecord": lambda *args, **options: logging.makeLogRecord({})})
    monkeypatch.setattr(logging.getLogger(LOGGER), "__class__", own)

    assert direct().find() is None


PATCHED_BEFORE = """
import functools, logging
{patch}
from fastapi_prodkit.logging.direct import DirectWriter
from fastapi_prodkit.logging.handler import EventHandler
logging.root.handlers = [EventHandler()]
print(DirectWriter(logging.getLogger("a"), "request").find() is not None)
"""


@pytest.mark.parametrize(
    ("patch", "open_"),
    [
        ("", True),
        (
            "handle = logging.Logger.handle; logging.Logger.handle = functools.wraps(handle)(lambda *a: handle(*a))",
            False,
        ),
        ("logging.Logger.makeRecord = functools.partialmethod(logging.Logger.makeRecord)", False),
        ("logging.setLogRecordFactory(lambda *a, **k: logging.LogRecord(*a, **k))", False),
    ],
    ids=["nothing", "function", "object", "factory"],
)
def test_function_patched_before_the_import_requires_records(patch, open_):
    """As by `ddtrace-run`."""
    program = PATCHED_BEFORE.format(patch=patch)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout == f"{open_}\n"
