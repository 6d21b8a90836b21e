"""The direct way of an event: open only while nothing in the process could see a record of it."""

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
    """Return a function that makes a writer, with these handlers alone on the root logger; pytest adds its own late."""

    def make(*handlers):
        monkeypatch.setattr(logging.root, "handlers", list(handlers or [EventHandler()]))
        return DirectWriter(logging.getLogger(LOGGER), "request")

    return make


def test_the_direct_way_gives_the_line_of_the_contract(direct, capsys):
    """Level, event and logger are those that a record would have had."""
    direct().find()({"number": 7})

    out = capsys.readouterr().out
    assert '"level":"info","event":"request","logger":"test_logging_direct.child"' in out
    assert out.endswith('"number":7}\n')


def test_the_direct_way_leads_to_the_handler_that_is_there(direct, monkeypatch, capsys):
    """`configure_logging` may be called again while the app serves."""
    writer = direct()
    assert writer.find() is writer.find()
    monkeypatch.setattr(logging.root, "handlers", [EventHandler(service="second")])

    writer.find()({"number": 7})

    assert '"service":"second"' in capsys.readouterr().out


@functools.cache
def loggers():
    """Return the logger, the one above it, and the root."""
    return logging.getLogger(LOGGER), logging.getLogger("test_logging_direct"), logging.root


@pytest.mark.parametrize("logger", loggers(), ids=lambda logger: logger.name)
def test_a_further_handler_closes_the_direct_way_while_it_is_there(direct, logger):
    """Wherever it stands on the way of a record, and whenever it comes."""
    writer, further = direct(), logging.NullHandler()

    logger.addHandler(further)
    closed = writer.find()
    logger.removeHandler(further)

    assert closed is None
    assert writer.find() is not None


class OwnHandler(EventHandler):
    """A handler that may do anything with a record."""


@pytest.mark.parametrize("handler", [logging.NullHandler, OwnHandler])
def test_another_handler_closes_the_direct_way(direct, handler):
    """Only `EventHandler` itself is known to write what the direct way writes."""
    assert direct(handler()).find() is None


def test_processors_close_the_direct_way(direct, monkeypatch):
    """They see the events of records; a handler without any opens it again."""
    writer = direct(EventHandler(processors=[lambda _logger, _method, event: event]))
    assert writer.find() is None

    monkeypatch.setattr(logging.root, "handlers", [EventHandler()])

    assert writer.find() is not None


def test_no_handler_closes_the_direct_way(direct, monkeypatch):
    """`dictConfig` may have taken it away."""
    writer = direct()
    monkeypatch.setattr(logging.root, "handlers", [])

    assert writer.find() is None


def test_filters_close_the_direct_way(direct):
    """Those of the handler and of the logger see each record."""
    handler = EventHandler()
    writer = direct(handler)

    for each in (handler, logging.getLogger(LOGGER)):
        each.addFilter(bool)
        assert writer.find() is None
        each.removeFilter(bool)

    assert writer.find() is not None


def test_what_stops_a_record_closes_the_direct_way(direct, monkeypatch):
    """A handler's level, and loggers that do not propagate."""
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
def test_a_record_factory_closes_the_direct_way(direct, factory):
    """A factory adds fields that the line has to have."""
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
    """What wrapt puts around a function: it compares equal to it, and has all of its attributes."""

    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def __eq__(self, other):
        return self.wrapped == other

    __hash__ = None


def wrapper(function):
    """Return an ordinary wrapper, under the name and the module of the function."""

    @functools.wraps(function)
    def call(*args, **options):
        return function(*args, **options)

    return call


@pytest.mark.parametrize(("owner", "name"), PATCHED, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("wrap", [Proxy, wrapper])
def test_a_patched_function_of_the_standard_library_closes_the_direct_way(direct, monkeypatch, owner, name, wrap):
    """Agents patch them to see every record, before or after the app is built."""
    writer = direct()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrap(getattr(owner, name)))
        assert writer.find() is None

    assert writer.find() is not None


def test_a_logger_class_of_its_own_closes_the_direct_way(direct, monkeypatch):
    """`logging.setLoggerClass` is a way to see records as well."""
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
def test_what_was_patched_before_the_import_closes_the_direct_way(patch, open_):
    """`ddtrace-run` and its like patch before any module of the app is loaded."""
    program = PATCHED_BEFORE.format(patch=patch)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout == f"{open_}\n"
