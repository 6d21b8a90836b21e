"""Readiness while the pool is busy, and while the server is down."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from migrating import project
from outages import Outages
from postgres import PASSWORD, Server, postgres_or_skip

from fastapi_prodkit.exceptions import MigrationError
from fastapi_prodkit.health import health_router
from fastapi_prodkit.sections import DatabaseSettings, HealthSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_prodkit.database import Database
from fastapi_prodkit.database.probing import probe
from fastapi_prodkit.database.readiness import migrations_check

POOL = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 30.0, "ssl": "off"}
OPEN = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'probed' AND pid <> pg_backend_pid()"


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


def database_on(server: Server, *, role: str | None = None, **changes: Any) -> Database:
    url = server.url(query="application_name=probed")
    if role is not None:
        url = url.replace("postgres:", f"{role}:", 1)
    return Database(DatabaseSettings(**{"url": url, **POOL, **changes}))


@asynccontextmanager
async def busy(database: Database) -> AsyncIterator[None]:
    """Use all connections of the pool, as two requests do."""
    connections = [await database.engine.connect() for _ in range(2)]
    try:
        yield
    finally:
        for connection in connections:
            await connection.close()


@asynccontextmanager
async def client_of(database: Database, timeout: float) -> AsyncIterator[httpx2.AsyncClient]:
    app = FastAPI(lifespan=database.lifespan)
    settings = HealthSettings(timeout=timeout, cache=0)
    app.include_router(health_router(settings, checks={"database": database.check}))
    transport = httpx2.ASGITransport(app)
    async with database.lifespan(app), httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_busy_pool_is_ready(server: Server) -> None:
    """The probe opens one more connection, and closes it."""
    async with client_of(database := database_on(server), timeout=30) as client, busy(database):
        answers = [await client.get("/ready") for _ in range(2)]
        async with asyncio.timeout(10):
            while await probe(database.engine, lambda connection: connection.scalar(text(OPEN))) != 2:
                pass

    assert [answer.status_code for answer in answers] == [200, 200]


async def test_probe_uses_a_free_connection(server: Server) -> None:
    """The readiness probe uses a connection of the pool if one is available, and opens no extra one."""
    async with client_of(database := database_on(server), timeout=30) as client:
        await client.get("/ready")
        opened = database.engine.pool.checkedin()  # type: ignore[attr-defined] # the pool of every engine has it
        async with database.engine.connect():
            answer = await client.get("/ready")

    assert opened == 1
    assert answer.status_code == 200


@pytest.mark.parametrize("outage", ["frozen", "down"])
async def test_busy_pool_of_a_down_or_silent_server_is_not_ready(server: Server, outages: Outages, outage: str) -> None:
    """With a busy pool, /ready answers 503 within its time limit if the server is down or does not respond."""
    async with client_of(database := database_on(server), timeout=0.5) as client, busy(database):
        with getattr(outages, outage)():
            started = time.perf_counter()
            answer = await client.get("/ready")
            seconds = time.perf_counter() - started

    assert answer.status_code == 503
    assert seconds < 10  # of the 30 that the pool would wait


@pytest.fixture
async def limited(server: Server) -> Database:
    """A database whose role may open only as many connections as its pool."""
    admin = database_on(server)
    async with admin.lifespan(None), admin.session() as session:
        await session.execute(text("DROP ROLE IF EXISTS few"))
        await session.execute(text(f"CREATE ROLE few LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 2"))
    return database_on(server, role="few")


async def test_server_that_refuses_a_further_connection_is_ready(limited: Database) -> None:
    """A server that refuses the probe's extra connection is reachable, so /ready answers 200."""
    async with client_of(limited, timeout=30) as client, busy(limited):
        answer = await client.get("/ready")

    assert answer.status_code == 200


async def test_migrations_check_works_with_a_busy_pool(server: Server, limited: Database, tmp_path: Path) -> None:
    """Without a further connection it keeps its last result."""
    pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
    settings = DatabaseSettings(url=server.url(), migrations_config=str(project(tmp_path) / "alembic.ini"))
    database = database_on(server)
    check, unknown = (migrations_check(each.engine, settings) for each in (database, limited))

    async with database.lifespan(None), busy(database):
        with pytest.raises(MigrationError, match="this release needs 0002"):
            await check()
    async with limited.lifespan(None), busy(limited):
        await unknown()


async def test_busy_sqlite_file_is_ready(tmp_path: Path) -> None:
    """A database in memory has one connection, for which the probe waits."""
    file = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db", **POOL))
    memory = Database(DatabaseSettings(url="sqlite://", **{**POOL, "pool_timeout": 0.1}))

    async with file.lifespan(None), busy(file):
        await file.check()
    async with memory.lifespan(None), memory.engine.connect():
        with pytest.raises(PoolTimeoutError):
            await memory.check()


async def test_null_pool_is_probed(tmp_path: Path) -> None:
    """The probe works on an engine with NullPool, although NullPool does not count its connections."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/test.db", poolclass=NullPool)

    answer = await probe(engine, lambda connection: connection.scalar(text("SELECT 7")))

    assert answer == 7
