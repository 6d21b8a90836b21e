"""Prepared statements that a migration has made invalid are prepared again."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from postgres import Server

from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_prodkit.database import Database, SessionDep

CONNECTIONS = 2
TABLES = (
    "CREATE TYPE mood AS ENUM ('calm')",
    "CREATE TYPE pair AS (a int, b int)",
    "CREATE TABLE items (id int PRIMARY KEY, size int, mood mood DEFAULT 'calm', pair pair DEFAULT (1, 2))",
    "INSERT INTO items VALUES (1, 1), (2, 2)",
)
NEW_COLUMN_TYPE = ("ALTER TABLE items ALTER COLUMN size TYPE bigint",)
NEW_ENUM = (
    "ALTER TABLE items DROP COLUMN mood",
    "DROP TYPE mood",
    "CREATE TYPE mood AS ENUM ('calm', 'angry')",
    "ALTER TABLE items ADD COLUMN mood mood DEFAULT 'calm'",
)
NEW_ATTRIBUTE = ("ALTER TYPE pair ADD ATTRIBUTE c int",)


@pytest.fixture
async def database(server: Server) -> AsyncIterator[Database]:
    url = server.url(query="options=-c search_path=shop")
    database = Database(DatabaseSettings(url=url, ssl="off", pool_size=CONNECTIONS, max_overflow=0))
    async with database.lifespan(None):
        await migrate(server, "DROP SCHEMA IF EXISTS shop CASCADE", "CREATE SCHEMA shop", *TABLES)
        yield database


async def migrate(server: Server, *statements: str) -> None:
    """Change the schema on another connection."""
    other = Database(DatabaseSettings(url=server.url(query="options=-c search_path=shop"), ssl="off"))
    async with other.lifespan(None), other.session() as session:
        for statement in statements:
            await session.execute(text(statement))


async def on_every_connection(engine: AsyncEngine, statement: str, parameters: Any = None) -> None:
    connections = [await engine.connect() for _ in range(CONNECTIONS)]
    for connection in connections:
        await connection.execute(text(statement), parameters)
        await connection.close()


def app_with(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database

    @app.get("/items")
    async def read(session: SessionDep) -> int:
        return len((await session.execute(text("SELECT * FROM items"))).all())

    @app.get("/items/moods")
    async def moods(session: SessionDep) -> int:
        statement = text("SELECT * FROM items WHERE mood = CAST(:mood AS mood)")
        return len((await session.execute(statement, {"mood": "calm"})).all())

    @app.get("/items/pairs")
    async def pairs(session: SessionDep) -> int:
        return len((await session.execute(text("SELECT pair FROM items"))).all())

    @app.post("/items/{key}")
    async def write_and_read(key: int, session: SessionDep) -> int:
        await session.execute(text("INSERT INTO items (id) VALUES (:key)"), {"key": key})
        return len((await session.execute(text("SELECT * FROM items"))).all())

    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.mark.parametrize(
    ("path", "migration"),
    [("/items", NEW_COLUMN_TYPE), ("/items", ("ALTER TABLE items DROP COLUMN size",)), ("/items/moods", NEW_ENUM)],
)
async def test_first_statement_of_a_transaction_is_prepared_again(
    server: Server, database: Database, path: str, migration: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """On every connection."""
    async with client_of(app_with(database)) as client:
        await asyncio.gather(*(client.get(path) for _ in range(CONNECTIONS)))
        await migrate(server, *migration)
        answers = await asyncio.gather(*(client.get(path) for _ in range(2 * CONNECTIONS)))

    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "2")}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_executemany_is_prepared_again(server: Server, database: Database) -> None:
    """An executemany whose prepared statement a migration has invalidated is prepared again and succeeds."""
    statement = "INSERT INTO items (id, mood) VALUES (CAST(:id AS int), CAST(:mood AS mood))"
    rows = [{"id": key, "mood": "calm"} for key in (3, 4)]
    async with database.session() as session:
        await session.execute(text(statement), rows)
    await migrate(server, *NEW_ENUM)

    async with database.session() as session:
        await session.execute(text(statement), [{**row, "id": row["id"] + 2} for row in rows])
        count = (await session.execute(text("SELECT count(*) FROM items"))).scalar_one()

    assert count == 6


async def test_later_statement_is_a_503(server: Server, database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Earlier writes of the transaction would be lost; the next request succeeds."""
    async with client_of(app_with(database)) as client:
        await on_every_connection(database.engine, "SELECT * FROM items")
        await migrate(server, *NEW_COLUMN_TYPE)
        refused = await client.post("/items/3")
        again = [await client.post(f"/items/{key}") for key in range(3, 3 + CONNECTIONS)]

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [(answer.status_code, answer.text) for answer in again] == [
        (200, str(key)) for key in range(3, 3 + CONNECTIONS)
    ]
    assert "the database is unavailable: NotSupportedError InvalidCachedStatementError" in caplog.text


async def test_transact_repeats_the_transaction(server: Server, database: Database) -> None:
    """It is stored once."""
    attempts = []

    async def work(session: Any) -> None:
        attempts.append(session)
        await session.execute(text("INSERT INTO items (id) VALUES (3)"))
        await session.execute(text("SELECT * FROM items"))

    await on_every_connection(database.engine, "SELECT * FROM items")
    await migrate(server, *NEW_COLUMN_TYPE)
    await database.transact(work)

    async with database.session() as session:
        count = (await session.execute(text("SELECT count(*) FROM items"))).scalar_one()
    assert (len(attempts), count) == (2, 3)


async def test_changed_composite_type_is_one_503(server: Server, database: Database) -> None:
    """asyncpg detects the change in the rows; then it opens new connections."""
    async with client_of(app_with(database)) as client:
        await asyncio.gather(*(client.get("/items/pairs") for _ in range(CONNECTIONS)))
        await migrate(server, *NEW_ATTRIBUTE)
        refused = await client.get("/items/pairs")
        again = [await client.get("/items/pairs") for _ in range(CONNECTIONS)]

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [answer.status_code for answer in again] == [200] * CONNECTIONS


async def test_statement_in_autocommit_is_repeated(server: Server, database: Database) -> None:
    """In autocommit a statement with an outdated plan is repeated, since the refused attempt changed nothing."""
    engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    await on_every_connection(engine, "SELECT * FROM items")
    await migrate(server, *NEW_COLUMN_TYPE)

    await on_every_connection(engine, "SELECT * FROM items")

    async with engine.connect() as connection:
        await connection.execute(text("UPDATE items SET size = 7"))
        sizes = (await connection.execute(text("SELECT size FROM items"))).scalars().all()
    assert sizes == [7, 7]


async def test_transaction_with_settings_of_a_hook_is_not_repeated(server: Server, database: Database) -> None:
    """The settings would be lost."""

    @event.listens_for(database.engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("SELECT set_config('app.tenant', 'a', true)")

    await on_every_connection(database.engine, "SELECT * FROM items")
    await migrate(server, *NEW_COLUMN_TYPE)
    async with client_of(app_with(database)) as client:
        statuses = [(await client.get("/items")).status_code for _ in range(2)]

    assert statuses == [503, 200]


async def test_other_errors_are_not_repeated(database: Database) -> None:
    """A statement that fails for another reason than an invalidated prepared statement runs only once."""
    async with database.session() as session:
        await session.execute(text("CREATE SEQUENCE attempts"))
    with pytest.raises(DBAPIError):
        async with database.session() as session:
            await session.execute(text("SELECT 1 / (nextval('attempts') - 1)"))

    async with database.session() as session:
        attempts = (await session.execute(text("SELECT last_value FROM attempts"))).scalar_one()

    assert attempts == 1
