"""The database: sessions that commit before the response is sent, and connections that are checked and closed."""

import asyncio
import contextlib
import gc
import importlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import anyio
import httpx2
import pytest
import trustme
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from postgres import PASSWORD, Server, postgres_or_skip

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError
from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import ForeignKey, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_prodkit.database import Database, SessionDep, get_session
from fastapi_prodkit.database.engine import create_engine

SECRET = "hunter2-7f3a"
TWICE = "hammer"
NOWHERE = f"postgresql://user:{SECRET}@127.0.0.1:1/name"


class Base(DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    name: Mapped[str] = mapped_column(primary_key=True)


class Part(Base):
    __tablename__ = "parts"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(ForeignKey("items.name", deferrable=True, initially="DEFERRED"))


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def server(authority: trustme.CA) -> Iterator[Server]:
    leaf = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    with postgres_or_skip(certificate=chain, key=leaf.private_key_pem.bytes()) as running:
        yield running


@asynccontextmanager
async def database_on(server: Server) -> AsyncIterator[DatabaseSettings]:
    """Create a PostgreSQL database for one test."""
    name = f"test_{uuid4().hex}"
    await administer(server, f"CREATE DATABASE {name} STRATEGY file_copy")
    settings = DatabaseSettings(url=server.url(name), ssl="off")
    await create_tables(settings)
    yield settings
    await administer(server, f"DROP DATABASE {name} WITH (FORCE)")


async def administer(server: Server, statement: str) -> list[Any]:
    admin = Database(DatabaseSettings(url=server.url(), ssl="off"))
    engine = admin.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with admin.lifespan(None), engine.connect() as connection:
        result = await connection.execute(text(statement))
        return list(result.scalars()) if result.returns_rows else []


async def create_tables(settings: DatabaseSettings) -> None:
    database = Database(settings)
    async with database.lifespan(None), database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.fixture
async def on_postgresql(server: Server) -> AsyncIterator[DatabaseSettings]:
    async with database_on(server) as settings:
        yield settings


@pytest.fixture
async def on_sqlite(tmp_path: Path) -> DatabaseSettings:
    settings = DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db")
    await create_tables(settings)
    return settings


@pytest.fixture(params=["sqlite", "postgresql"])
async def settings(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DatabaseSettings]:
    if request.param == "postgresql":
        async with database_on(request.getfixturevalue("server")) as settings:
            yield settings
    else:
        settings = DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db")
        await create_tables(settings)
        yield settings


@pytest.fixture
async def database(settings: DatabaseSettings) -> AsyncIterator[Database]:
    database = Database(settings)
    async with database.lifespan(None):
        yield database


def app_with(database: Database) -> FastAPI:
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database

    @app.post("/items/{name}")
    async def create(name: str, session: SessionDep) -> str:
        session.add(Item(name=name))
        return name

    return app


def client_of(app: Any, *, raise_app_exceptions: bool = False) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=raise_app_exceptions)
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


async def stored(settings: DatabaseSettings) -> list[str]:
    """Return the rows that another connection sees."""
    other = Database(settings)
    async with other.lifespan(None), other.engine.connect() as connection:
        return list(await connection.scalars(select(Item.name).order_by(Item.name)))


def everything_shown(error: BaseException) -> str:
    """Return all that a log or an error tracker could show of an error, including what `from None` hides."""
    said = [str(error), repr(error), *traceback.format_exception(error)]
    for linked in (error.__cause__, error.__context__):
        said.append(everything_shown(linked) if linked else "")
    return "\n".join(said)


# --- the session of a request


async def test_commit_precedes_the_response(database: Database, settings: DatabaseSettings) -> None:
    """When the first byte is sent, another connection sees the row."""
    app = app_with(database)
    seen_at: dict[str, list[str]] = {}

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        async def send_and_look(message: Any) -> None:
            seen_at[message["type"]] = await stored(settings)
            await send(message)

        await app(scope, receive, send_and_look)

    async with client_of(recording) as client:
        response = await client.post("/items/hammer")

    assert response.status_code == 200
    assert seen_at["http.response.start"] == ["hammer"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/exception", 500), ("/http-exception", 409), ("/validation?count=x", 422), ("/teardown", 500), ("/model", 500)],
)
async def test_exception_rolls_back(database: Database, settings: DatabaseSettings, path: str, status: int) -> None:
    """Whatever raises it."""
    app = app_with(database)

    async def write(session: SessionDep) -> None:
        session.add(Item(name="hammer"))
        await session.flush()

    async def failing_teardown(session: SessionDep) -> AsyncIterator[None]:
        yield
        raise RuntimeError("teardown")

    @app.get("/exception", dependencies=[Depends(write)])
    async def exception() -> None:
        raise RuntimeError("handler")

    @app.get("/http-exception", dependencies=[Depends(write)])
    async def http_exception() -> None:
        raise HTTPException(409)

    @app.get("/validation", dependencies=[Depends(write)])
    async def validation(count: int) -> None: ...

    @app.get("/teardown", dependencies=[Depends(write), Depends(failing_teardown, scope="function")])
    async def teardown() -> None: ...

    @app.get("/model", dependencies=[Depends(write)])
    async def model() -> int:
        return "not a number"

    async with client_of(app) as client:
        response = await client.get(path)

    assert response.status_code == status
    assert await stored(settings) == []


async def test_failed_commit_is_a_conflict(database: Database, settings: DatabaseSettings) -> None:
    """For a constraint that is checked at the commit."""
    app = app_with(database)

    @app.post("/parts")
    async def create(session: SessionDep) -> str:
        session.add(Part(id=1, item="missing"))
        await session.flush()
        return "created"

    async with client_of(app) as client:
        response = await client.post("/parts")

    assert response.status_code == 409
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


BRIEFLY = "SET LOCAL statement_timeout = 20"
ABORTED = {
    "postgresql": (f"INSERT INTO items VALUES ('{TWICE}')", f"{BRIEFLY}; SELECT pg_sleep(30)", "SELECT 1 / 0"),
    "sqlite": (f"INSERT OR ROLLBACK INTO items VALUES ('{TWICE}')",),
}


@pytest.mark.parametrize(
    ("settings", "statement"),
    [(kind, statement) for kind, statements in ABORTED.items() for statement in statements],
    indirect=["settings"],
)
async def test_aborted_transaction_is_a_500(
    settings: DatabaseSettings, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler has ignored a failed statement; in a job it is an error."""
    database = Database(settings)
    app = create_app(Settings(environment="test"), database=database)

    async def work(session: AsyncSession) -> None:
        await session.execute(text(f"INSERT INTO items VALUES ('{TWICE}')"))
        with contextlib.suppress(DBAPIError):
            for each in statement.split("; "):
                await session.execute(text(each))

    @app.post("/items")
    async def create(session: SessionDep) -> None:
        await work(session)

    @app.post("/early")
    async def create_early(session: SessionDep) -> None:
        await work(session)
        await session.commit()

    async with database.lifespan(None), client_of(app) as client:
        answers = [await client.post(path) for path in ("/items", "/early")]
        with pytest.raises(SQLAlchemyError, match="COMMIT"):
            await database.transact(work)
        with pytest.raises(SQLAlchemyError, match="COMMIT"):
            async with database.session() as session:
                await work(session)
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it

    assert [answer.status_code for answer in answers] == [500, 500]
    assert answers[0].headers["content-type"] == "application/problem+json"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2
    assert await stored(settings) == []


@pytest.mark.parametrize(("statement", "saved"), [("ROLLBACK", []), ("COMMIT", [TWICE]), ("END", [TWICE])])
async def test_transaction_ended_by_a_statement_is_a_500(
    settings: DatabaseSettings, statement: str, saved: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The one record says what to use."""
    database = Database(settings)
    app = create_app(Settings(environment="test"), database=database)

    @app.post("/items")
    async def create(session: SessionDep) -> None:
        session.add(Item(name=TWICE))
        await session.flush()
        await session.execute(text(statement))

    async with database.lifespan(None), client_of(app) as client:
        response = await client.post("/items")
        after = await client.post("/items")  # the connection is returned without a transaction

    assert [response.status_code, after.status_code] == [500, 409 if saved else 500]
    [record] = [record for record in caplog.records if record.levelname == "ERROR"][:1]
    assert "a statement has ended" in str(record.exc_info)
    assert await stored(settings) == saved


async def test_error_in_a_savepoint_does_not_abort_the_transaction(
    database: Database, settings: DatabaseSettings
) -> None:
    """A failed statement that a savepoint has rolled back does not prevent the commit."""
    async with database.session() as session:
        session.add(Item(name=TWICE))
        await session.flush()
        with contextlib.suppress(DBAPIError):
            async with session.begin_nested():
                await session.execute(text(f"INSERT INTO items VALUES ('{TWICE}')"))

    assert await stored(settings) == [TWICE]


async def test_transaction_lost_by_sqlite_may_be_rolled_back(on_sqlite: DatabaseSettings) -> None:
    """The handler then begins another one on the same connection."""
    database = Database(on_sqlite)

    async with database.lifespan(None), database.session() as session:
        with contextlib.suppress(DBAPIError):
            await session.execute(text("SELECT * FROM missing"))
        await session.execute(text(f"INSERT INTO items VALUES ('{TWICE}')"))
        with contextlib.suppress(DBAPIError):
            await session.execute(text(ABORTED["sqlite"][0]))
        await session.rollback()
        session.add(Item(name="again"))

    assert await stored(on_sqlite) == ["again"]


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_cancelled_request_is_rolled_back(database: Database, settings: DatabaseSettings, how: str) -> None:
    """Cancelled by its task, or by a cancel scope as Starlette uses."""
    app = app_with(database)
    flushed = asyncio.Event()
    sent: list[Any] = []
    scope = anyio.CancelScope()

    @app.get("/slow")
    async def slow(session: SessionDep) -> None:
        session.add(Item(name="hammer"))
        await session.flush()
        flushed.set()
        await asyncio.Event().wait()

    async def request() -> None:
        async def receive() -> Any:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        connection = {"type": "http", "method": "GET", "path": "/slow", "query_string": b"", "headers": []}
        with scope:
            await app(connection, receive, send)

    task = asyncio.create_task(request())
    await flushed.wait()
    task.cancel() if how == "task" else scope.cancel()
    await asyncio.wait([task])

    assert sent == []
    assert await stored(settings) == []
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


async def test_dependencies_share_the_session(database: Database) -> None:
    """All dependencies of one request get one session, at every depth of nesting."""
    app = app_with(database)

    async def inner(session: SessionDep) -> AsyncSession:
        return session

    async def outer(session: Annotated[AsyncSession, Depends(inner)]) -> AsyncSession:
        return session

    @app.get("/")
    async def same(session: SessionDep, nested: Annotated[AsyncSession, Depends(outer)]) -> bool:
        return session is nested

    async with client_of(app) as client:
        response = await client.get("/")

    assert response.json() is True


async def test_objects_stay_readable_after_the_commit(database: Database) -> None:
    """A handler may commit the session itself and still read the attributes of the stored object."""
    app = app_with(database)

    @app.post("/early")
    async def early(session: SessionDep) -> str:
        item = Item(name="hammer")
        session.add(item)
        await session.commit()
        return item.name

    async with client_of(app) as client:
        response = await client.post("/early")

    assert response.json() == "hammer"


async def test_route_that_never_queries_takes_no_connection() -> None:
    """It answers while the database is down."""
    app = app_with(Database(DatabaseSettings(url=NOWHERE, ssl="off")))

    @app.get("/")
    async def idle(session: SessionDep) -> str:
        return "fine"

    async with client_of(app) as client:
        response = await client.get("/")

    assert response.status_code == 200


async def test_fifty_requests_share_five_connections(settings: DatabaseSettings) -> None:
    """Fifty concurrent requests wait for a pool of five connections, and each of them is stored."""
    database = Database(settings.model_copy(update={"max_overflow": 0, "pool_timeout": 30.0}))
    app = app_with(database)
    names = [f"item-{number:02}" for number in range(50)]

    async with database.lifespan(None), client_of(app) as client:
        responses = await asyncio.gather(*(client.post(f"/items/{name}") for name in names))
        open_connections = database.engine.pool.checkedin()  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it

    assert {response.status_code for response in responses} == {200}
    assert await stored(settings) == names
    assert open_connections <= 5


# --- beyond the handler: streams, background tasks, WebSockets


async def test_stream_of_rows_already_read_needs_no_connection(database: Database) -> None:
    """While a stream sends rows that were already read, the pool has no connection checked out."""
    app = app_with(database)
    checked_out: list[int] = []

    @app.get("/stream")
    async def stream(session: SessionDep) -> StreamingResponse:
        names = list(await session.scalars(select(Item.name)))

        async def lines() -> AsyncIterator[str]:
            checked_out.append(database.engine.pool.checkedout())  # type: ignore[attr-defined] # the pool has it
            for name in names:
                yield name

        return StreamingResponse(lines())

    async with client_of(app) as client:
        await client.post("/items/hammer")
        response = await client.get("/stream")

    assert response.text == "hammer"
    assert checked_out == [0]


@pytest.mark.parametrize("path", ["/stream", "/background"])
async def test_closed_session_refuses_work(database: Database, path: str) -> None:
    """Streams and background tasks run after the commit."""
    app = app_with(database)

    async def query(session: AsyncSession) -> list[str]:
        return list(await session.scalars(select(Item.name)))

    @app.get("/stream")
    async def stream(session: SessionDep) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for name in await query(session):
                yield name

        return StreamingResponse(lines())

    @app.get("/background")
    async def background(session: SessionDep, tasks: BackgroundTasks) -> None:
        tasks.add_task(query, session)

    async with client_of(app, raise_app_exceptions=True) as client:
        with pytest.raises((InvalidRequestError, ExceptionGroup)) as caught:
            await client.get(path)

    assert "permanently closed" in everything_shown(caught.value)
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


async def test_session_works_after_the_response_start(database: Database, settings: DatabaseSettings) -> None:
    """In streams and background tasks; it commits."""
    app = app_with(database)

    async def store(name: str) -> None:
        async with database.session() as session:
            session.add(Item(name=name))

    @app.get("/")
    async def both(tasks: BackgroundTasks) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            await store("from the stream")
            yield "done"

        tasks.add_task(store, "from the task")
        return StreamingResponse(lines())

    async with client_of(app) as client:
        await client.get("/")

    assert await stored(settings) == ["from the stream", "from the task"]


async def test_job_is_rolled_back_on_an_exception(database: Database, settings: DatabaseSettings) -> None:
    """If the block of `database.session()` raises, its flushed changes are rolled back."""
    with pytest.raises(RuntimeError, match="job"):
        async with database.session() as session:
            session.add(Item(name="hammer"))
            await session.flush()
            raise RuntimeError("job")

    assert await stored(settings) == []


async def test_websocket_commits_when_it_ends(settings: DatabaseSettings) -> None:
    """The session of a WebSocket route is committed when the route returns."""
    app = app_with(Database(settings))

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, session: SessionDep) -> None:
        await websocket.accept()
        session.add(Item(name=await websocket.receive_text()))
        await websocket.close()

    def talk() -> None:
        with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
            websocket.send_text("hammer")
            assert websocket.receive()["type"] == "websocket.close"

    await asyncio.to_thread(talk)

    assert await stored(settings) == ["hammer"]


# --- how the session finds its database


async def test_two_apps_have_separate_databases(on_sqlite: DatabaseSettings, on_postgresql: DatabaseSettings) -> None:
    """Two apps in one process each write to their own database."""
    first, second = Database(on_sqlite), Database(on_postgresql)

    async with first.lifespan(None), second.lifespan(None):
        one, other = client_of(app_with(first)), client_of(app_with(second))
        await asyncio.gather(one.post("/items/hammer"), other.post("/items/saw"))

    assert await stored(on_sqlite) == ["hammer"]
    assert await stored(on_postgresql) == ["saw"]


async def test_mounted_app_uses_the_database_of_the_edge(on_sqlite: DatabaseSettings) -> None:
    """It has no database in its own state."""
    database = Database(on_sqlite)
    sub = app_with(database)
    del sub.state.database
    app = FastAPI()
    app.mount("/sub", sub)

    async def edge(scope: Any, receive: Any, send: Any) -> None:
        scope["fastapi_prodkit"] = {"database": database}
        await app(scope, receive, send)

    async with database.lifespan(None), client_of(edge) as client:
        await client.post("/sub/items/hammer")

    assert await stored(on_sqlite) == ["hammer"]


async def test_mounted_app_uses_a_database_of_its_own(
    on_sqlite: DatabaseSettings, on_postgresql: DatabaseSettings
) -> None:
    """`app.state.database` of the app that has the route wins over the database of the app around it."""
    outer, own = Database(on_sqlite), Database(on_postgresql)
    app = create_app(Settings(environment="test"), database=outer)
    app.mount("/sub", app_with(own))

    async with outer.lifespan(None), own.lifespan(None), client_of(app) as client:
        await client.post("/sub/items/hammer")

    assert await stored(on_sqlite) == []
    assert await stored(on_postgresql) == ["hammer"]


@pytest.mark.parametrize("scope_key", [{}, {"fastapi_prodkit": {}}])
async def test_missing_database_is_named_with_its_remedy(scope_key: dict[str, Any]) -> None:
    """A session dependency without a database raises an error with the assignment to `app.state.database`."""
    app = FastAPI()

    @app.get("/")
    async def idle(session: SessionDep) -> None: ...

    async def edge(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, **scope_key}, receive, send)

    async with client_of(edge, raise_app_exceptions=True) as client:
        with pytest.raises(ConfigurationError, match=r"app\.state\.database = Database\(\.\.\.\)"):
            await client.get("/")


async def test_session_can_be_overridden(on_sqlite: DatabaseSettings) -> None:
    """By `app.dependency_overrides[get_session]`."""
    database = Database(on_sqlite)
    app = app_with(Database(DatabaseSettings(url=NOWHERE, ssl="off")))

    async with database.lifespan(None), database.session() as session:
        app.dependency_overrides[get_session] = lambda: session
        async with client_of(app) as client:
            response = await client.post("/items/hammer")
        names = list(await session.scalars(select(Item.name)))

    assert response.status_code == 200
    assert names == ["hammer"]


# --- lifespan and check


async def test_shutdown_closes_every_connection(server: Server, on_postgresql: DatabaseSettings) -> None:
    """Nothing is left for the garbage collector."""
    database = Database(on_postgresql)
    name = database.engine.url.database

    async with database.lifespan(None):
        await asyncio.gather(*(database.check() for _ in range(3)))
        before = await administer(server, f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'")
    gc.collect()

    after = await administer(server, f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'")
    assert before
    assert after == []


async def test_connection_in_use_at_shutdown_is_closed_when_it_is_returned(on_postgresql: DatabaseSettings) -> None:
    """A task that outlives the app gives its connection back to a pool that nobody uses any more."""
    database = Database(on_postgresql)

    async with AsyncExitStack() as stack:
        async with database.lifespan(None):
            session = await stack.enter_async_context(database.session())
            driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        assert not driver.is_closed()

    assert driver.is_closed()


def test_app_starts_and_stops_while_the_database_is_down() -> None:
    """Readiness reports that it is missing."""
    app = app_with(Database(DatabaseSettings(url=NOWHERE, ssl="off")))

    with TestClient(app) as client:
        response = client.get("/nothing")

    assert response.status_code == 404


def test_app_can_be_restarted(settings: DatabaseSettings) -> None:
    """It opens new connections."""
    app = app_with(Database(settings))
    statuses = []

    for name in ("hammer", "saw"):
        with TestClient(app) as client:
            statuses.append(client.post(f"/items/{name}").status_code)

    assert statuses == [200, 200]


async def test_check_passes_while_the_database_answers(database: Database) -> None:
    """It returns its connection."""
    await database.check()

    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


async def test_closed_connections_are_replaced(server: Server, on_postgresql: DatabaseSettings) -> None:
    """The server has ended them, as a restart does."""
    database = Database(on_postgresql)
    name = database.engine.url.database

    async with database.lifespan(None):
        await database.check()
        ended = await administer(
            server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        while await administer(server, f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"):
            pass
        await database.check()

    assert ended == [True]


async def test_check_fails_when_the_server_is_down() -> None:
    """The check of the database raises OperationalError if the server refuses the connection."""
    database = Database(DatabaseSettings(url=NOWHERE, ssl="off"))

    with pytest.raises(OperationalError, match="Connect call failed"):
        await database.check()


@pytest.mark.parametrize("query", ["", "?connect_timeout=0.2"])
async def test_check_of_a_silent_server_times_out(query: str) -> None:
    """After the connect time-out; its value in the URL wins."""
    timeout = 60 if query else 0.2

    async with silent_server() as (port, _):
        url = f"postgresql://user:password@127.0.0.1:{port}/name{query}"
        database = Database(DatabaseSettings(url=url, ssl="off", connect_timeout=timeout))
        started = time.monotonic()
        with pytest.raises(OperationalError, match="TimeoutError"):
            await database.check()

    assert time.monotonic() - started < 5


async def test_slow_statement_times_out(on_postgresql: DatabaseSettings) -> None:
    """A statement that runs longer than `command_timeout` raises OperationalError."""
    database = Database(on_postgresql.model_copy(update={"command_timeout": 0.2}))

    async with database.lifespan(None):
        with pytest.raises(OperationalError, match="TimeoutError"):
            async with database.session() as session:
                await session.execute(text("SELECT pg_sleep(60)"))


async def test_check_on_a_silent_pooled_connection_times_out(server: Server) -> None:
    """After the command time-out and the connect time-out."""
    async with wire_to(server.port) as (port, connected):
        url = server.url().replace(f":{server.port}/", f":{port}/")
        database = Database(DatabaseSettings(url=url, ssl="off", connect_timeout=0.5, command_timeout=0.5))
        async with database.lifespan(None):
            await database.check()
            connected.clear()
            started = time.monotonic()
            with pytest.raises(OperationalError, match="TimeoutError"):
                await database.check()

    assert time.monotonic() - started < 5


# --- URLs


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_postgresql_urls_use_asyncpg(scheme: str) -> None:
    """In every spelling that platforms use."""
    database = Database(DatabaseSettings(url=f"{scheme}://user:p%40ss@host:5433/name?host=other", ssl="off"))

    assert database.engine.driver == "asyncpg"
    assert database.engine.url.password == "p@ss"


async def test_password_may_have_any_character(server: Server) -> None:
    """Percent-encoded."""
    answer = await administer(server, "SELECT 1")

    assert answer == [1]
    assert set("/:@% ") <= set(PASSWORD)


async def test_application_name_of_the_url_is_sent(server: Server) -> None:
    """PostgreSQL receives the `application_name` of the URL, so operators can identify the connections."""
    database = Database(DatabaseSettings(url=server.url(query="application_name=shop"), ssl="off"))

    async with database.lifespan(None), database.session() as session:
        name = await session.scalar(text("SHOW application_name"))

    assert name == "shop"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        (f"mysql://user:{SECRET}@host/name", "must begin with one of postgresql://"),
        (SECRET, "is not a URL like"),
        (f"postgresql://user:{SECRET}", "is not a URL like"),
        (f"postgresql://user:{SECRET}@{SECRET}@host/name", "percent-encoded"),
        (f"postgresql://user:{SECRET}@host/name?pass&{SECRET}=1", "only sslmode, ssl, sslrootcert"),
        (f"postgresql://user:{SECRET}@host/name?sslmode={SECRET}", "sslmode must be one of disable"),
        (f"postgresql://user:{SECRET}@host/name?connect_timeout={SECRET}", "connect_timeout must be"),
        (f"postgresql://user:{SECRET}@host/name?connect_timeout=0", "connect_timeout must be"),
        *(
            (url, "names no host")
            for url in (
                *("postgresql://", "postgresql:///", f"postgresql://u:{SECRET}@/name", "postgresql://:5432/name"),
                *(f"postgresql://u:{SECRET}@h,/name", f"postgresql://u:{SECRET}@,h/name"),
            )
        ),
        *(
            (f"postgresql://u:{SECRET}@{place}", "a port is a number from 1 to 65535")
            for place in ("h:0/n", "h:65536/n", "h:-1/n", "h:1,i:99999/n", "h/n?host=i:0", "h/n?port=x")
        ),
        *((f"{url}", "is not a URL like") for url in (f"postgresql:{SECRET}@h/n", f" postgresql://u:{SECRET}@h/n")),
        *((f"postgresql://u:{SECRET}@{place}", "is not a URL like") for place in ("h h/n", "h/n ", "h/n\n", "h:/n")),
        (f"sqlite://{SECRET}", "sqlite:///relative.db"),
        (f"sqlite://user:{SECRET}@/file.db", "sqlite:///relative.db"),
    ],
)
def test_invalid_url_is_an_error_without_its_text(url: str, remedy: str) -> None:
    """The error about an invalid DATABASE_URL explains the fault without any secret part of the URL."""
    settings = DatabaseSettings(url=url, ssl="off")

    with pytest.raises(ConfigurationError) as caught:
        Database(settings)

    assert remedy in str(caught.value)
    assert "DATABASE_URL" in str(caught.value)
    assert SECRET not in everything_shown(caught.value)


@pytest.mark.parametrize("name", ["url", "read_url", "migrations_url"])
@pytest.mark.parametrize("url", [SECRET, f"postgresql://u:{SECRET}@h/n?sslmode=x", f"postgresql://u:{SECRET}@h:0/n"])
def test_invalid_url_is_an_error_with_its_variable(name: str, url: str) -> None:
    """The error about an invalid URL names the variable from which it was read, such as DATABASE_READ_URL."""
    settings = DatabaseSettings.model_validate({"url": "postgresql://u@h/n", "ssl": "off", name: url})

    with pytest.raises(ConfigurationError, match=f"^DATABASE_{name.upper()}\\b") as caught:
        create_engine(settings.model_copy(update={"url": getattr(settings, name)}))

    assert SECRET not in everything_shown(caught.value)


@pytest.mark.parametrize(
    "url",
    ["postgresql:///n", "postgresql://u@/n", "postgresql://u:p@/n?host=/run/postgresql", "postgresql://u:p@[::1]:1/n"],
)
def test_host_may_be_a_socket_or_an_ipv6_address(url: str) -> None:
    """create_engine accepts a URL without a host, with a socket directory, or with an IPv6 address."""
    create_engine(DatabaseSettings(url=url, ssl="off"))


@pytest.mark.parametrize("case", ["password", "database", "down"])
async def test_connection_error_does_not_contain_the_password(server: Server, case: str) -> None:
    """Nor do its objects."""
    url = {
        "password": server.url(password=SECRET),
        "database": server.url("missing"),
        "down": NOWHERE,
    }[case]
    database = Database(DatabaseSettings(url=url, ssl="off"))

    with pytest.raises(OperationalError) as caught:
        await database.check()

    said = everything_shown(caught.value) + repr(database.engine) + str(database.engine.url)
    assert SECRET not in said
    assert PASSWORD not in said


async def test_constraint_error_does_not_quote_the_row(database: Database) -> None:
    """The text of an IntegrityError contains no values of the rejected row, so logs do not leak them."""
    with pytest.raises(IntegrityError) as caught:
        async with database.session() as session:
            session.add_all([Item(name=SECRET)])
            await session.flush()
            await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": SECRET})

    assert SECRET not in everything_shown(caught.value)


@pytest.mark.parametrize("module", ["asyncpg", "aiosqlite"])
def test_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A URL whose driver is not installed raises MissingExtraError with the pip command for the extra."""
    monkeypatch.setitem(sys.modules, module, None)
    url = {"asyncpg": NOWHERE, "aiosqlite": "sqlite://"}[module]

    with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-prodkit\[database\]'"):
        Database(DatabaseSettings(url=url))


def test_missing_sqlalchemy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing fastapi_prodkit.database without SQLAlchemy raises MissingExtraError with the pip command."""
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delitem(sys.modules, "fastapi_prodkit.database")

    with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-prodkit\[database\]'"):
        importlib.import_module("fastapi_prodkit.database")


# --- TLS


async def encrypted(settings: DatabaseSettings) -> bool:
    database = Database(settings)
    async with database.lifespan(None), database.session() as session:
        return bool(await session.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")))


@pytest.fixture
def root_cert(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("mode", "query", "expected"),
    [
        ("off", "", False),
        ("require", "", True),
        ("off", "sslmode=prefer", False),
        ("off", "sslmode=require", True),
        ("off", "ssl=require&sslmode=disable", True),
        ("require", "sslmode=disable", True),
    ],
)
async def test_stricter_of_setting_and_sslmode_applies(server: Server, mode: Any, query: str, expected: bool) -> None:
    """The URL's sslmode can tighten the setting DATABASE_SSL, but never loosen it."""
    settings = DatabaseSettings(url=server.url(query=query), ssl=mode)

    assert await encrypted(settings) is expected


async def test_verified_connection_is_opened(server: Server, root_cert: str) -> None:
    """With the right authority and host name, by setting or by URL."""
    by_setting = DatabaseSettings(url=server.url(host="localhost"), ssl_root_cert=root_cert)
    query = f"sslmode=verify-ca&sslrootcert={root_cert}"
    by_url = DatabaseSettings(url=server.url(host="localhost", query=query), ssl="off")

    assert await encrypted(by_setting)
    assert await encrypted(by_url)


async def test_certificate_of_an_unknown_authority_is_refused(server: Server, tmp_path: Path) -> None:
    """TLS verification rejects a server certificate that no configured or system authority has signed."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")

    for root_cert in (str(tmp_path / "other.pem"), None):
        with pytest.raises(OperationalError, match="SSLCertVerificationError"):
            await encrypted(DatabaseSettings(url=server.url(host="localhost"), ssl_root_cert=root_cert))


async def test_certificate_of_another_host_is_refused(server: Server, root_cert: str) -> None:
    """TLS verification rejects a certificate for localhost when the client connects to 127.0.0.1."""
    with pytest.raises(OperationalError, match=r"SSLCertVerificationError.*127\.0\.0\.1"):
        await encrypted(DatabaseSettings(url=server.url(host="127.0.0.1"), ssl_root_cert=root_cert))


@pytest.mark.parametrize("mode", ["require", "verify-full"])
async def test_server_without_tls_is_refused(mode: Any) -> None:
    """It gets nothing in plain text."""
    async with silent_server(answer=b"N") as (port, received):
        settings = DatabaseSettings(url=f"postgresql://user:{SECRET}@127.0.0.1:{port}/name", ssl=mode)
        with pytest.raises(OperationalError, match="rejected SSL upgrade"):
            await Database(settings).check()

    assert len(received) == 8  # PostgreSQL's SSLRequest, and nothing else


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_unusable_root_certificate_fails_at_construction(tmp_path: Path, content: str | None) -> None:
    """A CA file that is missing or holds no certificate raises a ConfigurationError at construction."""
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)

    with pytest.raises(ConfigurationError, match=r"DATABASE_SSL_ROOT_CERT: .*ca\.pem"):
        Database(DatabaseSettings(url=NOWHERE, ssl_root_cert=str(path)))


# --- SQLite


async def test_database_in_memory_is_shared_by_all_sessions() -> None:
    """All sessions on an in-memory SQLite database see one database, even in concurrent requests."""
    database = Database(DatabaseSettings(url="sqlite://"))

    async with database.lifespan(None):
        async with database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with client_of(app_with(database)) as client:
            responses = await asyncio.gather(*(client.post(f"/items/{number}") for number in range(20)))
        async with database.session() as session:
            names = list(await session.scalars(select(Item.name)))

    assert {response.status_code for response in responses} == {200}
    assert len(names) == 20


async def test_sessions_in_memory_take_turns() -> None:
    """A rollback undoes the work of its own session only."""
    database = Database(DatabaseSettings(url="sqlite:///:memory:"))
    flushed = asyncio.Event()

    async def keep() -> None:
        await flushed.wait()
        async with database.session() as session:
            session.add(Item(name="kept"))

    async def lose() -> None:
        async with database.session() as session:
            session.add(Item(name="lost"))
            await session.flush()
            flushed.set()
            await asyncio.wait([keeping], timeout=0.05)  # while this session has the connection, the other one waits
            await session.rollback()

    async with database.lifespan(None):
        async with database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        keeping = asyncio.create_task(keep())
        await asyncio.gather(keeping, lose())
        async with database.session() as session:
            names = list(await session.scalars(select(Item.name)))

    assert names == ["kept"]


async def test_sqlite_enforces_foreign_keys(on_sqlite: DatabaseSettings) -> None:
    """SQLite rejects a row whose foreign key refers to a missing row, as PostgreSQL does."""
    database = Database(on_sqlite)

    async with database.lifespan(None):
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            async with database.session() as session:
                session.add(Part(id=1, item="missing"))


@pytest.mark.parametrize("first", [True, False])
async def test_savepoint_is_rolled_back_with_its_transaction(
    database: Database, settings: DatabaseSettings, first: bool
) -> None:
    """Even if it comes first in the transaction."""
    with pytest.raises(RuntimeError, match="after the savepoint"):
        async with database.session() as session:
            if not first:
                session.add(Item(name="saw"))
                await session.flush()
            async with session.begin_nested():
                session.add(Item(name="hammer"))
            raise RuntimeError("after the savepoint")

    assert await stored(settings) == []


# --- servers that misbehave


@asynccontextmanager
async def tcp_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Serve connections with `talk`, and yield the port; wait until all connections are closed."""
    conversations: list[Any] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.append(asyncio.current_task())
        await talk(reader, writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*conversations)


@asynccontextmanager
async def silent_server(answer: bytes = b"") -> AsyncIterator[tuple[int, bytearray]]:
    """Accept connections and send only `answer`; yield the port and the received data."""
    received = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        while data := await reader.read(1024):
            received.extend(data)

    async with tcp_server(listen) as port:
        yield port, received


@asynccontextmanager
async def wire_to(target: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Forward to the port `target` while the event is set; yield the port to connect to, and the event."""
    connected = asyncio.Event()
    connected.set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await connected.wait()
            writer.write(data)
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    async with tcp_server(join) as port:
        yield port, connected
        connected.set()
