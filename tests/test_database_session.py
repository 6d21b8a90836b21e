"""The sessions of a request: failed responses, reading, jobs, hooks and threads."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep, get_read_session, get_session

TABLE = "CREATE TABLE items (name text PRIMARY KEY)"
INSERT = text("INSERT INTO items VALUES (:name)")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db"))
    async with database.lifespan(None):
        async with database.session() as session:
            await session.execute(text(TABLE))
        yield database


def app_with(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database

    @app.get("/items")
    async def read(session: ReadSessionDep) -> list[str]:
        return list((await session.execute(text("SELECT name FROM items ORDER BY name"))).scalars())

    @app.post("/items/{name}")
    async def create(name: str, session: SessionDep) -> str:
        await session.execute(INSERT, {"name": name})
        return name

    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def test_error_status_set_by_the_handler_rolls_back(database: Database) -> None:
    """A session rolls back if the handler sets a 4xx or 5xx status without raising an exception."""
    app = app_with(database)

    @app.post("/refused/{status}")
    async def refused(status: int, session: SessionDep, response: Response) -> None:
        await session.execute(INSERT, {"name": f"item-{status}"})
        response.status_code = status

    async with client_of(app) as client:
        statuses = [(await client.post(f"/refused/{status}")).status_code for status in (202, 404, 409, 500)]
        stored = (await client.get("/items")).json()

    assert statuses == [202, 404, 409, 500]
    assert stored == ["item-202"]


async def test_response_that_cannot_be_rendered_rolls_back(database: Database) -> None:
    """It is a 422."""
    app = app_with(database)
    add_problem_handlers(app)

    @app.post("/rated/{name}")
    async def rated(name: str, rating: float, session: SessionDep) -> Any:
        await session.execute(INSERT, {"name": name})
        return JSONResponse(rating)

    async with client_of(app) as client:
        statuses = [(await client.post(f"/rated/{rating}?rating={rating}")).status_code for rating in ("1", "nan")]
        stored = (await client.get("/items")).json()

    assert statuses == [200, 422]
    assert stored == ["1"]


async def test_handler_may_answer_a_conflict(database: Database) -> None:
    """The transaction is rolled back."""
    app = app_with(database)

    @app.post("/once/{name}")
    async def once(name: str, session: SessionDep) -> None:
        try:
            await session.execute(INSERT, {"name": name})
        except IntegrityError as error:
            raise HTTPException(409, "there is such an item") from error

    async with client_of(app) as client:
        statuses = [(await client.post("/once/hammer")).status_code for _ in range(2)]

    assert statuses == [200, 409]


async def test_read_session_uses_the_replica(database: Database, tmp_path: Path) -> None:
    """Both pools are closed at shutdown."""
    urls = {"url": f"sqlite:///{tmp_path}/test.db", "read_url": f"sqlite:///{tmp_path}/replica.db"}
    both = Database(DatabaseSettings(**urls))

    async with both.lifespan(None):
        async with both.read_session() as session:
            await session.execute(text(TABLE))
            await session.execute(INSERT, {"name": "of the replica"})
        async with client_of(app_with(both)) as client:
            created = await client.post("/items/hammer")
            read = await client.get("/items")
        open_before = both.read_engine.pool.checkedin()  # type: ignore[attr-defined] # the pool of every engine has it
    open_after = both.read_engine.pool.checkedin()  # type: ignore[attr-defined] # likewise

    assert created.status_code == 200
    assert read.json() == ["of the replica"]
    assert (open_before, open_after) == (1, 0)


async def test_failed_read_session_returns_its_connection(database: Database) -> None:
    """A read session returns its connection to the pool if the handler raises an exception."""
    app = app_with(database)

    @app.get("/broken")
    async def broken(session: ReadSessionDep) -> None:
        await session.execute(text("SELECT 1"))
        raise HTTPException(418)

    async with client_of(app) as client:
        response = await client.get("/broken")

    assert response.status_code == 418
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


async def test_transaction_of_an_after_commit_hook_is_ended(database: Database) -> None:
    """A transaction that a hook begins after the commit is ended, and its connection returns to the pool."""
    app = app_with(database)

    @app.post("/hooked")
    async def hooked(session: SessionDep) -> None:
        await session.execute(INSERT, {"name": "hammer"})
        event.listen(session.sync_session, "after_transaction_end", begin_again, once=True)

    def begin_again(session: Any, _transaction: Any) -> None:
        if not session.in_transaction():
            session.execute(text("SELECT 1"))

    async with client_of(app) as client:
        response = await client.post("/hooked")

    assert response.status_code == 200
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it


async def test_background_task_sees_the_commit(database: Database) -> None:
    """A background task runs after the request's commit, so a new session in the task reads the new row."""
    app = app_with(database)
    found: list[str] = []

    async def look() -> None:
        async with database.session() as session:
            found.extend((await session.execute(text("SELECT name FROM items"))).scalars())

    @app.post("/then/{name}")
    async def then(name: str, session: SessionDep, tasks: BackgroundTasks) -> None:
        await session.execute(INSERT, {"name": name})
        tasks.add_task(look)

    async with client_of(app) as client:
        await client.post("/then/hammer")

    assert found == ["hammer"]


def test_both_sessions_can_be_overridden(tmp_path: Path) -> None:
    """dependency_overrides for get_session and get_read_session replace both sessions in a test."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/override.db")
    sessionmaker = async_sessionmaker(engine, expire_on_commit=False)
    app = FastAPI(lifespan=Database(DatabaseSettings(url="sqlite://")).lifespan)

    async def of_the_test() -> AsyncIterator[AsyncSession]:
        async with sessionmaker() as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS items (name text)"))
            yield session

    @app.get("/")
    async def both(session: SessionDep, reading: ReadSessionDep) -> int:
        await reading.execute(text("SELECT * FROM items"))
        return int((await session.execute(text("SELECT count(*) FROM items"))).scalar_one())

    app.dependency_overrides[get_session] = of_the_test
    app.dependency_overrides[get_read_session] = of_the_test
    with TestClient(app) as client:
        response = client.get("/")
        client.portal.call(engine.dispose)  # type: ignore[union-attr] # inside `with` there is one

    assert response.json() == 0


async def test_concurrent_requests_have_separate_sessions(database: Database) -> None:
    """A rollback in one request does not affect the writes of concurrent requests."""
    app = app_with(database)

    @app.post("/failed/{name}")
    async def failed(name: str, session: SessionDep) -> None:
        await session.execute(INSERT, {"name": name})
        raise HTTPException(400)

    async with client_of(app) as client:
        good = [client.post(f"/items/good-{number}") for number in range(10)]
        bad = [client.post(f"/failed/bad-{number}") for number in range(10)]
        await asyncio.gather(*good, *bad)
        stored = (await client.get("/items")).json()

    assert stored == [f"good-{number}" for number in range(10)]


def made(way: str, database: Database, settings: Settings) -> FastAPI:
    if way == "create_app":
        app = create_app(settings, database=database)
    else:
        app = FastAPI()
        install(app, settings, database=database)

    @app.get("/items")
    async def read(session: SessionDep) -> list[str]:
        return list((await session.execute(text("SELECT 'hammer'"))).scalars())

    return app


@pytest.mark.parametrize("way", ["create_app", "install"])
@pytest.mark.parametrize("section", [None, {"url": "sqlite:///another.db", "migrations": "off"}])
def test_app_uses_a_given_database(way: str, section: dict[str, str] | None, tmp_path: Path) -> None:
    """/ready checks it, and shutdown closes it."""
    settings = Settings(environment="test", database=section)
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/given.db"))
    opened, closed = [], []
    event.listen(database.engine.sync_engine, "connect", lambda connection, _: opened.append(connection))
    event.listen(database.engine.sync_engine, "close", lambda connection, _: closed.append(connection))
    app = made(way, database, settings)

    with TestClient(app) as client:
        items = client.get("/items").json()
        ready = client.get("/ready").json()
        closed_before = list(closed)

    assert items == ["hammer"]
    assert ready["checks"]["database"][0]["status"] == "pass"
    assert opened
    assert not closed_before
    assert closed == opened
    assert app.state.database is database


def test_two_apps_may_share_a_database(tmp_path: Path) -> None:
    """The second connects again after the first has closed it."""
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/given.db"))
    settings = Settings(environment="test", database=None)
    first, second = (made("create_app", database, settings) for _ in range(2))

    with TestClient(second) as client:
        with TestClient(first) as other:
            assert other.get("/items").json() == ["hammer"]

        assert client.get("/items").json() == ["hammer"]


def test_outage_of_a_given_database_is_a_503(tmp_path: Path) -> None:
    """An outage of a database passed to create_app is a 503 problem, even without a session dependency."""
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/missing/given.db"))
    app = made("create_app", database, Settings(environment="test", database=None))

    @app.get("/direct")
    async def read_directly() -> None:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))

    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.get("/direct")

    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
