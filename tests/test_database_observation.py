"""Metrics, access line and log of the database; never values."""

import asyncio
import json
import logging

import anyio
import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

REASON = "needs the extra: pip install 'fastapi-prodkit[database]'"
pytest.importorskip("sqlalchemy", reason=REASON)
pytest.importorskip("aiosqlite", reason=REASON)

from postgres import postgres_or_skip
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import IntegrityError, OperationalError

from fastapi_prodkit import _context, create_app
from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep
from fastapi_prodkit.database.observation import observe
from fastapi_prodkit.sections import DatabaseSettings
from fastapi_prodkit.settings import Settings


@pytest.fixture
def registry():
    return CollectorRegistry()


def database_of(tmp_path, registry, **options):
    return Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/a.db", **options), registry=registry)


def app_of(tmp_path, **options):
    url = f"sqlite:///{tmp_path}/a.db"
    app = create_app(Settings(environment="test", database={"url": url, **options}))

    @app.get("/three")
    async def three(session: SessionDep, reading: ReadSessionDep):
        for number in range(2):
            await session.execute(text("SELECT :number"), {"number": number})
        await reading.execute(text("SELECT 'read'"))

    @app.get("/none")
    async def none(): ...

    async def one():
        async with app.state.database.session() as session:
            await session.execute(text("SELECT 1"))

    @app.get("/tasks")
    async def tasks():
        await asyncio.gather(*(one() for _ in range(4)))

    @app.get("/thread")
    def thread():
        for _ in range(4):
            anyio.from_thread.run(one)

    @app.get("/repeated")
    async def repeated(session: SessionDep, count: int):
        for number in range(count):
            await session.execute(text("SELECT :number"), {"number": number})

    return app


def access_lines(capsys):
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "request"]


def test_access_line_has_number_and_duration_of_queries(tmp_path, capsys):
    """A request without queries has neither."""
    with TestClient(app_of(tmp_path)) as client:
        for path in ("/three", "/none", "/three"):
            client.get(path)

    first, without, second = access_lines(capsys)
    assert (first["db_query_count"], second["db_query_count"]) == (3, 3)
    assert 0 < first["db_time_ms"] < first["duration_ms"]
    assert "db_query_count" not in without


@pytest.mark.parametrize("path", ["/tasks", "/thread"])
def test_queries_of_tasks_and_threads_count_for_the_request(tmp_path, capsys, caplog, path):
    """They have copies of the context."""
    with TestClient(app_of(tmp_path, n_plus_one=3)) as client:
        client.get(path)
        client.get("/none")

    first, without = access_lines(capsys)
    assert first["db_query_count"] == 4
    assert "db_query_count" not in without
    assert sum("same statement" in record.getMessage() for record in caplog.records) == 1


async def test_metrics_show_used_idle_and_waiting(tmp_path, registry):
    """And how long callers wait."""
    database = database_of(tmp_path, registry, pool_size=1, max_overflow=1)

    def usage(state):
        return registry.get_sample_value("db_client_connections_usage", {"pool": "primary", "state": state})

    def value(name):
        return registry.get_sample_value(f"db_client_connections_{name}", {"pool": "primary"})

    async def work():
        async with database.session() as session:
            await session.execute(text("SELECT 1"))

    async with database.engine.connect(), database.engine.connect():
        waiting = asyncio.create_task(work())
        while not value("pending_requests"):
            await asyncio.sleep(0.01)
        busy = usage("used"), usage("idle"), value("max"), value("overflow"), value("pending_requests")
    await waiting
    calm = usage("used"), value("overflow"), value("pending_requests")
    await database.engine.dispose()

    assert busy == (2, 0, 2, 1, 1)
    assert calm == (0, 0, 0)
    assert value("wait_time_seconds_count") == 3
    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 1


async def test_pools_of_one_name_are_summed(tmp_path, registry):
    """A pool that is gone is not shown."""
    first, second = (database_of(tmp_path, registry, pool_size=3, max_overflow=0) for _ in range(2))

    both = registry.get_sample_value("db_client_connections_max", {"pool": "primary"})

    assert both == 6
    for database in (first, second):
        await database.engine.dispose()


async def test_replica_has_its_own_pool_label(tmp_path, registry):
    """Statements of read sessions are measured with the pool label replica if read_url is set."""
    database = database_of(tmp_path, registry, read_url=f"sqlite:///{tmp_path}/a.db")

    async with database.read_session() as session:
        await session.execute(text("SELECT 1"))
    await database.engine.dispose()
    await database.read_engine.dispose()

    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "replica"}) == 1
    assert registry.get_sample_value("db_client_connections_wait_time_seconds_count", {"pool": "replica"}) == 1
    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 0


async def test_slow_query_is_logged_without_values(tmp_path, registry, caplog):
    """The log record of a slow query has the SQL with placeholders and the duration, but no values."""
    database = database_of(tmp_path, registry, slow_query=0.000001)
    quick = database_of(tmp_path, registry, slow_query=None)

    for each in (database, quick):
        async with each.session() as session:
            await session.execute(text("SELECT :secret"), {"secret": "hunter2"})
        await each.engine.dispose()

    [record] = [record for record in caplog.records if record.getMessage() == "slow query"]
    assert record.db_statement == "SELECT ?"
    assert record.db_duration_ms > 0
    assert "hunter2" not in caplog.text


async def test_failed_statement_is_measured(tmp_path, registry):
    """Such as a time-out, the slowest query."""
    database = database_of(tmp_path, registry)

    with pytest.raises(OperationalError):
        async with database.session() as session:
            await session.execute(text("SELECT * FROM nowhere"))
    await database.engine.dispose()

    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 1


async def test_cancelled_statement_is_measured(registry, caplog):
    """A statement cancelled by a time-out is counted in the duration metric and logged as a slow query."""
    with postgres_or_skip() as server:
        database = Database(DatabaseSettings(url=server.url(), ssl="off", slow_query=0.05), registry=registry)
        with pytest.raises(TimeoutError):
            async with database.session() as session:
                await session.connection()
                async with asyncio.timeout(0.2):
                    await session.execute(text("SELECT pg_sleep(60)"))
        await database.engine.dispose()

    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 1
    assert "SELECT pg_sleep(60)" in [getattr(record, "db_statement", None) for record in caplog.records]


def test_error_while_fetching_rows_is_not_measured_again(registry):
    """An error while rows are fetched adds no second sample, since the statement is already measured."""
    engine = create_engine("sqlite://")
    observe(engine, DatabaseSettings(url="sqlite://"), pool="primary", registry=registry)

    with engine.connect() as connection, pytest.raises(OperationalError):
        connection.execute(text("SELECT 1 UNION ALL SELECT abs(-9223372036854775807 - 1)")).all()
    engine.dispose()

    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 1


def test_null_pool_has_no_metrics(registry):
    """An engine with NullPool exports no connection metrics, so that a scrape does not fail."""
    engine = create_engine("sqlite://", poolclass=NullPool)
    observe(engine, DatabaseSettings(url="sqlite://"), pool="primary", registry=registry)

    assert registry.get_sample_value("db_client_connections_max", {"pool": "primary"}) is None


async def test_failed_commit_is_not_measured_as_a_statement(tmp_path, registry):
    """A constraint error at COMMIT adds no duration sample: only executed statements are measured."""
    database = database_of(tmp_path, registry)

    with pytest.raises(IntegrityError):
        async with database.session() as session:
            await session.execute(text("CREATE TABLE a (id INTEGER PRIMARY KEY)"))
            await session.execute(text("CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)"))
            await session.execute(text("INSERT INTO b VALUES (1)"))
    await database.engine.dispose()

    assert registry.get_sample_value("db_client_operation_duration_seconds_count", {"pool": "primary"}) == 3


@pytest.mark.parametrize(("most", "warnings"), [(3, 1), (4, 0), ("none", 0)])
def test_repeated_statement_logs_one_warning(tmp_path, caplog, most, warnings):
    """As an ORM executes one for each row."""
    caplog.set_level(logging.WARNING)

    with TestClient(app_of(tmp_path, n_plus_one=most)) as client:
        client.get("/repeated?count=4")
        client.get("/repeated?count=3")

    assert sum("same statement" in record.getMessage() for record in caplog.records) == warnings


def test_number_of_observed_requests_is_bounded(registry, caplog):
    """N+1 detection drops the data of the oldest of 101 requests, which bounds its memory."""
    engine = create_engine("sqlite://")
    observe(engine, DatabaseSettings(url="sqlite://", n_plus_one=1), pool="primary", registry=registry)
    oldest = {"request_id": "oldest"}

    with engine.connect() as connection:
        for request in (oldest, *({"request_id": str(number)} for number in range(100)), oldest):
            token = _context.begin(request)
            connection.execute(text("SELECT 1"))
            _context.end(token)
    engine.dispose()

    assert oldest["db_query_count"] == 2
    assert not [record for record in caplog.records if "same statement" in record.getMessage()]


async def test_statements_outside_of_a_request_are_not_counted(tmp_path, registry, caplog):
    """N+1 detection ignores statements of jobs, because a job may repeat a statement many times."""
    database = database_of(tmp_path, registry, n_plus_one=1)

    async with database.session() as session:
        for _ in range(3):
            await session.execute(text("SELECT 1"))
    await database.engine.dispose()

    assert not [record for record in caplog.records if "same statement" in record.getMessage()]


@pytest.mark.parametrize(("sql_comment", "expected"), [(True, "SELECT 1 /*request_id='{}'*/"), (False, "SELECT 1")])
def test_comment_has_the_request_id(tmp_path, sql_comment, expected):
    """Outside of requests there is none."""
    app = create_app(
        Settings(environment="test", database={"url": f"sqlite:///{tmp_path}/a.db", "sql_comment": sql_comment})
    )
    statements = []

    @app.get("/")
    async def read(session: SessionDep):
        await session.execute(text("SELECT 1"))

    event.listen(
        app.state.database.engine.sync_engine,
        "after_cursor_execute",
        lambda connection, cursor, statement, *_: statements.append(statement),
    )
    with TestClient(app) as client:
        request_id = client.get("/").headers["x-request-id"]
        client.portal.call(app.state.database.check)

    assert statements == [expected.format(request_id), "SELECT 1"]


def test_values_cannot_end_the_comment(registry):
    """It also has the trace id, if there is one."""
    engine = create_engine("sqlite://")
    statements = []
    observe(engine, DatabaseSettings(url="sqlite://", sql_comment=True), pool="primary", registry=registry)
    event.listen(engine, "after_cursor_execute", lambda connection, cursor, statement, *_: statements.append(statement))
    token = _context.begin({"request_id": "a'*/ b", "trace_id": "0af7"})

    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    _context.end(token)
    engine.dispose()

    assert statements == ["SELECT 1 /*request_id='a%27%2A%2F%20b',trace_id='0af7'*/"]
