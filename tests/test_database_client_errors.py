"""Values and conflicts that the database refuses: 422 or 409, and one warning without values."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Body, FastAPI, Request
from fastapi.responses import PlainTextResponse
from postgres import Server

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

import asyncpg  # type: ignore[import-untyped]  # it has no annotations for us
from sqlalchemy import literal, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from fastapi_prodkit.database import CLIENT_ERRORS, Database, SessionDep, add_outage_handlers

LOGGER = "fastapi_prodkit.database.client_errors"
SECRET = "hunter2-7f3a"
LONG = "".join(sha256(bytes([number])).hexdigest() for number in range(256))  # which cannot be compressed
AWARE = datetime(2026, 1, 1, tzinfo=UTC)
TABLES = (
    "CREATE TYPE mood AS ENUM ('calm', 'angry')",
    "CREATE TABLE owners (id int PRIMARY KEY)",
    "CREATE TABLE items (id int PRIMARY KEY, name varchar(8), mood mood, at timestamp, price numeric(4, 2), code uuid)",
    "ALTER TABLE items ADD data jsonb, ADD numbers int[], ADD times timestamp[], ADD size int CHECK (size > 0)",
    "ALTER TABLE items ADD note text UNIQUE, ADD bits bit(3)",
    "CREATE FUNCTION forever(i int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN forever(i); END'",
    "ALTER TABLE items ADD owner int REFERENCES owners DEFERRABLE",
    "CREATE TABLE stays (during int4range, EXCLUDE USING gist (during WITH &&))",
    "INSERT INTO owners VALUES (1)",
    "INSERT INTO items (id, name, owner) VALUES (1, 'hammer', 1)",
    "INSERT INTO stays VALUES ('[1,5)')",
)

INSERT = "INSERT INTO items (id, {column}) VALUES (2, :value)"
REFUSED = {  # name -> statement, value, status, text of the warning
    "NUL": (INSERT.format(column="name"), "a\0", 422, "CharacterNotInRepertoireError 22021"),
    "NUL in JSON": (INSERT.format(column="data"), '"\\u0000"', 422, "UntranslatableCharacterError 22P05"),
    "surrogate": (INSERT.format(column="name"), "\ud800", 422, "DataError 22021, argument $1"),
    "large key": ("SELECT FROM items WHERE id = :value", 2**31, 422, "DataError 22003, type int32, argument $1"),
    "huge key": ("SELECT CAST(:value AS bigint)", 2**63, 422, "DataError 22003, type int64, argument $1"),
    "sum": ("SELECT CAST(:value AS int) + 1", 2**31 - 1, 422, "NumericValueOutOfRangeError 22003, type integer"),
    "long name": (
        INSERT.format(column="name"),
        SECRET,
        422,
        "StringDataRightTruncationError 22001, type character varying(8)",
    ),
    "enum": (INSERT.format(column="mood"), SECRET, 422, "InvalidTextRepresentationError 22P02, type mood"),
    "limit": ("SELECT FROM items LIMIT :value", -1, 422, "InvalidRowCountInLimitClauseError 2201W"),
    "offset": ("SELECT FROM items OFFSET :value", -1, 422, "InvalidRowCountInResultOffsetClauseError 2201X"),
    "like": ("SELECT FROM items WHERE name LIKE :value", "ham\\", 422, "InvalidEscapeSequenceError 22025"),
    "zone": (INSERT.format(column="at"), AWARE, 422, "DataError 22007, argument $1"),
    "no date": ("SELECT date '2026-01-01' + CAST(:value AS int)", 2**31 - 1, 422, "22008, type date"),
    "late date": (
        "SELECT CAST(:value AS timestamptz)",
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        422,
        "DataError 22003, argument $1",
    ),
    "price": (INSERT.format(column="price"), Decimal(100), 422, "NumericValueOutOfRangeError 22003"),
    "uuid": (INSERT.format(column="code"), SECRET, 422, "DataError 22P02, argument $1"),
    "cast": (
        "SELECT CAST(CAST(:value AS text) AS int)",
        f'{SECRET}" is out of range for type x',
        422,
        "22P02, type integer",
    ),
    "large cast": ("SELECT CAST(CAST(:value AS text) AS int)", "9" * 20, 422, "22003, type integer"),
    "date": ("SELECT CAST(CAST(:value AS text) AS date)", SECRET, 422, "InvalidDatetimeFormatError 22007, type date"),
    "zone name": ("SELECT now() AT TIME ZONE :value", SECRET, 422, "InvalidParameterValueError 22023"),
    "zone offset": (
        "SELECT CAST(CAST(:value AS text) AS timestamptz)",
        "2026-01-01 00:00+99",
        422,
        "InvalidTimeZoneDisplacementValueError 22009",
    ),
    "interval": (
        "SELECT CAST(CAST(:value AS text) AS interval)",
        f"{'9' * 14} years",
        422,
        "IntervalFieldOverflowError 22015",
    ),
    "pattern": ("SELECT FROM items WHERE name ~ :value", f"{SECRET}[", 422, "InvalidRegularExpressionError 2201B"),
    "bits": (INSERT.format(column="bits"), asyncpg.BitString("10"), 422, "StringDataLengthMismatchError 22026"),
    "XML": ("SELECT CAST(CAST(:value AS text) AS xml)", f"<{SECRET}", 422, "InvalidXmlContentError 2200N"),
    "XML document": (
        "SELECT xmlparse(DOCUMENT CAST(:value AS text))",
        f"<{SECRET}",
        422,
        "InvalidXmlDocumentError 2200M",
    ),
    "inverted range": ("SELECT int4range(:value, 1)", 5, 422, "DataError 22000"),
    "inverted range as text": ("SELECT CAST(CAST(:value AS text) AS int4range)", "[5,1]", 422, "DataError 22000"),
    "long note": (INSERT.format(column="note"), LONG, 422, "ProgramLimitExceededError 54000"),
    "deep JSON": (INSERT.format(column="data"), "[" * 50_000, 422, "StatementTooComplexError 54001"),
    "deep array": ("SELECT CAST(CAST(:value AS text) AS json)", "[" * 50_000, 422, "StatementTooComplexError 54001"),
    "numbers": (INSERT.format(column="numbers"), [1, 2**31], 422, "DataError 22003, type int32, argument $1"),
    "times": (INSERT.format(column="times"), [AWARE], 422, "DataError 22007, argument $1"),
    "duplicate": (
        "INSERT INTO items (id) VALUES (:value)",
        1,
        409,
        "UniqueViolationError 23505, constraint items_pkey",
    ),
    "no owner": (
        INSERT.format(column="owner"),
        7,
        409,
        "ForeignKeyViolationError 23503, constraint items_owner_fkey",
    ),
    "owned": ("DELETE FROM owners WHERE id = :value", 1, 409, "23503, constraint items_owner_fkey"),
    "overlap": ("INSERT INTO stays VALUES (int4range(1, :value))", 3, 409, "23P01, constraint stays_during_excl"),
}
OURS = {  # name -> statement, value: errors of the app
    "wrong type": ("SELECT FROM items WHERE id = :value", "1"),
    "wrong date": (INSERT.format(column="at"), "2026-01-01"),
    "wrong element": (INSERT.format(column="numbers"), [1, "2"]),
    "division": ("SELECT 1 / CAST(:value AS int)", 0),
    "check": (INSERT.format(column="size"), -1),
    "null": ("INSERT INTO items VALUES (:value)", None),
    "recursion": ("SELECT forever(CAST(:value AS int))", 1),
    "hole in a range": ("SELECT int4range(1, 9) - int4range(2, CAST(:value AS int))", 3),
    "own code": ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '22000'; END $$", None),
}


@pytest.fixture
async def database(server: Server) -> AsyncIterator[Database]:
    """The tables in a schema that is created anew for each test."""
    async with made(server) as database:
        yield database


@asynccontextmanager
async def made(server: Server, **arguments: Any) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=server.url(query="options=-c search_path=shop"), ssl="off"), **arguments)
    async with database.lifespan(None):
        async with database.session() as session:
            for statement in ("DROP SCHEMA IF EXISTS shop CASCADE", "CREATE SCHEMA shop", *TABLES):
                await session.execute(text(statement))
        yield database


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db"))
    async with database.lifespan(None):
        async with database.session() as session:
            await session.execute(text("CREATE TABLE owners (id integer PRIMARY KEY, size int CHECK (size > 0))"))
            await session.execute(text("CREATE TABLE items (name text UNIQUE, owner REFERENCES owners)"))
        yield database


def app_with(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database
    add_problem_handlers(app)
    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def executed(app: FastAPI, statement: str, value: Any) -> httpx2.Response:
    """Execute the statement in a request."""

    @app.post("/")
    async def execute(session: SessionDep) -> None:
        await session.execute(text(statement), {"value": value} if ":value" in statement else {})

    async with client_of(app) as client:
        return await client.post("/")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", REFUSED)
async def test_value_that_postgresql_refuses_is_a_422_and_a_conflict_a_409(
    database: Database, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The one warning says which, without the value."""
    statement, value, status, warning = REFUSED[name]

    response = await executed(app_with(database), statement, value)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert ("errors" in response.json()) == (status == 422)
    [said] = warnings(caplog)
    assert said.startswith("the database refused the request: ")
    assert said.endswith(warning)
    assert SECRET not in caplog.text + response.text
    assert "constraint" not in response.text


@pytest.mark.parametrize("name", OURS)
async def test_error_of_the_app_stays_a_500(database: Database, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Such as a wrong type, a division by zero, or a check violation."""
    response = await executed(app_with(database), *OURS[name])

    assert response.status_code == 500
    assert not warnings(caplog)


async def test_too_many_arguments_stay_a_500(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The app can bound the list, or pass one array."""
    app = app_with(database)

    @app.post("/")
    async def search(session: SessionDep) -> None:
        await session.execute(select(literal(1).in_(list(range(32_768)))))

    async with client_of(app) as client:
        response = await client.post("/")

    assert response.status_code == 500
    assert not warnings(caplog)


async def test_text_that_postgresql_refuses_is_a_422(database: Database) -> None:
    """As a client sends it: a NUL in body or query, a key or a limit that is too large."""
    app = app_with(database)

    @app.post("/items")
    async def create(name: Any = Body(embed=True), *, session: SessionDep) -> None:
        await session.execute(text("INSERT INTO items (id, name) VALUES (2, :name)"), {"name": name})

    @app.get("/items")
    async def search(session: SessionDep, q: str = "", limit: int = 1) -> None:
        await session.execute(text("SELECT FROM items WHERE name = :q LIMIT :limit"), {"q": q, "limit": limit})

    @app.get("/items/{key}")
    async def read(key: int, session: SessionDep) -> None:
        await session.execute(text("SELECT FROM items WHERE id = :key"), {"key": key})

    async with client_of(app) as client:
        body = {"content": b'{"name": "a\\u0000b"}', "headers": {"content-type": "application/json"}}
        answers = [await client.post("/items", **body)]
        answers += [await client.get(path) for path in ("/items?q=%00", "/items?limit=-1", "/items/2147483648")]
        served = await client.get("/items/1")

    assert [answer.status_code for answer in answers] == [422, 422, 422, 422]
    assert answers[0].json()["detail"] == "The request is not valid."
    assert answers[0].json()["errors"] == [
        {"loc": [], "msg": "The database does not accept a value of the request", "type": "value_error"}
    ]
    assert served.status_code == 200


async def test_conflict_at_the_commit_is_a_409(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """By a deferred constraint."""
    app = app_with(database)

    @app.post("/")
    async def late(session: SessionDep) -> str:
        await session.execute(text("SET CONSTRAINTS ALL DEFERRED"))
        await session.execute(text("INSERT INTO items (id, owner) VALUES (2, 7)"))
        return "created"

    async with client_of(app) as client:
        response = await client.post("/")

    assert response.status_code == 409
    assert response.json()["detail"] == "The request conflicts with what is stored."
    assert len(warnings(caplog)) == 1


async def test_conflict_in_a_task_group_is_a_409(sqlite: Database) -> None:
    """A constraint violation inside a TaskGroup of the handler is answered with a 409."""
    app = app_with(sqlite)

    @app.post("/")
    async def create(session: SessionDep) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(session.execute(text("INSERT INTO items (owner) VALUES (7)")))

    async with client_of(app) as client:
        response = await client.post("/")

    assert response.status_code == 409


@pytest.mark.parametrize(
    ("statement", "value", "status", "warning"),
    [
        ("INSERT INTO items (name) VALUES (:value)", SECRET, 409, "IntegrityError 23505, constraint items.name"),
        ("INSERT INTO owners (id) VALUES (:value)", 1, 409, "IntegrityError 23505, constraint owners.id"),
        ("INSERT INTO items (owner) VALUES (:value)", 7, 409, "IntegrityError 23503"),
        ("SELECT * FROM owners WHERE id = :value", 2**63, 422, "OverflowError 22003"),
        ("SELECT * FROM items WHERE name = :value", "\ud800", 422, "UnicodeEncodeError 22021"),
        ("INSERT INTO owners (size) VALUES (:value)", -1, 500, None),
        ("SELECT * FROM missing WHERE name = :value", 1, 500, None),
    ],
)
async def test_sqlite_errors_have_the_same_statuses(
    sqlite: Database, caplog: pytest.LogCaptureFixture, statement: str, value: Any, status: int, warning: str | None
) -> None:
    """By SQLite's own codes and the exceptions of the driver."""
    async with sqlite.session() as session:
        await session.execute(text("INSERT INTO owners (id) VALUES (1)"))
        await session.execute(text("INSERT INTO items (name) VALUES (:name)"), {"name": SECRET})

    response = await executed(app_with(sqlite), statement, value)

    assert response.status_code == status
    assert warnings(caplog) == ([f"the database refused the request: {warning}"] if warning else [])
    assert SECRET not in caplog.text + response.text


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [(CLIENT_ERRORS, [409, 500]), ({}, [500, 500]), ({"23505": 400}, [400, 500]), ({"23514": 422}, [500, 422])],
)
async def test_client_errors_replaces_the_table(
    server: Server, statuses: Mapping[str, int], expected: list[int]
) -> None:
    """Without entries every such error is a 500."""
    async with made(server, client_errors=statuses) as database:
        app = create_app(Settings(log=None), database=database)

        @app.post("/taken")
        async def taken(session: SessionDep) -> None:
            await session.execute(text("INSERT INTO items (id) VALUES (1)"))

        @app.post("/small")
        async def small() -> None:
            async with database.session() as session:
                await session.execute(text("INSERT INTO items (id, size) VALUES (2, 0)"))

        async with client_of(app) as client:
            answers = [await client.post(path) for path in ("/taken", "/small")]

    assert [answer.status_code for answer in answers] == expected


@pytest.mark.parametrize("statuses", [{"2350": 409}, {"unique": 409}, {"23505": 200}, {"23505": 500}])
def test_invalid_sqlstate_or_status_is_refused(statuses: Mapping[str, int]) -> None:
    """A client_errors key that is no SQLSTATE, or a value that is no 4xx status, is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="client_errors"):
        Database(DatabaseSettings(url="sqlite://"), client_errors=statuses)
    with pytest.raises(ConfigurationError, match="client_errors"):
        add_outage_handlers(FastAPI(), client_errors=statuses)


@pytest.mark.parametrize("kind", [IntegrityError, DBAPIError, SQLAlchemyError])
@pytest.mark.parametrize("path", ["/session", "/own"])
async def test_handler_of_the_app_gets_the_error(
    sqlite: Database, caplog: pytest.LogCaptureFixture, kind: type[Exception], path: str
) -> None:
    """For the error or a base class, in any kind of session."""
    app = app_with(sqlite)

    @app.exception_handler(kind)
    async def of_the_app(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(type(error).__name__, 418)

    add_outage_handlers(app)

    @app.post("/session")
    async def session(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO items (owner) VALUES (7)"))

    @app.post("/own")
    async def own() -> None:
        async with sqlite.session() as session:
            await session.execute(text("INSERT INTO items (owner) VALUES (7)"))

    async with client_of(app) as client:
        response = await client.post(path)

    assert (response.status_code, response.text) == (418, "IntegrityError")
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", [Exception, ProgrammingError, 500])
async def test_handler_for_other_errors_is_not_called(sqlite: Database, kind: Any) -> None:
    """Nor a handler for `Exception`."""
    app = app_with(sqlite)
    app.add_exception_handler(kind, lambda _request, _error: PlainTextResponse("mine", 418))
    add_outage_handlers(app)

    response = await executed(app, "INSERT INTO items (owner) VALUES (:value)", 7)

    assert response.status_code == 409


async def test_error_of_sqlalchemy_stays_a_500(sqlite: Database) -> None:
    """Such as a missing row."""
    app = app_with(sqlite)
    add_outage_handlers(app)

    @app.get("/")
    async def read(session: SessionDep) -> None:
        (await session.execute(text("SELECT * FROM items"))).one()

    async with client_of(app) as client:
        response = await client.get("/")

    assert response.status_code == 500


async def test_session_outside_of_a_request_raises_the_error(sqlite: Database) -> None:
    """Jobs and `transact`, which does not repeat it."""
    attempts = []

    async def work(session: Any) -> None:
        attempts.append(session)
        await session.execute(text("INSERT INTO items (owner) VALUES (7)"))

    with pytest.raises(IntegrityError):
        await sqlite.transact(work)
    with pytest.raises(IntegrityError):
        async with sqlite.session() as session:
            await work(session)
    with pytest.raises(DBAPIError):
        async with sqlite.session() as session:
            await session.execute(text("SELECT :value"), {"value": 2**63})

    assert len(attempts) == 2
