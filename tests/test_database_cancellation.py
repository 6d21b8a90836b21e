"""Queries of cancelled requests end in PostgreSQL, and the pool stays usable."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx2
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from postgres import Server
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.disconnect import cancel_on_disconnect
from fastapi_prodkit.sections import DatabaseSettings, LimitsSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
asyncpg = pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_prodkit.database import Database, SessionDep
from fastapi_prodkit.testing import Databases

REQUESTS = 200
ENDING = 5.0  # seconds for the end of queries that would take 30; on an idle machine it takes one
RUNNING = "SELECT count(*) FROM pg_stat_activity WHERE query ~ '^(SELECT pg_sleep|INSERT)' AND state = 'active'"
SLOW_TABLE = (
    "CREATE TABLE slow (content text)",
    "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(30); RETURN NEW; END'",
    "CREATE TRIGGER wait BEFORE INSERT ON slow FOR EACH ROW EXECUTE FUNCTION wait()",
)


def database_on(server: Server) -> Database:
    # Long time-outs, because two hundred requests take long on a busy machine.
    patience = {"pool_timeout": 30, "connect_timeout": 30}
    return Database(DatabaseSettings(url=server.url(), ssl="off", pool_size=15, max_overflow=0, **patience))


def app_with(database: Database) -> FastAPI:
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database

    @app.get("/slow")
    async def slow(session: SessionDep) -> None:
        await session.execute(text("SELECT pg_sleep(30)"))

    @app.get("/fast")
    async def fast(session: SessionDep) -> int:
        return int((await session.execute(text("SELECT 1"))).scalar_one())

    return app


async def running(server: Server) -> int:
    """Return the number of sleeping queries."""
    watcher = database_on(server)
    async with watcher.lifespan(None), watcher.engine.connect() as connection:
        return int((await connection.execute(text(RUNNING))).scalar_one())


async def becomes(server: Server, expected: Callable[[int], bool], within: float) -> bool:
    deadline = time.monotonic() + within
    while not (reached := expected(await running(server))) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return reached


async def ask(app: FastAPI, path: str) -> int:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        return (await client.get(path, timeout=60)).status_code


async def by_task(call: Callable[[], Awaitable[Any]], go: asyncio.Event) -> None:
    task = asyncio.ensure_future(call())
    await go.wait()
    task.cancel()
    await asyncio.wait([task])


async def by_repeated_cancels(call: Callable[[], Awaitable[Any]], go: asyncio.Event) -> None:
    task = asyncio.ensure_future(call())
    await go.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


async def by_scope(call: Callable[[], Awaitable[Any]], go: asyncio.Event) -> None:
    async def leave(scope: anyio.CancelScope) -> None:
        await go.wait()
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(leave, group.cancel_scope)
        await call()


async def by_deadline(call: Callable[[], Awaitable[Any]], go: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as deadline:
            waiting = asyncio.ensure_future(go.wait())
            waiting.add_done_callback(lambda _: deadline.reschedule(0))
            await call()


@pytest.mark.system
@pytest.mark.parametrize("cancelled", [by_task, by_repeated_cancels, by_scope, by_deadline])
async def test_cancelled_requests_end_their_queries(server: Server, cancelled: Any) -> None:
    """Two hundred requests; the next two hundred are served."""
    database = database_on(server)
    app = app_with(database)
    go = asyncio.Event()

    async with database.lifespan(None):
        tasks = [asyncio.create_task(cancelled(lambda: ask(app, "/slow"), go)) for _ in range(REQUESTS)]
        busy = await becomes(server, lambda count: count == 15, within=30)
        go.set()
        await asyncio.wait(tasks, timeout=30)
        ended = await becomes(server, lambda count: count == 0, within=ENDING)
        statuses = await asyncio.gather(*(ask(app, "/fast") for _ in range(REQUESTS)))

    assert busy
    assert ended
    assert set(statuses) == {200}


@pytest.fixture
def slow_table(server: Server) -> Iterator[Database]:
    """A database with a table `slow`, which takes 30 s for each row."""
    with Databases(server.url()).temporary() as url:
        yield Database(DatabaseSettings(url=url, ssl="off", pool_size=1, max_overflow=0))


@pytest.mark.parametrize("cancelled", [by_task, by_repeated_cancels, by_scope, by_deadline])
@pytest.mark.parametrize("size", [1, 1_000_000], ids=["all rows sent", "most rows not sent"])
async def test_cancelled_executemany_ends_and_writes_nothing(
    server: Server, slow_table: Database, cancelled: Any, size: int
) -> None:
    """At any point of its rows."""
    go = asyncio.Event()

    async def insert() -> None:
        async with slow_table.session() as session:
            await session.execute(text("INSERT INTO slow VALUES (:content)"), [{"content": "x" * size}] * 20)

    async with slow_table.lifespan(None):
        async with slow_table.session() as session:
            for statement in SLOW_TABLE:
                await session.execute(text(statement))
        task = asyncio.create_task(cancelled(insert, go))
        busy = await becomes(server, lambda count: count == 1, within=10)
        go.set()
        done, _ = await asyncio.wait([task], timeout=5)  # the longest close takes 2 s
        ended = await becomes(server, lambda count: count == 0, within=ENDING)
        async with slow_table.session() as session:
            rows = (await session.execute(text("SELECT count(*) FROM slow"))).scalar_one()

    assert busy
    assert done
    assert ended
    assert rows == 0


async def test_a_connection_that_two_tasks_close_is_closed_before_its_place_is_used_again(
    server: Server, slow_table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two queries of one session are cancelled. The next session has the pool's only place."""
    close, closable, calls = asyncpg.Connection.close, asyncio.Event(), iter([True])
    queries: list[asyncio.Task[Any]] = []

    async def close_slowly(connection: Any, *, timeout: float | None = None) -> None:
        if next(calls, False):  # asyncpg returns at once from a second call
            await closable.wait()
        await close(connection, timeout=timeout)

    async def query_twice() -> None:
        async with slow_table.session() as session:
            await session.execute(text("SELECT 1"))
            queries.extend(asyncio.ensure_future(session.execute(text("SELECT pg_sleep(30)"))) for _ in range(2))
            await asyncio.gather(*queries)

    async def process_id(session: AsyncSession) -> int:
        return int((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    async with slow_table.lifespan(None):
        task = asyncio.create_task(query_twice())
        busy = await becomes(server, lambda count: count == 1, within=10)
        monkeypatch.setattr(asyncpg.Connection, "close", close_slowly)
        task.cancel()
        asyncio.get_running_loop().call_later(0.2, closable.set)
        async with slow_table.session() as session:
            used = await process_id(session)
            await asyncio.wait([task, *queries])
        async with slow_table.session() as session:
            used_again = await process_id(session)

    assert busy
    assert used == used_again


@pytest.mark.system
async def test_disconnect_during_a_stream_ends_its_query(server: Server) -> None:
    """Two hundred clients of a real server."""
    database = database_on(server)
    app = app_with(database)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "begun"
            async with database.session() as session:
                await session.execute(text("SELECT pg_sleep(30)"))

        return StreamingResponse(lines())

    with serving(app) as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(REQUESTS)]
        for client in clients:
            client.sendall(request("GET", "/stream"))
        busy = await becomes(server, lambda count: count == 15, within=30)
        for client in clients:
            client.close()
        ended = await becomes(server, lambda count: count == 0, within=ENDING)
        statuses = await asyncio.gather(*(asyncio.to_thread(get, port, "/fast") for _ in range(REQUESTS)))

    assert busy
    assert ended
    assert set(statuses) == {200}


def get(port: int, path: str) -> int:
    with connection(port) as client:
        client.sendall(request("GET", path))
        return int(read_response(client).split()[1])


async def test_deadline_ends_the_query(server: Server) -> None:
    """The request is a 504."""
    deadline = pytest.importorskip("fastapi_prodkit.deadline", reason="there is no deadline in this version")
    database = database_on(server)
    app = app_with(database)
    app.add_middleware(deadline.DeadlineMiddleware, LimitsSettings(request_timeout=4.0))

    async with database.lifespan(None):
        slow = asyncio.gather(*(ask(app, "/slow") for _ in range(30)))
        busy = await becomes(server, lambda count: count > 0, within=30)
        late = await slow
        ended = await becomes(server, lambda count: count == 0, within=ENDING)
        statuses = await asyncio.gather(*(ask(app, "/fast") for _ in range(15)))

    assert busy
    assert set(late) == {504}
    assert ended
    assert set(statuses) == {200}


@pytest.mark.parametrize("way", ["setting", "route"])
async def test_disconnect_ends_the_query(server: Server, way: str, capsys: Any) -> None:
    """Nothing is committed; the access line has status 499."""
    sections = DatabaseSettings(url=server.url(), ssl="off")
    limits = LimitsSettings(cancel_on_disconnect=way == "setting")
    app = create_app(Settings(environment="test", database=sections, limits=limits))
    dependencies = [Depends(cancel_on_disconnect)] if way == "route" else []

    @app.post("/orders", dependencies=dependencies)
    async def order(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO orders VALUES (1)"))
        await session.execute(text("SELECT pg_sleep(30)"))

    await execute(server, "CREATE TABLE IF NOT EXISTS orders (number int)")
    with serving(app) as port:
        with connection(port) as client:
            client.sendall(request("POST", "/orders"))
            busy = await becomes(server, lambda count: count == 1, within=10)
        ended = await becomes(server, lambda count: count == 0, within=ENDING)
    rows = await execute(server, "SELECT number FROM orders")

    assert busy
    assert ended
    assert rows == []
    assert statuses(capsys.readouterr().out) == [499]


async def test_disconnect_after_the_response_keeps_the_commit(server: Server, capsys: Any) -> None:
    """Background tasks run to their end."""
    sections = DatabaseSettings(url=server.url(), ssl="off")
    limits = LimitsSettings(cancel_on_disconnect=True)
    app = create_app(Settings(environment="test", database=sections, limits=limits))
    gone, done = asyncio.Event(), threading.Event()

    async def write_later() -> None:
        await gone.wait()
        async with app.state.database.session() as session:
            await session.execute(text("INSERT INTO paid VALUES (2)"))
        done.set()

    @app.post("/payments")
    async def pay(session: SessionDep, tasks: BackgroundTasks) -> None:
        loops.append(asyncio.get_running_loop())
        await session.execute(text("INSERT INTO paid VALUES (1)"))
        tasks.add_task(write_later)

    loops: list[asyncio.AbstractEventLoop] = []
    await execute(server, "CREATE TABLE paid (number int)")
    with serving(app) as port:
        with connection(port) as client:
            client.sendall(request("POST", "/payments"))
            await asyncio.to_thread(read_response, client)
        loops[0].call_soon_threadsafe(gone.set)
        ran = await asyncio.to_thread(done.wait, 10)
    rows = await execute(server, "SELECT number FROM paid ORDER BY number")

    assert ran
    assert rows == [1, 2]
    assert statuses(capsys.readouterr().out) == [200]


async def execute(server: Server, statement: str) -> list[Any]:
    """Execute a statement on a new connection, and return the first column of its result."""
    database = Database(DatabaseSettings(url=server.url(), ssl="off"))
    async with database.lifespan(None), database.session() as session:
        result = await session.execute(text(statement))
        return list(result.scalars()) if result.returns_rows else []


def statuses(output: str) -> list[int]:
    lines = [json.loads(line) for line in output.splitlines()]
    return [line["http_status"] for line in lines if line["event"] == "request"]
