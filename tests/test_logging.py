"""Every line of the process is one JSON object, without secrets, of bounded size, whoever logs it."""

import asyncio
import http.client
import io
import json
import logging
import logging.config
import math
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
import structlog
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, SecretStr

from fastapi_prodkit import Settings, _context, _scope, create_app
from fastapi_prodkit.logging import EventHandler, LostLines, RequestIDFilter, bind, configure_logging
from fastapi_prodkit.logging.redaction import Redactor
from fastapi_prodkit.sections import LogSettings

SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "hypercorn.error", "gunicorn.error")
ACCESS = ("uvicorn.access", "hypercorn.access", "gunicorn.access")
PAGE = Path(__file__).parent.parent / "docs" / "pieces" / "logging.md"


@pytest.fixture(autouse=True)
def restored():
    """Give the servers' loggers and structlog back as well."""
    loggers = [logging.getLogger(name) for name in (*SERVERS, *ACCESS)]
    before = [(each, each.handlers[:], each.filters[:], each.level, each.propagate) for each in loggers]
    yield
    for logger, handlers, filters, level, propagate in before:
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate
        logger.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    _context._fields.set(None)


@pytest.fixture
def lines(capsys):
    """Return what was written since, one parsed object a line; nothing may be on standard error."""

    def read() -> list[dict]:
        out, err = capsys.readouterr()
        assert err == ""
        assert out == "" or out.endswith("\n")
        return [json.loads(line) for line in out.splitlines()]

    return read


def handler() -> EventHandler:
    return next(each for each in logging.getLogger().handlers if isinstance(each, EventHandler))


@contextmanager
def without_pytest():
    """Take away pytest's own handlers, which raise where the standard library's print."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, [handler()]
    yield
    root.handlers = before


class Broken:
    def __str__(self):
        raise RuntimeError("broken __str__")

    __repr__ = __str__


# What every line carries


def test_a_line_of_the_standard_library_carries_the_fields_of_the_contract(lines):
    """Time in UTC, level, event, logger, and who is speaking."""
    configure_logging(service="orders", version="1.4.2", environment="prod")

    logging.getLogger("third.party").warning("%d left\n", 3, extra={"shelf": "A"})

    [line] = lines()
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset().total_seconds() == 0
    assert line == {
        "level": "warning",
        "event": "3 left",
        "logger": "third.party",
        "service": "orders",
        "environment": "prod",
        "version": "1.4.2",
        "shelf": "A",
    }


def test_timestamps_are_utc_and_say_so_with_a_z(lines):
    """Log stores read ISO 8601 with a Z, in quick lines and in careful ones."""
    configure_logging()

    logging.getLogger("a").info("plain")
    logging.getLogger("a").info("key: value")

    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line["timestamp"]) for line in lines())


def test_structlog_events_are_lines_of_the_same_kind(lines):
    """Names that records of the standard library reserve are free for structlog's fields."""
    configure_logging(service="orders")

    structlog.get_logger("shop").bind(order=7).info("paid %s", "twice", name="Ada", message="m", args=[1])

    [line] = lines()
    assert line["event"] == "paid twice"
    assert (line["logger"], line["level"], line["service"]) == ("shop", "info", "orders")
    assert (line["order"], line["name"], line["message"], line["args"]) == (7, "Ada", "m", [1])


def test_a_structlog_logger_without_a_name_is_named_after_its_module(lines):
    """`structlog.get_logger()` says where the line comes from."""
    configure_logging()

    structlog.get_logger().info("hello")

    assert lines()[0]["logger"] == __name__


def test_a_field_cannot_take_the_place_of_what_every_line_has(lines):
    """A field called `level` or `exception` is kept under another name."""
    configure_logging(service="orders")
    log = structlog.get_logger("shop")

    try:
        raise ValueError("real")
    except ValueError:
        log.exception("event", level="fine", service="theirs", exception="theirs")

    [line] = lines()
    assert (line["level"], line["level_"]) == ("error", "fine")
    assert (line["service"], line["service_"]) == ("orders", "theirs")
    assert line["exception"].endswith("ValueError: real")
    assert line["exception_"] == "theirs"


def test_an_exception_is_one_field_with_the_whole_traceback(lines):
    """Causes are part of it, and so is nothing else: one event in the log store, not forty."""
    configure_logging()

    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError:
        logging.getLogger("a").exception("failed")

    [line] = lines()
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert "KeyError: 'inner'" in line["exception"]
    assert line["exception"].endswith("RuntimeError: outer")


def test_no_exception_is_no_field(lines):
    """`exc_info=True` without an exception is a line without traceback."""
    configure_logging()

    logging.getLogger("a").error("nothing happened", exc_info=True)  # noqa: LOG014 - the point

    assert "exception" not in lines()[0]


def test_stack_info_is_a_field(lines):
    """`stack_info=True` shows where the call is."""
    configure_logging()

    logging.getLogger("a").info("here", stack_info=True)
    structlog.get_logger("a").info("here", stack_info=True)

    assert all("test_stack_info_is_a_field" in line["stack"] for line in lines())


def test_levels_below_the_setting_are_not_written(lines):
    """LOG_LEVEL holds for both ways to log, and for a single logger the program may say otherwise."""
    configure_logging(LogSettings(level="warning"))
    logging.getLogger("chatty").setLevel("DEBUG")

    logging.getLogger("a").info("no")
    structlog.get_logger("a").info("no")
    structlog.get_logger("chatty").debug("yes")
    logging.getLogger("chatty").setLevel("NOTSET")

    assert [line["event"] for line in lines()] == ["yes"]


# The request context


def test_bound_fields_reach_sync_routes_and_background_tasks(lines):
    """What is bound in the request is on every line of it, in any thread."""
    configure_logging()
    app = FastAPI()

    @app.get("/")
    def route(tasks: BackgroundTasks):
        bind(order=7)
        logging.getLogger("route").info("in the threadpool")
        tasks.add_task(logging.getLogger("task").info, "after the response")

    async def with_context(scope, receive, send):
        token = _context.begin({"request_id": "abcdefgh"})
        try:
            await app(scope, receive, send)
            logging.getLogger("edge").info("done")
        finally:
            _context.end(token)

    TestClient(with_context).get("/")

    found = [line for line in lines() if line["logger"] in {"route", "task", "edge"}]
    assert [(line["logger"], line["request_id"], line["order"]) for line in found] == [
        ("route", "abcdefgh", 7),
        ("task", "abcdefgh", 7),
        ("edge", "abcdefgh", 7),
    ]


async def test_structlog_contextvars_are_on_every_line(lines):
    """`structlog.contextvars.bind_contextvars` works for lines of the standard library as well, and in async calls."""
    configure_logging()
    structlog.contextvars.bind_contextvars(tenant="acme")

    logging.getLogger("a").info("one")
    await structlog.get_logger("a").ainfo("two")

    assert [line["tenant"] for line in lines()] == ["acme", "acme"]


FACTORY = """
import logging

def factory(*args, **options):
    record = logging.LogRecord(*args, **options)
    record.trace_id = "abc"
    return record

logging.setLogRecordFactory(factory)
from fastapi_prodkit.logging import configure_logging
configure_logging()
logging.getLogger("a").info("hello")
"""


def test_fields_of_a_record_factory_are_on_every_line():
    """Those of a factory that was set before the import as well, as `opentelemetry-instrument` does."""
    done = subprocess.run([sys.executable, "-c", FACTORY], capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(done.stdout)["trace_id"] == "abc"


# The direct way of the access line


def write_quickly(**fields):
    """Write an event as the access log does, without a record."""
    handler().writer("info", "fastapi_prodkit.access", "request")(fields)


def test_a_writer_writes_the_line_of_the_contract(lines):
    """The access log's way gives the same line as a record would."""
    configure_logging(service="orders")
    _context.begin({"request_id": "abcdefgh"})

    for _ in range(2):
        write_quickly(http_route="/items/{item_id}", http_status=200, duration_ms=1.5)

    first, second = lines()
    assert first.pop("timestamp") <= second.pop("timestamp")
    assert first == second
    assert list(first) == [
        *("level", "event", "logger", "service", "environment", "version"),
        *("request_id", "http_route", "http_status", "duration_ms"),
    ]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("/reset?token=abc", "/reset?token=[redacted]"),
        ("postgres://u:pw@db/x", "postgres://u:[redacted]@db/x"),
        ("Bearer abc", "Bearer [redacted]"),
        ("password: abc", "password: [redacted]"),
        ("{'password':'abc'}", "{'password':[redacted]}"),
        ("('cookie', 'abc')", "('cookie', [redacted])"),
        ('{"password":"abc"}', '{"password":[redacted]}'),
        ("\ud800", "\\ud800"),
        (2**64, str(2**64)),
        (math.nan, None),
        ("é", "é"),
        ("x" * 50_000, "x" * 50_000),
    ],
)
def test_a_writer_is_as_careful_as_a_record(lines, value, written):
    """What the quick way cannot vouch for goes the careful way; a key that was harmless before does not vouch."""
    configure_logging()
    write_quickly(field="harmless")

    write_quickly(field=value)

    assert lines()[1]["field"] == written


def test_a_writer_writes_structlogs_context(lines):
    """The same fields as a record's line."""
    configure_logging()
    _context.begin({"request_id": "abcdefgh"})
    structlog.contextvars.bind_contextvars(tenant="acme")

    write_quickly(field=1)

    [line] = lines()
    assert (line["request_id"], line["tenant"], line["field"]) == ("abcdefgh", "acme", 1)


def test_a_writer_masks_keys_of_the_context(lines):
    """A secret that was bound is masked on the access line as well, each time."""
    configure_logging(LogSettings(redact=("pin",)))
    _context.begin({"user_token": "abc", "pin": "1234"})

    for _ in range(2):
        write_quickly()

    assert [(line["user_token"], line["pin"]) for line in lines()] == [("[redacted]", "[redacted]")] * 2


def test_a_time_in_the_context_is_not_the_time_of_the_line(lines):
    """What was bound under the name of a field of the contract is kept under another, here as everywhere."""
    configure_logging()
    _context.begin({"timestamp": "yesterday"})

    write_quickly(field=1)

    [line] = lines()
    assert line["timestamp_"] == "yesterday"
    assert line["timestamp"].endswith("Z")


def test_the_quick_way_does_not_remember_keys_without_end(lines):
    """Keys that a client chooses cannot fill the memory."""
    configure_logging()

    for number in range(1_200):
        logging.getLogger("a").info("event", extra={f"key_{number}": 1})

    assert len(lines()) == 1_200
    assert len(handler()._known_safe_keys) <= 1_000


# The request id in other formats


@pytest.fixture
def formatted():
    """A handler of others that writes the request id, in front of ours; return what it has written."""
    stream = io.StringIO()
    theirs = logging.StreamHandler(stream)
    theirs.addFilter(RequestIDFilter())
    theirs.setFormatter(logging.Formatter("%(request_id)s %(message)s"))
    logging.root.addHandler(theirs)
    return stream


def test_a_filter_puts_the_request_id_on_the_records_of_any_handler(formatted, lines):
    """In a request; outside of one there is a dash, which our own lines leave out."""
    configure_logging()

    logging.getLogger("a").info("before")
    _context.begin({"request_id": "abcdefgh"})
    logging.getLogger("a").info("during")

    assert formatted.getvalue() == "- before\nabcdefgh during\n"
    assert [line.get("request_id") for line in lines()] == [None, "abcdefgh"]


def test_a_filter_keeps_the_request_id_that_a_record_has(formatted):
    """A record that comes through a queue was made in a request, and is formatted outside of any."""
    logging.getLogger("a").warning("later", extra={"request_id": "abcdefgh"})

    assert formatted.getvalue() == "abcdefgh later\n"


def test_a_filter_can_be_named_in_a_configuration():
    """`dictConfig` makes it like any other, and its name narrows it like any other."""
    filters = {"request_id": {"()": "fastapi_prodkit.logging.RequestIDFilter", "name": "shop"}}
    handlers = {"elsewhere": {"class": "logging.NullHandler", "filters": ["request_id"]}}
    loggers = {"shop": {"handlers": ["elsewhere"]}}
    settings = {"filters": filters, "handlers": handlers, "loggers": loggers}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **settings})
    [elsewhere] = logging.getLogger("shop").handlers
    logging.getLogger("shop").removeHandler(elsewhere)
    record, other = (logging.makeLogRecord({"name": name}) for name in ("shop", "other"))

    assert [bool(elsewhere.filter(each)) for each in (record, other)] == [True, False]
    assert record.request_id == "-"


# Masking


@pytest.mark.parametrize(
    "key",
    [
        *("password", "Authorization", "cookie", "Set-Cookie", "X-API-Key", "apiKey", "client_secret", "access_token"),
        *("refreshToken", "private_key", "session", "session_id", "dsn", "SENTRY_DSN", "aws_secret_access_key", "pin"),
        "card-number",
    ],
)
def test_a_secret_key_hides_its_value(lines, key):
    """Case, `-` and `_` make no difference, depth neither."""
    configure_logging(LogSettings(redact=("pin", "Card_Number")))

    logging.getLogger("a").info("event", extra={key: "hunter2", "data": [{"deep": {key: ["hunter2"]}}]})

    [line] = lines()
    assert line[key] == "[redacted]"
    assert line["data"] == [{"deep": {key: "[redacted]"}}]


def test_headers_as_asgi_has_them_are_masked(lines):
    """A scope's headers are pairs of bytes, not a mapping."""
    configure_logging()

    logging.getLogger("a").info("event", extra={"headers": [(b"host", b"a"), (b"authorization", b"Basic YTpi")]})

    assert lines()[0]["headers"] == [["host", "a"], ["authorization", "[redacted]"]]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql+asyncpg://u:pw@db:5432/x", "postgresql+asyncpg://u:[redacted]@db:5432/x"),
        ("postgres://u:p@s/s:w@db/x and redis://:pw@r/0", "postgres://u:[redacted]@db/x and redis://:[redacted]@r/0"),
        ("http://localhost:8000/users/me@example.com", "http://localhost:8000/users/me@example.com"),
        ("Uvicorn running on http://127.0.0.1:8000 (Press CTRL+C)", None),
        ("sent Authorization: Bearer abc.def-ghi to x", "sent Authorization: [redacted]"),
        ("got bearer abc.def-ghi, sorry", "got bearer [redacted], sorry"),
        ("Cookie: a=b; c=d\r\nHost: x", "Cookie: [redacted]\r\nHost: x"),
        ("GET /x?api_key=abc&page=2&access-token=def", "GET /x?api_key=[redacted]&page=2&access-token=[redacted]"),
        ("login(user='ada', password='it\\'s', n=1)", "login(user='ada', password=[redacted], n=1)"),
        ('{"client_secret": "a b c", "id": 1}', '{"client_secret": [redacted], "id": 1}'),
        ('"{\\"token\\": \\"abc\\"}"', '"{\\"token\\": [redacted]}"'),
        ("DB_PASSWORD = hunter2", "DB_PASSWORD = [redacted]"),
        ("authorization=Basic YTpi&token=Bearer abc", "authorization=[redacted]&token=Bearer [redacted]"),
        ("[(b'host', b'a'), (b'cookie', b'a=b; c=d')]", "[(b'host', b'a'), (b'cookie', [redacted])]"),
        ("if token == expected:", None),
        ("total_tokens=512 tokenizer: x", None),
        (
            "DETAIL:  Key (email)=(a@b.c)\nexists.\n[SQL: INSERT]\n[parameters: ('a@b.c',)]\n(Background: x)",
            "DETAIL:  [redacted]\n[SQL: INSERT]\n[parameters: [redacted]\n(Background: x)",
        ),
        ("[type=int, input_value='hunter2', input_type=str]", "[type=int, input_value=[redacted], input_type=str]"),
    ],
)
def test_secrets_in_any_text_are_masked(lines, text, masked):
    """In messages, values and tracebacks; the rest of the text stays as it is. None means: all of it."""
    configure_logging()

    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("a").exception(text, extra={"value": text})

    [line] = lines()
    assert line["event"] == line["value"] == (masked or text)
    assert line["exception"].endswith(f"ValueError: {masked or text}")


def test_masking_masked_text_changes_nothing():
    """A line that passes twice, as from a child process, stays readable."""
    redactor = Redactor()
    text = "postgres://u:pw@db/x password='a' Bearer b token=c\nCookie: d=e\nDETAIL: f"

    once = redactor.text(text)

    assert redactor.text(once) == once


# Size


@pytest.mark.parametrize(
    "fields",
    [
        {"a": "x" * 1_000_000},
        {"a": "\x00" * 1_000_000, "b": "\x85" * 100_000},
        {"a": "\x85" * 100_000},
        {f"f{number}": "x" * 300_000 for number in range(30)},
        {f"f{number}": number for number in range(50_000)},
        {"a": list(range(200_000))},
        {"a": [[["x" * 1000] * 100] * 100] * 100},
        {"a": {f"k{number}" * 100: number for number in range(10_000)}},
        {"a": b"\xff" * 1_000_000},
        {"a": set(range(100_000))},
    ],
)
def test_no_line_is_longer_than_a_log_store_takes(capsys, fields):
    """256 KB less the overhead; what is left is valid, says that it was cut, and keeps what finds the line."""
    configure_logging()
    _context.begin({"request_id": "abcdefgh"})

    try:
        raise ValueError("the end of the traceback")
    except ValueError:
        logging.getLogger("a").exception("huge", extra=fields)

    out = capsys.readouterr().out
    line = json.loads(out)
    assert len(out.encode()) <= 262_144 - 26
    assert (line["level"], line["event"], line["logger"]) == ("error", "huge", "a")
    assert line["request_id"] == "abcdefgh"
    assert line["exception"].endswith("ValueError: the end of the traceback")
    assert "[cut" in out


def test_a_cut_text_keeps_both_ends_and_says_how_much_is_missing(lines):
    """Of a traceback the end matters most, of a statement the beginning."""
    configure_logging()

    logging.getLogger("a").info("begin%send", "x" * 500_000)

    [line] = lines()
    head, missing, tail = re.fullmatch(
        r"(begin x*|beginx*)\.\.\.\[cut (\d+) characters\]\.\.\.(x*)", line["event"]
    ).groups()
    assert len(head) + int(missing) + len(tail) == 500_008
    assert len(head) > 50_000


def test_a_secret_at_the_place_of_a_cut_is_not_half_shown(lines):
    """A DSN that loses its host does not show its password."""
    configure_logging()
    dsn = "postgres://user:hunter2@host/db "

    for shift in range(0, 40, 5):
        logging.getLogger("a").info("%s", "x" * shift + dsn * 7_000)

    for line in lines():
        assert "hunter2" not in line["event"]
        assert not re.search(r"user:h", line["event"])


# Hostile values


class Colour(Enum):
    RED = "red"


class Login(BaseModel):
    name: str
    key: SecretStr
    password: str = "hunter2"


@dataclass
class Account:
    name: str
    token: str
    hidden: str = field(default="hunter2", repr=False)


class Pair(NamedTuple):
    user: str
    password: str


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (bytearray(b"a"), "a"),
        (memoryview(b"a"), "a"),
        (math.nan, None),
        (math.inf, None),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 1}), [1, 2]),
        ((1, "a"), [1, "a"]),
        (deque([1]), [1]),
        (Broken(), "[unprintable Broken]"),
        ([Broken(), 1], ["[unprintable Broken]", 1]),
        ({Broken(): 1}, {"[unprintable Broken]": 1}),
        ("\udcff", "\\udcff"),
        (2**63, 2**63),
        (-(2**64), str(-(2**64))),
        (10**5000, "[unprintable int]"),
        ({1: "a", None: "b", (1, 2): "c"}, {"1": "a", "None": "b", "[1, 2]": "c"}),
        (Colour.RED, "red"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (Path("a/b"), "a/b"),
        (Account("ada", "abc"), {"name": "ada", "token": "[redacted]"}),
        (Account, f"<class '{__name__}.Account'>"),
        (Login(name="ada", key="hunter2"), {"name": "ada", "key": "**********", "password": "[redacted]"}),
        (Pair("ada", "hunter2"), {"user": "ada", "password": "[redacted]"}),
        (ValueError("no\nway"), "ValueError: no\nway"),
        (ValueError(Broken()), "[unprintable ValueError]"),
        (None, None),
        (True, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_written_as_plain_json(lines, value, written):
    """Nothing that is logged can make the line unreadable, or be lost with an exception in the caller."""
    configure_logging()

    structlog.get_logger("a").info("event", value=value)

    assert lines()[0]["value"] == written


def test_values_that_contain_themselves_are_cut(lines):
    """A circle ends, and the rest of the event is there."""
    configure_logging()
    circle = {"name": "circle"}
    circle["self"] = [circle]

    structlog.get_logger("a").info("event", circle=circle, after=1)

    [line] = lines()
    assert line["circle"]["self"][0]["name"] == "circle"
    assert "[cut]" in json.dumps(line)
    assert line["after"] == 1


def test_nothing_is_consumed_by_being_logged(lines):
    """An iterator still has its values afterwards."""
    configure_logging()
    numbers = iter([1, 2])

    structlog.get_logger("a").info("event", numbers=numbers)

    assert "list_iterator" in lines()[0]["numbers"]
    assert list(numbers) == [1, 2]


def test_a_value_cannot_forge_a_line_or_colour_a_terminal(capsys):
    """Line breaks of every kind, terminal sequences and direction marks are escaped, and come back when parsed."""
    configure_logging()
    text = 'a\r\n{"event":"forged"}\x1b[31m\x85\u2028\u2029\x9b31m\u202e\x00'

    logging.getLogger("a").info("%s", text, extra={text: text, "plain": "\x85\u2028"})
    logging.getLogger("a").info("x", extra={"plain": "\x85\u2028"})
    logging.getLogger("a").info("x", extra={"plain": "\x85\u2028"})

    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\x80-\x9f\u2028-\u202e]", out)
    assert json.loads(out.split("\n")[0])["event"] == text.rstrip()
    assert json.loads(out.split("\n")[0])[text] == text


@pytest.mark.parametrize("get_logger", [logging.getLogger, structlog.get_logger])
def test_a_message_that_does_not_fit_its_arguments_is_logged_as_it_is(lines, get_logger):
    """A mistake in a logging call does not reach the caller, and does not hide either."""
    configure_logging()

    with without_pytest():
        get_logger("a").error("%d of %d", "one")

    [line] = lines()
    assert line["event"] == "%d of %d"
    assert line["logging_error"].startswith("TypeError: ")
    assert line["args"] == ["one"]


def test_a_message_that_cannot_be_printed_is_logged_as_such(lines):
    """Even the message may be an object whose `__str__` fails."""
    configure_logging()

    with without_pytest():
        logging.getLogger("a").error(Broken())

    [line] = lines()
    assert line["event"] == "[unprintable Broken]"
    assert line["logging_error"] == "RuntimeError: broken __str__"


def test_an_exception_that_cannot_be_printed_leaves_a_line(lines):
    """What fails in the middle of the traceback does not reach the caller."""
    configure_logging()

    class HostileError(Exception):
        @property
        def __cause__(self):
            raise RuntimeError

    with without_pytest():
        logging.getLogger("a").error("failed", exc_info=HostileError())

    [line] = lines()
    assert line["event"] == "failed"
    assert line["logging_error"] == "RuntimeError"


# Processors


def add_region(_logger, _method, event):
    return {**event, "region": "eu"}


@pytest.mark.parametrize("get_logger", [logging.getLogger, structlog.get_logger])
def test_processors_see_and_change_each_event(lines, get_logger):
    """One after the other, with the logger, the level and every field of the line, whoever logs."""
    seen = []

    def note(logger, method, event):
        seen.append((logger.name, method, dict(event)))
        event["event"] = event["event"].upper()
        del event["version"]
        return event

    configure_logging(service="orders", processors=[note, add_region])
    get_logger("shop").warning("paid", extra={"order": 7})

    [line] = lines()
    [(name, method, event)] = seen
    assert (name, method, event["event"], event["service"]) == ("shop", "warning", "paid", "orders")
    assert isinstance(event["timestamp"], datetime)
    assert (line["event"], line["region"], line["level"], "version" in line) == ("PAID", "eu", "warning", False)
    assert next(iter(line)) == "timestamp"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_event_that_a_processor_drops_has_no_line(capsys, log_format):
    """The others have theirs, and later processors do not see it."""
    seen = []

    def drop(_logger, _method, event):
        if event["event"] == "noise":
            raise structlog.DropEvent
        return event

    def note(_logger, _method, event):
        seen.append(event["event"])
        return event

    configure_logging(LogSettings(format=log_format), processors=[drop, note])
    logging.getLogger("shop").info("noise")
    logging.getLogger("shop").info("signal")

    out = capsys.readouterr().out
    assert (out.count("\n"), "signal" in out, seen) == (1, True, ["signal"])


@pytest.mark.parametrize(
    ("added", "written"),
    [
        ({"password": "hunter2"}, "[redacted]"),
        ({"deep": [{"token": "hunter2"}]}, [{"token": "[redacted]"}]),
        ({"note": "Bearer hunter2"}, "Bearer [redacted]"),
        ({"event": {"cookie": "hunter2"}}, {"cookie": "[redacted]"}),
        ({"timestamp": {"secret": "hunter2"}}, {"secret": "[redacted]"}),
        ({"level": "password=hunter2"}, "password=[redacted]"),
        ({"value": Broken()}, "[unprintable Broken]"),
    ],
)
def test_what_a_processor_adds_is_masked(lines, added, written):
    """Masking comes last, also for the second event, whose keys are known; nothing that is added escapes it."""
    configure_logging(processors=[lambda _logger, _method, event: event | added])

    for _ in range(2):
        logging.getLogger("shop").info("paid")

    [key] = added
    assert [line[key] for line in lines()] == [written, written]


@pytest.mark.parametrize("returned", [None, "a line", ["timestamp"]], ids=str)
def test_a_processor_that_fails_leaves_a_line(lines, returned):
    """The caller gets no exception, also if the result is no dict; the line says so, and leaves the fields out."""

    def broken(_logger, _method, _event):
        if returned is None:
            raise RuntimeError("broken")
        return returned

    configure_logging(service="orders", processors=[broken])
    with without_pytest():
        logging.getLogger("shop").info("paid", extra={"order": 7})

    [line] = lines()
    assert (line["event"], line["level"], line["service"], "order" in line) == ("paid", "info", "orders", False)
    assert line["logging_error"] == ("RuntimeError" if returned is None else "ValueError")


def test_structlogs_own_processors_fit(lines, capsys):
    """Also one that makes a text of the time; on the console it is shown as that."""
    stamp = structlog.processors.TimeStamper(fmt="%Y", key="timestamp")

    configure_logging(processors=[stamp])
    logging.getLogger("shop").info("paid")
    [line] = lines()
    configure_logging(LogSettings(format="console"), processors=[stamp])
    logging.getLogger("shop").info("paid")

    assert re.fullmatch(r"\d{4}", line["timestamp"])
    assert re.match(r"\d{4} \[info *\] paid +\[shop\]$", capsys.readouterr().out.strip())


def test_processors_see_access_lines(lines):
    """The access log makes a record of each request while there are processors."""
    settings = Settings(environment="test")
    app = create_app(settings)
    configure_logging(settings.log, processors=[add_region])

    with TestClient(app) as client:
        status = client.get("/nowhere").status_code

    [line] = [each for each in lines() if each["logger"] == "fastapi_prodkit.access"]
    assert (status, line["http_status"], line["region"]) == (404, 404, "eu")


# Where lines go


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
def test_a_standard_output_that_is_gone_does_not_reach_the_caller(monkeypatch, stream):
    """A service whose log cannot be written serves on."""

    class BrokenPipe(io.StringIO):
        buffer = property(lambda self: self)

        def write(self, line):
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    configure_logging()

    monkeypatch.setattr(sys, "stdout", {"closed": closed, "broken": BrokenPipe()}.get(stream))

    logging.getLogger("a").info("lost")
    write_quickly(lost=True)


def test_lost_lines_are_counted_by_reason(monkeypatch):
    """A process that cannot say so in its log says so in its metrics."""
    configure_logging()
    monkeypatch.setattr(sys, "stdout", None)

    logging.getLogger("a").info("lost")

    [family] = LostLines().collect()
    assert {sample.labels["reason"]: sample.value for sample in family.samples} == {"queue_full": 0, "write_failed": 1}


def test_json_is_utf_8_whatever_standard_output_is(monkeypatch):
    """RFC 8259 section 8.1 leaves no choice, and every character arrives."""
    raw = io.BytesIO()
    configure_logging()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1", write_through=True))

    logging.getLogger("a").info("café €uro 😀")

    assert json.loads(raw.getvalue().decode())["event"] == "café €uro 😀"


def test_a_line_is_one_write_however_long_it_is(monkeypatch):
    """Workers share one pipe: what is written in two pieces is torn apart by another worker's line."""

    class Counting(io.RawIOBase):
        def __init__(self):
            self.sizes = []

        def writable(self):
            return True

        def write(self, data):
            self.sizes.append(len(data))
            return len(data)

    raw = Counting()
    configure_logging()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))

    logging.getLogger("a").info("x" * 100_000)
    logging.getLogger("a").info("short")

    assert len(raw.sizes) == 2
    assert raw.sizes[0] > 100_000


def test_a_pipe_that_takes_a_part_gets_the_rest(monkeypatch, tmp_path):
    """What the system did not take at once is written afterwards, and other threads wait for it."""

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:50])

    path = tmp_path / "log"
    with Slow(path, "w") as raw:
        configure_logging()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
        logging.getLogger("a").info("x" * 500)
        monkeypatch.undo()

    assert json.loads(path.read_text())["event"] == "x" * 500


def test_a_stream_of_text_gets_lines_as_well(monkeypatch):
    """Some programs put something there that takes text only."""
    stream = io.StringIO()
    configure_logging()
    monkeypatch.setattr(sys, "stdout", stream)

    logging.getLogger("a").info("hello")

    assert json.loads(stream.getvalue())["event"] == "hello"


def test_lines_of_many_threads_stay_whole(lines):
    """Threads do not write into each other's lines."""
    configure_logging()

    def work():
        for _ in range(50):
            logging.getLogger("a").info("x" * 500)
            write_quickly(field="y" * 500)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(lines()) == 800


def test_configuring_twice_replaces_the_first_configuration(lines):
    """No line is doubled, and the second settings hold for loggers made before."""
    configure_logging(service="first")
    log = structlog.get_logger("a")
    log.info("one")

    configure_logging(LogSettings(level="ERROR"), service="second")
    log.info("two")
    log.error("three")
    logging.getLogger("a").error("four")

    assert [(line["event"], line["service"]) for line in lines()] == [
        ("one", "first"),
        ("three", "second"),
        ("four", "second"),
    ]


def test_only_handlers_that_write_to_the_terminal_are_replaced(capsys, tmp_path, caplog):
    """What others put on the root logger stays, unless it would print every line again."""
    elsewhere = logging.StreamHandler(io.StringIO())
    file = logging.FileHandler(tmp_path / "log")
    root = logging.getLogger()
    for each in (logging.StreamHandler(), logging.StreamHandler(sys.stdout), elsewhere, file):
        root.addHandler(each)

    configure_logging()
    logging.getLogger("a").info("hello")
    file.close()

    assert capsys.readouterr().out.count("hello") == 1
    assert elsewhere.stream.getvalue() == (tmp_path / "log").read_text() == "hello\n"
    assert caplog.messages == ["hello"]


# The server's lines


def test_uvicorn_may_configure_its_loggers_before_or_after(lines):
    """Its own configuration would print text, twice and to standard error; ours wins at the first line."""
    from uvicorn.config import LOGGING_CONFIG

    logging.config.dictConfig(LOGGING_CONFIG)
    configure_logging()
    logging.getLogger("uvicorn.error").info("before", extra={"color_message": "\x1b[1mbefore"})
    logging.config.dictConfig(LOGGING_CONFIG)
    logging.getLogger("uvicorn.error").info("after")
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1", "GET", "/", "1.1", 200)

    found = lines()
    assert [(line["event"], line["logger"]) for line in found] == [
        ("before", "uvicorn.error"),
        ("after", "uvicorn.error"),
    ]
    assert "color_message" not in found[0]
    assert not logging.getLogger("uvicorn.access").hasHandlers()


def test_the_level_holds_for_the_server_that_configures_its_own(lines):
    """LOG_LEVEL=WARNING silences a server whose configuration says INFO."""
    from uvicorn.config import LOGGING_CONFIG

    configure_logging(LogSettings(level="WARNING"))
    logging.config.dictConfig(LOGGING_CONFIG)

    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("careful")

    assert [line["event"] for line in lines()] == ["careful"]


def test_a_file_that_gets_the_servers_access_lines_keeps_getting_them(tmp_path, lines):
    """Only what writes to the terminal is taken away."""
    file = logging.FileHandler(tmp_path / "access.log")
    logging.getLogger("uvicorn.access").addHandler(file)
    logging.getLogger("uvicorn.access").setLevel("INFO")

    configure_logging()
    logging.getLogger("uvicorn.access").info("GET /")
    file.close()

    assert (tmp_path / "access.log").read_text() == "GET /\n"
    assert lines() == []


def test_an_exception_that_the_access_log_has_logged_is_not_logged_by_the_server_again(lines):
    """One traceback per failure; the program may still log the exception itself."""
    configure_logging()
    told, news = ValueError("told"), ValueError("news")
    _scope.mark_logged(told)

    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=told)
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=news)
    logging.getLogger("mine").error("failed", exc_info=told)

    assert [(line["logger"], line["exception"]) for line in lines()] == [
        ("uvicorn.error", "ValueError: news"),
        ("mine", "ValueError: told"),
    ]


def test_an_exception_object_that_is_raised_again_is_logged_again(lines):
    """Programs keep exceptions in variables: that the first failure is logged says nothing of the second."""
    configure_logging()
    error = ValueError("kept")
    _scope.mark_logged(error)

    for _ in range(2):
        logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)

    assert [line["exception"] for line in lines()] == ["ValueError: kept"]


SERVE = """
import logging, warnings
from fastapi import FastAPI
from fastapi_prodkit.logging import configure_logging

configure_logging(service="orders")
app = FastAPI()

@app.get("/fail")
def fail():
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    raise RuntimeError("no way")

if __name__ == "__main__":
    import uvicorn
    uvicorn.run(app, port=0{arguments})
"""


def fetch(port: int, path: str) -> int:
    """Return the status; a parent process announces the port a moment before its children listen."""
    deadline = time.monotonic() + 20
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
        finally:
            connection.close()


def serve(directory, command, arguments=""):
    """Run the server, let one request fail, stop it, and return its lines, which must all be JSON."""
    (directory / "service.py").write_text(SERVE.replace("{arguments}", arguments))
    server = subprocess.Popen(
        [sys.executable, "-W", "always::DeprecationWarning", *command],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    written = []
    try:
        started = set()
        for line in server.stdout:
            written.append(line)
            if match := re.search(r"running on http://127.0.0.1:(\d+)", line):
                port = int(match.group(1))
            started |= {word for word in ("running on", "startup complete") if word in line}
            if len(started) == 2:
                break
        assert len(started) == 2, "".join(written)
        assert fetch(port, "/fail?token=hunter2") == 500
    finally:
        server.send_signal(signal.SIGTERM)
        written += server.communicate(timeout=20)[0].splitlines()
    return [json.loads(line) for line in written]


@pytest.mark.system
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["service.py"], ", log_config=None"),
        (["service.py"], ""),
        (["-m", "uvicorn", "service:app", "--port", "0"], ""),
    ],
    ids=["run without log_config", "run", "command line"],
)
def test_every_line_of_a_real_server_is_json(tmp_path, command, arguments):
    """Start-up, a warning, an unhandled exception and shutdown; no access line of the server's own."""
    found = serve(tmp_path, command, arguments)

    events = [line["event"] for line in found]
    assert events[0].startswith("Started server process")
    assert events[-1].startswith("Finished server process")
    assert {line["service"] for line in found} == {"orders"}
    assert [line["exception"][-20:] for line in found if "exception" in line] == ["RuntimeError: no way"]
    assert [line["logger"] for line in found if "DeprecationWarning: deprecated" in line["event"]] == ["py.warnings"]
    assert "uvicorn.access" not in {line["logger"] for line in found}


@pytest.mark.system
def test_the_log_config_of_the_page_makes_a_parent_process_speak_json(tmp_path):
    """With several workers the parent never imports the app; the file does for it what `configure_logging` does."""
    config = re.search(r"```json\n(\{.*?\n\})\n```", PAGE.read_text(), re.DOTALL).group(1)
    (tmp_path / "logging.json").write_text(config)
    command = ["-m", "uvicorn", "service:app", "--port", "0", "--workers", "2", "--log-config", "logging.json"]

    found = serve(tmp_path, command)

    assert any(line["event"].startswith("Started parent process") for line in found)


# What nobody caught


TASK = """
import asyncio, gc

async def fail():
    raise ValueError("task")

async def main():
    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    gc.collect()

asyncio.run(main())
"""
DESTRUCTOR = """
class Late:
    def __del__(self):
        raise ValueError("late")

Late()
"""


def run(code: str) -> list[dict]:
    """Run a program and return its lines, which must all be JSON, wherever they were written."""
    program = f"from fastapi_prodkit.logging import configure_logging\nconfigure_logging()\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("code", "logger", "text"),
    [
        ("raise ValueError('lost')", "sys.excepthook", "ValueError: lost"),
        (
            "import threading; threading.Thread(target=lambda: 1 / 0).start()",
            "threading.excepthook",
            "ZeroDivisionError",
        ),
        (DESTRUCTOR, "sys.unraisablehook", "ValueError: late"),
        ("import warnings; warnings.warn('old', stacklevel=1)", "py.warnings", "UserWarning: old"),
        (TASK, "asyncio", "ValueError: task"),
        ("import asyncio\nasync def never(): pass\nnever()", "py.warnings", "was never awaited"),
    ],
    ids=["main thread", "thread", "destructor", "warning", "task", "coroutine"],
)
def test_what_nobody_caught_is_one_json_line(code, logger, text):
    """Python's own reports, which are text of many lines on standard error otherwise."""
    found = run(code)

    assert [line["logger"] for line in found] == [logger]
    assert text in found[0].get("exception", found[0]["event"])


def test_uncaught_exceptions_are_logged_by_the_hooks(lines):
    """The same, in this process."""
    configure_logging()

    class Late:
        def __del__(self):
            raise ValueError("late")

    sys.excepthook(ValueError, ValueError("main"), None)
    threading.excepthook(threading.ExceptHookArgs((ValueError, ValueError("orphan"), None, None)))
    thread = threading.Thread(target=lambda: 1 / 0, name="worker")
    thread.start()
    thread.join()
    Late()

    main, orphan, thread_line, unraisable = lines()
    assert (main["level"], main["exception"]) == ("critical", "ValueError: main")
    assert orphan["exception"] == "ValueError: orphan"
    assert (thread_line["thread_name"], thread_line["exception"][-16:]) == ("worker", "division by zero")
    assert "__del__" in unraisable["ignored_in"]


def test_a_thread_that_exits_on_purpose_is_not_an_error(lines):
    """SystemExit in a thread ends it silently, as Python itself has it."""
    configure_logging()

    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()

    assert lines() == []


async def test_warnings_and_asyncio_errors_become_lines(lines):
    """Both go through the standard library's loggers, in this process as well."""
    configure_logging()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old", UserWarning, stacklevel=1)
    asyncio.get_running_loop().call_exception_handler({"message": "odd", "exception": ValueError("odd")})

    warning, error = lines()
    assert "UserWarning: old" in warning["event"]
    assert error["exception"] == "ValueError: odd"


# The console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_console_shows_what_a_developer_needs(capsys):
    """Time, level, event, logger, the request id and a readable traceback; not what is the same on each line."""
    configure_logging(LogSettings(format="console"), service="orders")
    _context.begin({"request_id": "abcdefgh"})

    try:
        raise ValueError("no way")
    except ValueError:
        structlog.get_logger("shop").exception("failed", order=7)

    out = capsys.readouterr().out
    first, *traceback = out.splitlines()
    assert re.match(r"\d\d:\d\d:\d\d \[error *\] failed +\[shop\] order=7 request_id=abcdefgh$", first)
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: no way"
    assert "orders" not in out
    assert "\x1b" not in out


def test_the_console_masks_and_escapes_as_well(capsys):
    """A value cannot forge a line, and a developer's screen is no place for secrets either."""
    configure_logging(LogSettings(format="console"))

    logging.getLogger("a").info(
        "one\ntwo\x1b[31m\x85", extra={"password": "hunter2", "value": "a\r\nb", "deep": {"k": "\u2028\x1b"}, "k\n": 1}
    )
    write_quickly(http_path="/\x1b[31m")

    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "hunter2" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_the_console_is_coloured_on_a_terminal_that_knows_colours(monkeypatch, no_color, term, coloured):
    """https://no-color.org: any value that is not empty turns colours off."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal())
    configure_logging(LogSettings(format="console"))

    logging.getLogger("a").info("hello")

    assert ("\x1b[" in sys.stdout.getvalue()) is coloured


def test_the_console_can_be_configured_without_a_standard_output(monkeypatch):
    """`pythonw` and detached services have none."""
    monkeypatch.setattr(sys, "stdout", None)

    configure_logging(LogSettings(format="console"))

    logging.getLogger("a").info("lost")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ('%s - "WebSocket %s" [accepted]', ("127.0.0.1:5000", "/ws?ticket=abc")),
        ('%s - "WebSocket %s" 403', ("127.0.0.1:5000", "/ws?ticket=abc")),
        ("ASGI callable returned without completing handshake.", ()),
    ],
)
def test_what_uvicorn_says_of_websockets_is_left_to_the_access_log(lines, message, arguments):
    """Its lines carry the query string, where browsers have to put their tickets."""
    configure_logging()

    logging.getLogger("uvicorn.error").error(message, *arguments)

    assert lines() == []
