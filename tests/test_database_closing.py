"""Sessions that several tasks use: their connections return to the pool without garbage collection."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from postgres import Server

from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

import asyncpg  # type: ignore[import-untyped]  # it has no annotations for us
from sqlalchemy import event, text
from sqlalchemy.exc import (
    DBAPIError,
    IllegalStateChangeError,
    InterfaceError,
    InvalidRequestError,
    MissingGreenlet,
    PendingRollbackError,
    ResourceClosedError,
)
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep

SLOW = text("SELECT pg_sleep(30)")
ONE = text("SELECT 1")
SHARED = "the connection was closed while a statement ran on it: use another session in each task"


@pytest.fixture
async def database(server: Server) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=server.url(), ssl="off"))
    async with database.lifespan(None):
        yield database


@pytest.fixture(autouse=True)
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def become_free(database: Database) -> None:
    """Wait until no connection is checked out, including those that are being opened."""
    async with asyncio.timeout(10):
        while database.engine.pool.checkedout():  # type: ignore[attr-defined] # AsyncAdaptedQueuePool has it
            await asyncio.sleep(0.01)


async def together(session: AsyncSession) -> None:
    """Use a session in two tasks: the second statement needs the connection that the first is obtaining."""
    await asyncio.gather(session.scalar(ONE), session.scalar(ONE))


async def in_a_savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.execute(ONE)


def app_with(database: Database, tasks: list[asyncio.Future[Any]]) -> FastAPI:
    app = FastAPI()
    app.state.database = database

    @app.get("/together")
    async def work_together(session: SessionDep) -> None:
        await together(session)

    @app.get("/read-together")
    async def read_together(session: ReadSessionDep) -> None:
        await together(session)

    @app.get("/left-connecting")
    async def leave_connecting(session: SessionDep) -> None:
        tasks.append(asyncio.ensure_future(session.scalar(SLOW)))
        await asyncio.sleep(0)

    @app.get("/left-running/{end}")
    async def leave_running(session: SessionDep, end: str) -> None:
        await session.execute(ONE)
        tasks.append(asyncio.ensure_future(session.scalar(SLOW)))
        await asyncio.sleep(0.05)
        if end == "raise":
            raise RuntimeError("the handler has failed")

    @app.get("/left-in-a-savepoint")
    async def leave_in_a_savepoint(session: SessionDep) -> None:
        await session.execute(ONE)
        tasks.append(asyncio.ensure_future(in_a_savepoint(session)))
        await asyncio.sleep(0)
        raise RuntimeError("the handler has failed")

    @app.get("/one")
    async def one(session: SessionDep) -> int:
        return int(await session.scalar(ONE) or 0)

    return app


@pytest.mark.parametrize(
    "path",
    [
        "/together",
        "/read-together",
        "/left-connecting",
        "/left-running/raise",
        "/left-running/return",
        "/left-in-a-savepoint",
    ],
)
@pytest.mark.filterwarnings("ignore:nested transaction already deassociated:sqlalchemy.exc.SAWarning")
async def test_connection_of_a_shared_session_is_returned(database: Database, path: str) -> None:
    """Each such request is a 500."""
    tasks: list[asyncio.Future[Any]] = []
    transport = httpx2.ASGITransport(app_with(database, tasks), raise_app_exceptions=False)

    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(10):
        statuses = [answer.status_code for answer in await asyncio.gather(*[client.get(path) for _ in range(10)])]
        left = await asyncio.gather(*tasks, return_exceptions=True)
        after = await client.get("/one")

    assert statuses == [500] * 10
    assert all(isinstance(error, Exception) for error in left)
    assert after.json() == 1
    await become_free(database)


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "invalidate"])
async def test_statement_in_a_transaction_ended_by_another_task_is_a_500(database: Database, end: str) -> None:
    """The error says what is wrong; other connections stay."""
    app = app_with(database, [])
    errors: list[Exception] = []

    @app.get("/ended/{pause}")
    async def ended(session: SessionDep, pause: float) -> None:
        async def end_it() -> None:
            await asyncio.sleep(pause)
            await getattr(session, end)()

        await session.execute(ONE)
        try:
            await asyncio.gather(session.scalar(SLOW), end_it())
        except Exception as error:
            errors.append(error)
            raise

    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(10):
        async with database.session() as other:
            backend = await other.scalar(text("SELECT pg_backend_pid()"))
            statuses = [(await client.get(f"/ended/{pause}")).status_code for pause in (0, 0.05)]
        async with database.session() as first, database.session() as second:
            backends = [await each.scalar(text("SELECT pg_backend_pid()")) for each in (first, second)]

    assert statuses == [500, 500]
    assert [str(error) for error in errors] == [SHARED, SHARED]
    assert backend in backends
    await become_free(database)


async def go_on_after_a_loss(session: AsyncSession) -> None:
    with suppress(DBAPIError):
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    await session.execute(ONE)


async def execute_without_a_greenlet(session: AsyncSession) -> None:
    session.sync_session.execute(ONE)


async def read_a_closed_result(session: AsyncSession) -> None:
    result = await session.execute(ONE)
    result.close()
    result.all()


async def end_twice_at_once(session: AsyncSession) -> None:
    await asyncio.gather(session.commit(), session.rollback())


async def use_the_driver_at_once(session: AsyncSession) -> None:
    raw = await (await session.connection()).get_raw_connection()
    driver: Any = raw.driver_connection
    await asyncio.gather(driver.execute("SELECT 1"), session.execute(ONE))


@pytest.mark.parametrize(
    ("misuse", "expected"),
    [
        (go_on_after_a_loss, PendingRollbackError),
        (execute_without_a_greenlet, MissingGreenlet),
        (read_a_closed_result, ResourceClosedError),
        (end_twice_at_once, IllegalStateChangeError),
        (use_the_driver_at_once, InterfaceError),
    ],
)
async def test_other_misuse_is_a_500(
    database: Database, misuse: Callable[[AsyncSession], Awaitable[None]], expected: type[Exception]
) -> None:
    """With SQLAlchemy's error."""
    app = app_with(database, [])

    @app.get("/misused")
    async def misused(session: SessionDep) -> None:
        await session.execute(ONE)
        with pytest.raises(expected) as raised:
            await misuse(session)
        raise raised.value

    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/misused")

    assert response.status_code == 500


async def leave_running(session: AsyncSession, tasks: list[asyncio.Future[Any]]) -> None:
    await session.execute(ONE)
    tasks.append(asyncio.ensure_future(session.scalar(SLOW)))
    await asyncio.sleep(0.05)
    raise RuntimeError("the job has failed")


@pytest.mark.parametrize("way", ["session", "read_session", "sessionmaker", "read_sessionmaker"])
async def test_connection_of_a_job_is_returned(database: Database, way: str) -> None:
    """A session of a job returns its connection to the pool, even if a statement still runs at the end."""
    tasks: list[asyncio.Future[Any]] = []

    async with asyncio.timeout(10):
        with pytest.raises(InvalidRequestError, match="concurrent operations are not permitted"):
            async with getattr(database, way)() as session:
                await together(session)
        with pytest.raises(RuntimeError, match="the job has failed"):
            async with getattr(database, way)() as session:
                await leave_running(session, tasks)
        await asyncio.gather(*tasks, return_exceptions=True)

    await become_free(database)


@pytest.mark.parametrize("of_the_driver", [False, True])
async def test_connection_of_the_engine_is_returned(database: Database, of_the_driver: bool) -> None:
    """While another task runs a statement on it, by SQLAlchemy or asyncpg."""
    async with asyncio.timeout(10):
        with suppress(RuntimeError):
            async with database.engine.connect() as connection:
                await connection.execute(ONE)
                driver: Any = (await connection.get_raw_connection()).driver_connection
                execution = driver.execute("SELECT pg_sleep(30)") if of_the_driver else connection.execute(SLOW)
                running = asyncio.ensure_future(execution)
                await asyncio.sleep(0.05)
                raise RuntimeError
        await asyncio.gather(running, return_exceptions=True)
        assert driver.is_closed()

    await become_free(database)


async def test_statement_of_another_task_ends_in_the_server(database: Database) -> None:
    """The connection is replaced."""
    tasks: list[asyncio.Future[Any]] = []
    closed: list[object] = []
    event.listen(database.engine.sync_engine, "close", lambda connection, _: closed.append(connection))

    with suppress(RuntimeError):
        async with database.session() as session:
            await leave_running(session, tasks)
    closed_by_then = len(closed)
    await asyncio.gather(*tasks, return_exceptions=True)
    async with database.session() as session:
        running = await session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%'"))

    assert closed_by_then == 1
    assert running == 1  # the statement of this query


async def test_connection_to_sqlite_is_returned(tmp_path: Path) -> None:
    """After the running statement."""
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db"))

    async with database.lifespan(None):
        with pytest.raises(InvalidRequestError, match="concurrent operations are not permitted"):
            async with database.session() as session:
                await together(session)
        await become_free(database)


async def test_other_misuse_closes_no_connection(database: Database) -> None:
    """An asyncpg InterfaceError about wrong arguments leaves the connection open and usable."""
    async with database.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        with pytest.raises(asyncpg.InterfaceError, match="expects 1 argument"):
            await driver.execute("SELECT $1::int", 1, 2)

        assert await connection.scalar(ONE) == 1
