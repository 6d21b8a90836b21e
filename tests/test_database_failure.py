"""Outages of the database: 503 in time, and service as soon as it is back."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import PlainTextResponse
from outages import Outages
from postgres import PASSWORD, Server, postgres_or_skip
from wire import serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.health import health_router
from fastapi_prodkit.sections import DatabaseSettings, HealthSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep, add_outage_handlers, is_unavailable
from fastapi_prodkit.database.failure import _handle_error

POOL_TIMEOUT = 1.5  # a busy machine keeps the margin of LATEST
LATEST = 1.9 * POOL_TIMEOUT  # twice would mean two waits
SECRET = "hunter2-7f3a"
NOWHERE = f"postgresql://user:{SECRET}@127.0.0.1:1/name"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the outages are made with /proc")
    with postgres_or_skip() as running:
        yield running


@pytest.fixture(scope="module")
def outages(server: Server) -> Iterator[Outages]:
    with Outages(server) as outages:
        yield outages


def settings_on(server: Server, **changes: Any) -> DatabaseSettings:
    values = {"ssl": "off", "pool_size": 3, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT, "command_timeout": 20}
    return DatabaseSettings(**{"url": server.url(), **values, **changes})


@pytest.fixture
async def database(server: Server) -> AsyncIterator[Database]:
    database = Database(settings_on(server))
    async with database.lifespan(None):
        yield database


def app_with(database: Database) -> FastAPI:
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database
    probes = HealthSettings(timeout=0.5, cache=0)
    app.include_router(health_router(probes, checks={"database": database.check}))

    @app.get("/")
    async def query(session: SessionDep) -> int:
        return int((await session.execute(text("SELECT 1"))).scalar_one())

    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def timed(client: httpx2.AsyncClient, path: str = "/") -> tuple[httpx2.Response, float]:
    started = time.perf_counter()
    response = await client.get(path, timeout=60)
    return response, time.perf_counter() - started


def assert_unavailable(response: httpx2.Response, seconds: float) -> None:
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json() == {"detail": "The database is not available."}
    assert seconds < LATEST


async def recovers(client: httpx2.AsyncClient, path: str, within: float = 2.0) -> bool:
    deadline = time.monotonic() + within
    while (status := (await client.get(path)).status_code) != 200 and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return status == 200


async def test_database_that_is_down_is_a_503() -> None:
    """At once."""
    async with client_of(app_with(Database(DatabaseSettings(url=NOWHERE, ssl="off")))) as client:
        response, seconds = await timed(client)

    assert_unavailable(response, seconds)


@pytest.mark.parametrize(("warm", "idle"), [(0, 0.0), (3, 0.0), (3, 0.2)])
async def test_silent_server_is_a_503_in_time(outages: Outages, database: Database, warm: int, idle: float) -> None:
    """Within the pool time-out, with or without open connections."""
    async with client_of(app_with(database)) as client:
        await asyncio.gather(*(database.check() for _ in range(warm)))
        await asyncio.sleep(idle)  # an idle connection is tested, one in use is not
        with outages.frozen():
            answers = await asyncio.gather(*(timed(client) for _ in range(10)))
            ready, ready_after = await timed(client, "/ready")
            alive, alive_after = await timed(client, "/health")
        back = await recovers(client, "/ready")
        served, _ = await timed(client)

    for response, seconds in answers:
        assert_unavailable(response, seconds)
    assert (ready.status_code, alive.status_code) == (503, 200)
    assert ready_after < 1
    assert alive_after < 0.5
    assert back
    assert served.status_code == 200


async def test_first_request_after_a_restart_succeeds(outages: Outages, database: Database) -> None:
    """Old connections are not used again."""
    async with client_of(app_with(database)) as client:
        await asyncio.gather(*(database.check() for _ in range(3)))
        with outages.down():
            during, seconds = await timed(client)
            ready, _ = await timed(client, "/ready")
        after, _ = await timed(client)
        ready_again, _ = await timed(client, "/ready")

    assert_unavailable(during, seconds)
    assert ready.status_code == 503
    assert after.status_code == 200
    assert ready_again.status_code == 200


async def test_connection_closed_by_the_server_is_not_tested(own: Database, database: Database) -> None:
    """The event loop knows that it is closed."""
    await asyncio.gather(*(own.check() for _ in range(3)))
    await administer(database, own, TERMINATE)
    for _ in range(20):
        await database.check()

    await own.check()

    assert own.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # the pool of every engine has it


async def test_working_idle_connection_is_kept(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection that passes the liveness check is reused, which is faster than connecting again."""
    monkeypatch.setattr("fastapi_prodkit.database.pool._FRESH", -1.0)
    backends = []

    for _ in range(3):
        async with database.session() as session:
            backends.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    assert len(set(backends)) == 1


@pytest.mark.parametrize("name", ["InternalClientError", "OutdatedSchemaCacheError"])
def test_connection_in_an_undefined_state_is_dropped(name: str) -> None:
    """An asyncpg error that leaves the connection state undefined is an outage and drops the connection."""
    error = type(name, (Exception,), {})()
    context = SimpleNamespace(original_exception=error, is_disconnect=False, connection=None, statement="SELECT 1")
    context.execution_context = None

    answer = _handle_error(context)  # type: ignore[arg-type] # the used attributes of an ExceptionContext

    assert isinstance(answer, OperationalError)
    assert is_unavailable(answer)
    assert context.is_disconnect


async def test_exhausted_pool_is_a_503_in_time(database: Database) -> None:
    """A request that finds all pooled connections in use gets a 503 once the pool time-out has passed."""
    async with client_of(app_with(database)) as client, AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(database.engine.connect())
        response, seconds = await timed(client)

    assert_unavailable(response, seconds)
    assert seconds > POOL_TIMEOUT * 0.9


async def test_server_without_free_connections_is_a_503(server: Server, database: Database) -> None:
    """The client does not see the server's message."""
    async with database.session() as session:
        await session.execute(text("DROP ROLE IF EXISTS few"))
        await session.execute(text(f"CREATE ROLE few LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 0"))
    url = server.url().replace("postgres:", "few:", 1).replace(server.url().split(":")[2].split("@")[0], SECRET)
    full = Database(settings_on(server, url=url))

    async with full.lifespan(None), client_of(app_with(full)) as client:
        response, seconds = await timed(client)

    assert_unavailable(response, seconds)


@pytest.fixture
async def own(server: Server, database: Database) -> AsyncIterator[Database]:
    """A database with one table for one test."""
    name = f"test_{uuid4().hex}"
    admin = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name} STRATEGY file_copy"))
    own = Database(settings_on(server, url=server.url(name)))
    async with own.lifespan(None):
        async with own.session() as session:
            await session.execute(text("CREATE TABLE items (name text PRIMARY KEY, size int NOT NULL DEFAULT 0)"))
        yield own
    async with admin.connect() as connection:
        await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


async def administer(database: Database, own: Database, statement: str) -> None:
    admin = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text(statement.format(name=own.engine.url.database)))


async def count(database: Database) -> int:
    async with database.read_session() as session:
        return int((await session.execute(text("SELECT count(*) FROM items"))).scalar_one())


def writing_app(database: Database) -> FastAPI:
    app = app_with(database)

    @app.post("/items/{name}")
    async def create(name: str, session: SessionDep) -> None:
        await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": name})

    @app.post("/read/{name}")
    async def create_while_reading(name: str, session: ReadSessionDep) -> None:
        await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": name})

    return app


async def test_fail_over_is_one_503(database: Database, own: Database) -> None:
    """The primary becomes read-only; then connections go to the new primary."""
    async with client_of(writing_app(own)) as client:
        await administer(database, own, "ALTER DATABASE {name} SET default_transaction_read_only = on")
        await own.engine.dispose()
        await asyncio.gather(*(own.check() for _ in range(3)))
        await administer(database, own, "ALTER DATABASE {name} SET default_transaction_read_only = off")
        refused, seconds = await timed_post(client, "/items/hammer")
        served = [(await timed_post(client, f"/items/{name}"))[0].status_code for name in ("a", "b", "c")]

    assert_unavailable(refused, seconds)
    assert served == [200, 200, 200]


async def test_outage_in_session_is_a_503(own: Database) -> None:
    """With the handlers of `add_outage_handlers`; other errors stay."""
    app = FastAPI()
    add_outage_handlers(app)
    missing = Database(DatabaseSettings(url=NOWHERE, ssl="off"))

    @app.get("/down")
    async def query_of_its_own() -> None:
        async with missing.session() as session:
            await session.execute(text("SELECT 1"))

    @app.get("/bug")
    async def bug() -> None:
        async with own.session() as session:
            await session.execute(text("SELECT * FROM missing"))

    async with client_of(app) as client:
        outage, error = await client.get("/down"), await client.get("/bug")

    assert (outage.status_code, error.status_code) == (503, 500)
    assert outage.headers["content-type"] == "application/problem+json"
    assert outage.headers["retry-after"] == "1"


async def test_handler_of_the_app_gets_the_error() -> None:
    """add_outage_handlers does not replace an exception handler that the app has registered for DBAPIError."""
    app = FastAPI()

    @app.exception_handler(DBAPIError)
    async def of_the_app(request: Any, error: Any) -> PlainTextResponse:
        return PlainTextResponse("mine", 502)

    add_outage_handlers(app)

    @app.get("/")
    async def query() -> None:
        async with Database(DatabaseSettings(url=NOWHERE, ssl="off")).session() as session:
            await session.execute(text("SELECT 1"))

    async with client_of(app) as client:
        response = await client.get("/")

    assert (response.status_code, response.text) == (502, "mine")


def socket_app(database: Database) -> FastAPI:
    app = create_app(Settings(log=None), database=database)

    @app.websocket("/shared")
    async def shared(websocket: WebSocket, session: SessionDep) -> None:
        await websocket.accept()
        async for statement in websocket.iter_text():
            await session.execute(text(statement))
            await websocket.send_text("done")

    @app.websocket("/own")
    async def own(websocket: WebSocket) -> None:
        await websocket.accept()
        async for statement in websocket.iter_text():
            async with database.session() as session:
                await session.execute(text(statement))

    return app


@pytest.mark.parametrize("path", ["/shared", "/own"])
@pytest.mark.parametrize(
    ("url", "statement", "code"),
    [(NOWHERE, "SELECT 1", 1013), ("sqlite://", "INSERT INTO items VALUES (1)", 1008)],
)
def test_outage_closes_an_open_websocket(
    caplog: pytest.LogCaptureFixture, path: str, url: str, statement: str, code: int
) -> None:
    """With 1013, for a conflict with 1008; one warning, no traceback, and the reason of a refusal on the line."""
    client = pytest.importorskip("websockets.sync.client")
    closed = pytest.importorskip("websockets.exceptions").ConnectionClosed
    database = Database(DatabaseSettings(url=url, ssl="off"))
    app = socket_app(database)

    @event.listens_for(database.engine.sync_engine, "begin")
    def prepare(connection: Any) -> None:
        connection.exec_driver_sql("CREATE TABLE items (id integer PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO items VALUES (1)")

    with serving(app) as port, client.connect(f"ws://127.0.0.1:{port}{path}") as socket:
        socket.send(statement)
        with pytest.raises(closed) as ended:
            socket.recv()

    assert ended.value.rcvd.code == code
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    if code == 1013:
        assert warnings.pop().reason.startswith("the database is unavailable: ")
    [warning] = warnings
    assert warning.exc_info is None
    assert warning.name.startswith("fastapi_prodkit.database")


def test_outage_after_a_closed_websocket_is_one_warning(
    server: Server, outages: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit that fails after the client has closed the WebSocket logs one warning and no error."""
    client = pytest.importorskip("websockets.sync.client")
    app = socket_app(Database(settings_on(server)))

    with serving(app) as port, client.connect(f"ws://127.0.0.1:{port}/shared") as socket:
        socket.send("SELECT 1")
        assert socket.recv() == "done"
        with outages.down():
            socket.close()
            deadline = time.monotonic() + 10
            while "the database is unavailable" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)

    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith("the database is unavailable: ")


async def timed_post(client: httpx2.AsyncClient, path: str) -> tuple[httpx2.Response, float]:
    started = time.perf_counter()
    response = await client.post(path, timeout=60)
    return response, time.perf_counter() - started


async def test_other_database_errors_are_no_503(own: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A violated constraint is a conflict, a write in a read session a 500."""
    async with client_of(writing_app(own)) as client:
        statuses = [(await client.post(path)).status_code for path in ("/items/a", "/items/a", "/read/b")]

    assert statuses == [200, 409, 500]
    assert await count(own) == 1


async def test_connection_lost_before_the_rollback_keeps_the_answer(
    own: Database, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has rolled back."""
    app = writing_app(own)

    @app.post("/refused")
    async def refused(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO items VALUES ('a')"))
        connection = await (await session.connection()).get_raw_connection()
        await administer(database, own, TERMINATE)
        while not connection.driver_connection.is_closed():
            await asyncio.sleep(0)
        raise HTTPException(418)

    async with client_of(app) as client:
        response = await client.post("/refused")

    assert response.status_code == 418
    assert await count(own) == 0
    assert "a transaction ended with its connection: InterfaceError" in caplog.messages
    assert own.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # the pool of every engine has it


async def test_lock_time_out_is_a_503(own: Database) -> None:
    """A statement that exceeds lock_timeout is answered with a 503, because a later attempt may succeed."""
    app = app_with(own)

    @app.post("/locked")
    async def locked(session: SessionDep) -> None:
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        await session.execute(text("LOCK TABLE items"))

    async with client_of(app) as client, own.session() as holder:
        await holder.execute(text("LOCK TABLE items"))
        response, seconds = await timed_post(client, "/locked")

    assert_unavailable(response, seconds)


async def test_outage_shows_no_credentials_and_values(own: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the log nor in the answer."""
    caplog.set_level(logging.DEBUG)
    unreachable = Database(DatabaseSettings(url=NOWHERE, ssl="off"))

    async with client_of(writing_app(own)) as client, client_of(app_with(unreachable)) as other:
        answers = [await client.post(f"/items/{SECRET}") for _ in range(2)]
        answers.append(await other.get("/"))
        answers.append(await other.get("/ready"))

    assert [answer.status_code for answer in answers] == [200, 409, 503, 503]
    written = [record for record in caplog.records if not record.name.startswith(("httpx2", "httpcore2"))]
    said = "".join([*(logging.Formatter().format(record) for record in written), *(answer.text for answer in answers)])
    assert "the database is unavailable: CannotConnectError ConnectionRefusedError" in said
    assert SECRET not in said
    assert PASSWORD not in said


# --- start-up


async def test_start_waits_for_the_database(server: Server, outages: Outages, caplog: pytest.LogCaptureFixture) -> None:
    """As long as DATABASE_STARTUP_TIMEOUT; then the app starts anyway."""
    caplog.set_level(logging.INFO, "fastapi_prodkit")
    waiting = Database(settings_on(server, startup_timeout=30.0))
    hopeless = Database(DatabaseSettings(url=NOWHERE, ssl="off", startup_timeout=0.3))
    started = time.perf_counter()

    async with AsyncExitStack() as stack:
        with outages.down():
            starting = asyncio.ensure_future(stack.enter_async_context(waiting.lifespan(None)))
            while "waiting for the database" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(starting, 20)
        await waiting.check()
    async with hopeless.lifespan(None):
        pass

    assert time.perf_counter() - started < 20
    assert "starting without the database, which did not answer within 0.3 s" in caplog.text


async def test_start_fails_at_once_for_other_errors(server: Server, monkeypatch: Any) -> None:
    """An error of the database check that is no outage ends the application start without a retry."""
    database = Database(settings_on(server, startup_timeout=5))

    async def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(database, "check", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        async with database.lifespan(None):
            pass


# --- transact


async def test_transact_repeats_a_transient_failure(own: Database, database: Database) -> None:
    """It is stored once."""
    attempts = []

    async def work(session: Any) -> str:
        attempts.append(session)
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        size = (await session.execute(text("SELECT count(*) FROM items"))).scalar_one()
        if len(attempts) == 1:
            await administer(database, own, TERMINATE)
        if len(attempts) == 2:
            async with own.session() as other:
                await other.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
                await other.execute(text("INSERT INTO items SELECT 'other' || count(*) FROM items"))
        await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": f"item-{size}"})
        return f"after {size}"

    result = await own.transact(work)

    assert result == "after 1"
    assert len(attempts) == 3
    assert await count(own) == 2


TERMINATE = "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity WHERE datname = '{name}'"


async def test_transact_does_not_repeat_a_lost_commit(own: Database, database: Database) -> None:
    """It may have been committed."""
    attempts = []

    async def work(session: Any) -> None:
        attempts.append(session)
        await session.execute(text("INSERT INTO items VALUES ('hammer')"))
        await administer(database, own, TERMINATE)

    with pytest.raises(DBAPIError) as caught:
        await own.transact(work)

    assert caught.value.connection_invalidated
    assert len(attempts) == 1


@pytest.mark.parametrize(("attempts", "refused"), [(1, 1), (2, 2)])
async def test_transact_limits_its_attempts(attempts: int, refused: int, caplog: pytest.LogCaptureFixture) -> None:
    """The last error is raised."""
    database = Database(DatabaseSettings(url=NOWHERE, ssl="off"))
    calls = []

    async def work(session: Any) -> None:
        calls.append(session)
        await session.execute(text("SELECT 1"))

    with pytest.raises(OperationalError):
        await database.transact(work, attempts=attempts)

    assert len(calls) == refused


async def test_transact_does_not_repeat_other_errors(own: Database) -> None:
    """transact does not retry a function that fails with a constraint violation or a programming error."""
    calls = []

    async def twice(session: Any) -> None:
        calls.append(session)
        await session.execute(text("INSERT INTO items VALUES ('a'), ('a')"))

    async def bug(session: Any) -> None:
        calls.append(session)
        raise RuntimeError("a bug")

    with pytest.raises(IntegrityError):
        await own.transact(twice)
    with pytest.raises(RuntimeError):
        await own.transact(bug)

    assert len(calls) == 2
