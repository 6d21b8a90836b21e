"""Every log line of the process is one JSON object, without secrets and of bounded size."""

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
    """Restore the servers' loggers and structlog, too."""
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
    """Return the new lines of standard output, parsed; standard error must be empty."""

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
    """Remove pytest's handlers, which raise where the standard library prints."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, [handler()]
    yield
    root.handlers = before


class Broken:
    def __str__(self):
        raise RuntimeError("broken __str__")

    __repr__ = __str__


# Fields of every line


def test_record_has_the_standard_fields(lines):
    """Time in UTC, level, event, logger, and service."""
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


def test_timestamp_is_utc_with_a_z(lines):
    """In both paths."""
    configure_logging()

    logging.getLogger("a").info("plain")
    logging.getLogger("a").info("key: value")

    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line["timestamp"]) for line in lines())


def test_structlog_event_has_the_standard_fields(lines):
    """Its fields may have names that records reserve."""
    configure_logging(service="orders")

    structlog.get_logger("shop").bind(order=7).info("paid %s", "twice", name="Ada", message="m", args=[1])

    [line] = lines()
    assert line["event"] == "paid twice"
    assert (line["logger"], line["level"], line["service"]) == ("shop", "info", "orders")
    assert (line["order"], line["name"], line["message"], line["args"]) == (7, "Ada", "m", [1])


def test_structlog_logger_without_a_name_has_that_of_its_module(lines):
    """A line from `structlog.get_logger()` has the name of the calling module as its logger."""
    configure_logging()

    structlog.get_logger().info("hello")

    assert lines()[0]["logger"] == __name__


def test_field_does_not_replace_a_standard_field(lines):
    """It gets another name."""
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


def test_exception_is_one_field_with_its_traceback(lines):
    """Causes included."""
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


def test_exc_info_without_an_exception_has_no_field(lines):
    """A line logged with `exc_info=True` outside an exception handler has no `exception` field."""
    configure_logging()

    logging.getLogger("a").error("nothing happened", exc_info=True)  # noqa: LOG014 - the point

    assert "exception" not in lines()[0]


def test_stack_info_is_a_field(lines):
    """`stack_info=True` adds the call stack as the field `stack`, for logging and for structlog."""
    configure_logging()

    logging.getLogger("a").info("here", stack_info=True)
    structlog.get_logger("a").info("here", stack_info=True)

    assert all("test_stack_info_is_a_field" in line["stack"] for line in lines())


def test_levels_below_the_setting_are_not_written(lines):
    """From both libraries; a logger may have its own level."""
    configure_logging(LogSettings(level="warning"))
    logging.getLogger("chatty").setLevel("DEBUG")

    logging.getLogger("a").info("no")
    structlog.get_logger("a").info("no")
    structlog.get_logger("chatty").debug("yes")
    logging.getLogger("chatty").setLevel("NOTSET")

    assert [line["event"] for line in lines()] == ["yes"]


# The request context


def test_bound_fields_reach_sync_routes_and_background_tasks(lines):
    """A field bound in a sync route appears on lines of the route, its background task and the edge."""
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
    """Fields bound with structlog appear on lines of standard library loggers and of async structlog calls."""
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
    """Also if it was set before the import, as `opentelemetry-instrument` does."""
    done = subprocess.run([sys.executable, "-c", FACTORY], capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(done.stdout)["trace_id"] == "abc"


# Lines without a record


def write_directly(**fields):
    """Write an event without a record, as the access log does."""
    handler().writer("info", "fastapi_prodkit.access", "request")(fields)


def test_writer_writes_the_same_line_as_a_record(lines):
    """A line of the direct writer has the fields of a record's line in their order, also when it is repeated."""
    configure_logging(service="orders")
    _context.begin({"request_id": "abcdefgh"})

    for _ in range(2):
        write_directly(http_route="/items/{item_id}", http_status=200, duration_ms=1.5)

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
def test_writer_masks_and_escapes_like_a_record(lines, value, written):
    """Also a key that was harmless before."""
    configure_logging()
    write_directly(field="harmless")

    write_directly(field=value)

    assert lines()[1]["field"] == written


def test_writer_has_the_context_of_structlog(lines):
    """A line written directly has the fields bound with structlog and those of the request context."""
    configure_logging()
    _context.begin({"request_id": "abcdefgh"})
    structlog.contextvars.bind_contextvars(tenant="acme")

    write_directly(field=1)

    [line] = lines()
    assert (line["request_id"], line["tenant"], line["field"]) == ("abcdefgh", "acme", 1)


def test_writer_masks_fields_of_the_context(lines):
    """Each time."""
    configure_logging(LogSettings(redact=("pin",)))
    _context.begin({"user_token": "abc", "pin": "1234"})

    for _ in range(2):
        write_directly()

    assert [(line["user_token"], line["pin"]) for line in lines()] == [("[redacted]", "[redacted]")] * 2


def test_field_of_the_context_does_not_replace_a_standard_field(lines):
    """A context field named `timestamp` is written as `timestamp_`, and the timestamp of the line is kept."""
    configure_logging()
    _context.begin({"timestamp": "yesterday"})

    write_directly(field=1)

    [line] = lines()
    assert line["timestamp_"] == "yesterday"
    assert line["timestamp"].endswith("Z")


def test_number_of_cached_keys_is_bounded(lines):
    """A client may choose keys."""
    configure_logging()

    for number in range(1_200):
        logging.getLogger("a").info("event", extra={f"key_{number}": 1})

    assert len(lines()) == 1_200
    assert len(handler()._known_safe_keys) <= 1_000


# The request id in other formats


@pytest.fixture
def formatted():
    """A handler of another library that writes the request id; return its lines."""
    stream = io.StringIO()
    theirs = logging.StreamHandler(stream)
    theirs.addFilter(RequestIDFilter())
    theirs.setFormatter(logging.Formatter("%(request_id)s %(message)s"))
    logging.root.addHandler(theirs)
    return stream


def test_filter_sets_the_request_id(formatted, lines):
    """Outside of a request a dash, which our lines omit."""
    configure_logging()

    logging.getLogger("a").info("before")
    _context.begin({"request_id": "abcdefgh"})
    logging.getLogger("a").info("during")

    assert formatted.getvalue() == "- before\nabcdefgh during\n"
    assert [line.get("request_id") for line in lines()] == [None, "abcdefgh"]


def test_filter_keeps_the_request_id_of_a_record(formatted):
    """A record from a queue is formatted outside of its request."""
    logging.getLogger("a").warning("later", extra={"request_id": "abcdefgh"})

    assert formatted.getvalue() == "abcdefgh later\n"


def test_filter_can_be_named_in_dict_config():
    """`dictConfig` can create RequestIDFilter, and its `name` restricts the filter to that logger."""
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
def test_value_of_a_secret_key_is_masked(lines, key):
    """In any case and depth, with `-` or `_`."""
    configure_logging(LogSettings(redact=("pin", "Card_Number")))

    logging.getLogger("a").info("event", extra={key: "hunter2", "data": [{"deep": {key: ["hunter2"]}}]})

    [line] = lines()
    assert line[key] == "[redacted]"
    assert line["data"] == [{"deep": {key: "[redacted]"}}]


def test_secret_asgi_headers_are_masked(lines):
    """They are pairs of bytes."""
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
    """In messages, values and tracebacks. None: the whole text."""
    configure_logging()

    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("a").exception(text, extra={"value": text})

    [line] = lines()
    assert line["event"] == line["value"] == (masked or text)
    assert line["exception"].endswith(f"ValueError: {masked or text}")


def test_masking_masked_text_changes_nothing():
    """Such as a line of a child process."""
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
def test_line_has_a_maximum_size(capsys, fields):
    """256 KB less the overhead; it stays valid, and keeps the important fields."""
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


def test_truncated_text_keeps_both_ends(lines):
    """And the number of missing characters."""
    configure_logging()

    logging.getLogger("a").info("begin%send", "x" * 500_000)

    [line] = lines()
    head, missing, tail = re.fullmatch(
        r"(begin x*|beginx*)\.\.\.\[cut (\d+) characters\]\.\.\.(x*)", line["event"]
    ).groups()
    assert len(head) + int(missing) + len(tail) == 500_008
    assert len(head) > 50_000


def test_secret_at_a_truncation_is_masked(lines):
    """The password of a DSN stays masked if the truncation of the line cuts off the host of the DSN."""
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
def test_value_of_any_type_is_written_as_json(lines, value, written):
    """A logged value of any type becomes valid JSON, and no value raises an exception in the caller."""
    configure_logging()

    structlog.get_logger("a").info("event", value=value)

    assert lines()[0]["value"] == written


def test_recursive_value_is_truncated(lines):
    """The rest of the event is written."""
    configure_logging()
    circle = {"name": "circle"}
    circle["self"] = [circle]

    structlog.get_logger("a").info("event", circle=circle, after=1)

    [line] = lines()
    assert line["circle"]["self"][0]["name"] == "circle"
    assert "[cut]" in json.dumps(line)
    assert line["after"] == 1


def test_iterator_is_not_consumed(lines):
    """Logging an iterator writes its representation and leaves its values unread."""
    configure_logging()
    numbers = iter([1, 2])

    structlog.get_logger("a").info("event", numbers=numbers)

    assert "list_iterator" in lines()[0]["numbers"]
    assert list(numbers) == [1, 2]


def test_control_characters_are_escaped(capsys):
    """Line breaks, terminal sequences and direction marks; parsing restores them."""
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
def test_message_that_does_not_match_its_arguments_is_logged(lines, get_logger):
    """Without an exception in the caller."""
    configure_logging()

    with without_pytest():
        get_logger("a").error("%d of %d", "one")

    [line] = lines()
    assert line["event"] == "%d of %d"
    assert line["logging_error"].startswith("TypeError: ")
    assert line["args"] == ["one"]


def test_message_whose_str_fails_is_logged(lines):
    """A message object whose `__str__` raises is logged with a placeholder and the error in `logging_error`."""
    configure_logging()

    with without_pytest():
        logging.getLogger("a").error(Broken())

    [line] = lines()
    assert line["event"] == "[unprintable Broken]"
    assert line["logging_error"] == "RuntimeError: broken __str__"


def test_exception_whose_str_fails_is_logged(lines):
    """An exception that raises while its traceback is rendered does not propagate to the caller of the logger."""
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
def test_processors_change_each_event(lines, get_logger):
    """In order, with logger, level and all fields of the line."""
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
def test_event_dropped_by_a_processor_has_no_line(capsys, log_format):
    """Later processors are not called."""
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
def test_fields_of_a_processor_are_masked(lines, added, written):
    """In the second event too, whose keys are cached."""
    configure_logging(processors=[lambda _logger, _method, event: event | added])

    for _ in range(2):
        logging.getLogger("shop").info("paid")

    [key] = added
    assert [line[key] for line in lines()] == [written, written]


@pytest.mark.parametrize("returned", [None, "a line", ["timestamp"]], ids=str)
def test_failing_processor_leaves_a_line(lines, returned):
    """Without the fields; a result that is no dict too."""

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


def test_processors_of_structlog_work(lines, capsys):
    """Also one that replaces the timestamp."""
    stamp = structlog.processors.TimeStamper(fmt="%Y", key="timestamp")

    configure_logging(processors=[stamp])
    logging.getLogger("shop").info("paid")
    [line] = lines()
    configure_logging(LogSettings(format="console"), processors=[stamp])
    logging.getLogger("shop").info("paid")

    assert re.fullmatch(r"\d{4}", line["timestamp"])
    assert re.match(r"\d{4} \[info *\] paid +\[shop\]$", capsys.readouterr().out.strip())


def test_processors_see_access_lines(lines):
    """The access log creates a record for each request if processors are configured, so they can add fields."""
    settings = Settings(environment="test")
    app = create_app(settings)
    configure_logging(settings.log, processors=[add_region])

    with TestClient(app) as client:
        status = client.get("/nowhere").status_code

    [line] = [each for each in lines() if each["logger"] == "fastapi_prodkit.access"]
    assert (status, line["http_status"], line["region"]) == (404, 404, "eu")


# Standard output


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
def test_closed_standard_output_does_not_raise(monkeypatch, stream):
    """Logging does not raise an exception if standard output is missing, closed or a broken pipe."""

    class BrokenPipe(io.StringIO):
        buffer = property(lambda self: self)

        def write(self, line):
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    configure_logging()

    monkeypatch.setattr(sys, "stdout", {"closed": closed, "broken": BrokenPipe()}.get(stream))

    logging.getLogger("a").info("lost")
    write_directly(lost=True)


def test_lost_lines_are_counted_by_reason(monkeypatch):
    """In a metric."""
    configure_logging()
    monkeypatch.setattr(sys, "stdout", None)

    logging.getLogger("a").info("lost")

    [family] = LostLines().collect()
    assert {sample.labels["reason"]: sample.value for sample in family.samples} == {"queue_full": 0, "write_failed": 1}


def test_json_is_utf_8_whatever_standard_output_is(monkeypatch):
    """RFC 8259 section 8.1."""
    raw = io.BytesIO()
    configure_logging()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1", write_through=True))

    logging.getLogger("a").info("café €uro 😀")

    assert json.loads(raw.getvalue().decode())["event"] == "café €uro 😀"


def test_line_is_one_write_of_any_length(monkeypatch):
    """Lines of several workers on one pipe do not mix."""

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


def test_rest_of_a_partial_write_is_written(monkeypatch, tmp_path):
    """Other threads wait."""

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


def test_text_stream_as_standard_output(monkeypatch):
    """Log lines are written to a `sys.stdout` that accepts text only and has no binary buffer."""
    stream = io.StringIO()
    configure_logging()
    monkeypatch.setattr(sys, "stdout", stream)

    logging.getLogger("a").info("hello")

    assert json.loads(stream.getvalue())["event"] == "hello"


def test_lines_of_threads_do_not_mix(lines):
    """Lines that eight threads write at once are each complete and valid JSON."""
    configure_logging()

    def work():
        for _ in range(50):
            logging.getLogger("a").info("x" * 500)
            write_directly(field="y" * 500)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(lines()) == 800


def test_configuring_twice_replaces_the_first_configuration(lines):
    """For existing loggers too; no line is repeated."""
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
    """File handlers and handlers for other streams on the root logger stay and receive the record."""
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
    """Our format applies from the first line."""
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


def test_level_applies_to_the_loggers_of_the_server(lines):
    """LOG_LEVEL=WARNING suppresses INFO lines of uvicorn, although uvicorn's own configuration sets INFO."""
    from uvicorn.config import LOGGING_CONFIG

    configure_logging(LogSettings(level="WARNING"))
    logging.config.dictConfig(LOGGING_CONFIG)

    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("careful")

    assert [line["event"] for line in lines()] == ["careful"]


def test_file_handler_of_the_server_stays(tmp_path, lines):
    """A file handler on `uvicorn.access` keeps receiving lines that are removed from standard output."""
    file = logging.FileHandler(tmp_path / "access.log")
    logging.getLogger("uvicorn.access").addHandler(file)
    logging.getLogger("uvicorn.access").setLevel("INFO")

    configure_logging()
    logging.getLogger("uvicorn.access").info("GET /")
    file.close()

    assert (tmp_path / "access.log").read_text() == "GET /\n"
    assert lines() == []


def test_logged_exception_is_not_logged_by_the_server(lines):
    """The app may log it again."""
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


def test_exception_object_raised_again_is_logged_again(lines):
    """A logged exception object is skipped once in uvicorn's report and logged when it is raised again."""
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
    """Return the status; repeat while the workers do not listen yet."""
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
    """Start-up, a warning, an unhandled exception and shutdown; without access lines of the server."""
    found = serve(tmp_path, command, arguments)

    events = [line["event"] for line in found]
    assert events[0].startswith("Started server process")
    assert events[-1].startswith("Finished server process")
    assert {line["service"] for line in found} == {"orders"}
    assert [line["exception"][-20:] for line in found if "exception" in line] == ["RuntimeError: no way"]
    assert [line["logger"] for line in found if "DeprecationWarning: deprecated" in line["event"]] == ["py.warnings"]
    assert "uvicorn.access" not in {line["logger"] for line in found}


@pytest.mark.system
def test_log_config_of_the_page_makes_a_parent_process_log_json(tmp_path):
    """The parent of the workers never imports the app."""
    config = re.search(r"```json\n(\{.*?\n\})\n```", PAGE.read_text(), re.DOTALL).group(1)
    (tmp_path / "logging.json").write_text(config)
    command = ["-m", "uvicorn", "service:app", "--port", "0", "--workers", "2", "--log-config", "logging.json"]

    found = serve(tmp_path, command)

    assert any(line["event"].startswith("Started parent process") for line in found)


# Uncaught exceptions


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
    """Run a program and return its lines from both streams, which must all be JSON."""
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
def test_uncaught_exception_is_one_json_line(code, logger, text):
    """An exception in a thread, task or destructor, or a Python warning, is written as one JSON line."""
    found = run(code)

    assert [line["logger"] for line in found] == [logger]
    assert text in found[0].get("exception", found[0]["event"])


def test_uncaught_exceptions_are_logged_by_the_hooks(lines):
    """In this process."""
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


def test_system_exit_in_a_thread_logs_nothing(lines):
    """SystemExit in a thread ends the thread without a log line, as in plain Python."""
    configure_logging()

    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()

    assert lines() == []


async def test_warnings_and_asyncio_errors_are_logged(lines):
    """Warnings and errors reported to the event loop's exception handler are written as log lines."""
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


def test_console_shows_readable_lines(capsys):
    """Without the fields that are equal on each line."""
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


def test_console_masks_and_escapes(capsys):
    """The console format masks passwords and escapes line breaks and terminal sequences in values and keys."""
    configure_logging(LogSettings(format="console"))

    logging.getLogger("a").info(
        "one\ntwo\x1b[31m\x85", extra={"password": "hunter2", "value": "a\r\nb", "deep": {"k": "\u2028\x1b"}, "k\n": 1}
    )
    write_directly(http_path="/\x1b[31m")

    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "hunter2" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_console_colours_require_a_terminal_without_no_color(monkeypatch, no_color, term, coloured):
    """https://no-color.org."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal())
    configure_logging(LogSettings(format="console"))

    logging.getLogger("a").info("hello")

    assert ("\x1b[" in sys.stdout.getvalue()) is coloured


def test_console_works_without_standard_output(monkeypatch):
    """As in `pythonw`."""
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
def test_websocket_lines_of_uvicorn_are_dropped(lines, message, arguments):
    """They contain the query string."""
    configure_logging()

    logging.getLogger("uvicorn.error").error(message, *arguments)

    assert lines() == []
