"""A read and a write session in one request: one connection, no deadlock, and no writes by the reader."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from postgres import Server

from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import DDL, delete, insert, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep

INSERT = text("INSERT INTO items VALUES (:name)")
NAMES = text("SELECT name FROM items ORDER BY name")


class Base(DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    name: Mapped[str] = mapped_column(primary_key=True)


@asynccontextmanager
async def database_with(url: str, **settings: Any) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=url, ssl="off", **settings))
    async with database.lifespan(None):
        async with database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        yield database


@pytest.fixture(params=["postgresql", "sqlite"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """A database with one connection: PostgreSQL, or SQLite in memory."""
    url = request.getfixturevalue("server").url() if request.param == "postgresql" else "sqlite://"
    async with database_with(url, pool_size=1, max_overflow=0, pool_timeout=0.5) as database:
        yield database


@pytest.fixture
def app(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database
    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def stored(database: Database) -> list[str]:
    async with database.read_session() as session:
        return list(await session.scalars(NAMES))


async def test_requests_with_two_sessions_do_not_deadlock(server: Server) -> None:
    """Fifteen requests on five connections, in either order of the sessions."""
    app = FastAPI()

    @app.post("/write-first/{name}")
    async def write_first(name: str, session: SessionDep, reading: ReadSessionDep) -> list[str]:
        await session.execute(INSERT, {"name": name})
        return list(await reading.scalars(NAMES))

    @app.post("/read-first/{name}")
    async def read_first(name: str, reading: ReadSessionDep, session: SessionDep) -> list[str]:
        names = list(await reading.scalars(NAMES))
        await session.execute(INSERT, {"name": name})
        return names

    async def user(reading: ReadSessionDep) -> int:
        return int(await reading.scalar(text("SELECT 1")) or 0)

    @app.post("/user-first/{name}")
    async def user_first(
        name: str, user: Annotated[int, Depends(user)], session: SessionDep, reading: ReadSessionDep
    ) -> int:
        await session.execute(INSERT, {"name": name})
        return user + int(await reading.scalar(text("SELECT count(*) FROM items")) or 0)

    async with database_with(server.url(), pool_size=5, max_overflow=0, pool_timeout=5) as database:
        app.state.database = database
        async with client_of(app) as client:
            paths = [
                f"/{way}/{way}-{number}" for number in range(5) for way in ("write-first", "read-first", "user-first")
            ]
            answers = await asyncio.gather(*[client.post(path) for path in paths])
        assert len(await stored(database)) == 15

    assert {answer.status_code for answer in answers} == {200}


async def test_reader_sees_writes_of_the_request(app: FastAPI, database: Database) -> None:
    """In the transaction, in the next one after a commit, and in a savepoint."""

    @app.post("/")
    async def create(reading: ReadSessionDep, session: SessionDep) -> list[list[str]]:
        seen = [list(await reading.scalars(NAMES))]
        session.add(Item(name="a"))
        await session.commit()
        seen.append(list(await reading.scalars(NAMES)))
        await session.execute(INSERT, {"name": "b"})
        async with session.begin_nested():
            await session.execute(INSERT, {"name": "c"})
            seen.append([item.name for item in await reading.scalars(select(Item).order_by(Item.name))])
        return [*seen, list(await reading.scalars(NAMES))]

    async with client_of(app) as client:
        answer = await client.post("/")

    assert answer.json() == [[], ["a"], ["a", "b", "c"], ["a", "b", "c"]]
    assert await stored(database) == ["a", "b", "c"]


async def test_reader_may_begin_a_transaction_beside_the_writer(app: FastAPI, database: Database) -> None:
    """Its end neither commits nor rolls back the writes."""

    @app.post("/")
    async def create(session: SessionDep, reading: ReadSessionDep) -> list[str]:
        await session.execute(INSERT, {"name": "a"})
        async with reading.begin():
            return list(await reading.scalars(NAMES))

    async with client_of(app) as client:
        answer = await client.post("/")

    assert answer.json() == ["a"]
    assert await stored(database) == ["a"]


async def flush(session: AsyncSession) -> None:
    session.add(Item(name="x"))
    await session.flush()


WRITES: dict[str, Callable[[AsyncSession], Awaitable[Any]]] = {
    "flush": flush,
    "construct": lambda session: session.execute(insert(Item).values(name="x")),
    "returning": lambda session: session.scalars(delete(Item).returning(Item.name)),
    "ddl": lambda session: session.execute(DDL("CREATE TABLE others (name text)")),
    "text": lambda session: session.execute(INSERT, {"name": "x"}),
    "text with a table expression": lambda session: session.execute(
        text("WITH x AS (SELECT 'x') INSERT INTO items SELECT * FROM x")
    ),
}


@pytest.mark.parametrize("kind", WRITES)
async def test_reader_cannot_write(app: FastAPI, database: Database, kind: str) -> None:
    """Nothing of the request is saved."""
    refusals: list[Exception] = []

    @app.post("/")
    async def create(session: SessionDep, reading: ReadSessionDep) -> None:
        await session.execute(INSERT, {"name": "of the request"})
        try:
            await WRITES[kind](reading)
        except InvalidRequestError as error:
            refusals.append(error)
            raise

    async with client_of(app) as client:
        answer = await client.post("/")

    assert answer.status_code == 500
    assert "the session for reading cannot write" in str(refusals[0])
    assert await stored(database) == []


@pytest.mark.parametrize("sessions", ["session first", "reading first"])
@pytest.mark.parametrize(("status", "names"), [(201, ["hammer"]), (409, [])])
async def test_status_commits_or_rolls_back_once(
    app: FastAPI, database: Database, sessions: str, status: int, names: list[str]
) -> None:
    """In either order of the sessions' ends."""

    async def create(session: AsyncSession, reading: AsyncSession) -> JSONResponse:
        await session.execute(INSERT, {"name": "hammer"})
        return JSONResponse(list(await reading.scalars(NAMES)), status)

    @app.post("/session first")
    async def session_first(session: SessionDep, reading: ReadSessionDep) -> JSONResponse:
        return await create(session, reading)

    @app.post("/reading first")
    async def reading_first(reading: ReadSessionDep, session: SessionDep) -> JSONResponse:
        return await create(session, reading)

    async with client_of(app) as client:
        answer = await client.post(f"/{sessions}")

    assert (answer.status_code, answer.json()) == (status, ["hammer"])
    assert await stored(database) == names


async def test_rollback_of_the_reader_keeps_the_writes(app: FastAPI, database: Database) -> None:
    """A rollback of the read session keeps the writes of the joined session, and the reader stays usable."""

    @app.post("/")
    async def create(session: SessionDep, reading: ReadSessionDep) -> list[str]:
        await reading.rollback()
        await session.execute(INSERT, {"name": "hammer"})
        await reading.scalars(NAMES)
        await reading.rollback()
        return list(await (await reading.connection()).scalars(NAMES))

    async with client_of(app) as client:
        answer = await client.post("/")

    assert answer.json() == ["hammer"]
    assert await stored(database) == ["hammer"]


async def test_closed_reader_does_not_end_the_writer(app: FastAPI, database: Database) -> None:
    """Closing the read session leaves the joined write session open, and all its writes are committed."""

    @app.post("/items")
    async def create(session: SessionDep, reading: ReadSessionDep) -> None:
        await session.execute(INSERT, {"name": "a"})
        await reading.execute(NAMES)
        await reading.close()
        await session.execute(INSERT, {"name": "b"})

    async with client_of(app) as client:
        response = await client.post("/items")

    assert response.status_code == 200
    assert await stored(database) == ["a", "b"]


async def test_reader_alone_has_its_own_transaction(server: Server) -> None:
    """PostgreSQL refuses to write in it, and a rollback ends it."""
    app = FastAPI()

    @app.get("/")
    async def read(reading: ReadSessionDep) -> list[str]:
        await reading.scalars(NAMES)
        await reading.rollback()
        return [str(await reading.scalar(text("SHOW transaction_read_only")))]

    async with database_with(server.url()) as database:
        app.state.database = database
        async with client_of(app) as client:
            answer = await client.get("/")

    assert answer.json() == ["on"]
