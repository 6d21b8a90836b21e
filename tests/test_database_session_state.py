"""State in the server's session ends with the request that has set it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, HTTPException
from postgres import Server

from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import event, func, select, text

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep
from fastapi_prodkit.database.session_state import leaves_state

# Statements of one request, and queries of the state that the next one must not have.
STATES = {
    "set_config": ("SELECT set_config('app.tenant', 'a', false)", "SELECT current_setting('app.tenant', true)", ""),
    "set": ("SET statement_timeout = 1000", "SHOW statement_timeout", "30s"),
    "set session": ("SET SESSION TIME ZONE 'Asia/Tokyo'", "SHOW timezone", "UTC"),
    "set role": ("SET ROLE pg_read_all_data", "SELECT current_role", "postgres"),
    "set session authorization": ("SET SESSION AUTHORIZATION pg_monitor", "SELECT session_user", "postgres"),
    "listen": ("LISTEN news", "SELECT count(*)::text FROM pg_listening_channels()", "0"),
    "advisory lock": (
        "SELECT pg_advisory_lock(42)",
        "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory'",
        "0",
    ),
    "temporary table": (
        "CREATE TEMP TABLE rows (id int)",
        "SELECT count(*)::text FROM pg_class WHERE relpersistence = 't'",
        "0",
    ),
    "cursor": (
        "DECLARE numbers CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*)::text FROM pg_cursors WHERE is_holdable",
        "0",
    ),
    "block": ("DO $$ BEGIN SET app.tenant = 'a'; END $$", "SELECT current_setting('app.tenant', true)", ""),
    "prepared statement": (
        "PREPARE one AS SELECT 1",
        "SELECT count(*)::text FROM pg_prepared_statements WHERE from_sql",
        "0",
    ),
    "view of settings": (
        "UPDATE pg_settings SET setting = 'a' WHERE name = 'application_name'",
        "SHOW application_name",
        "",
    ),
}
# Calls of a request on asyncpg's connection.
DIRECTLY: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "set": lambda driver: driver.execute("SET statement_timeout = 1000"),
    "set_config": lambda driver: driver.fetch("SELECT set_config('app.tenant', $1, $2)", "a", False),
    "listen": lambda driver: driver.add_listener("news", lambda *_: None),
    "advisory lock": lambda driver: driver.fetchval("SELECT pg_advisory_lock(42)"),
    "temporary table": lambda driver: driver.execute("SELECT 1; CREATE TEMP TABLE rows (id int)"),
}
BACKEND = text("SELECT pg_backend_pid()")


@pytest.fixture
async def database(server: Server) -> AsyncIterator[Database]:
    """A database with one connection, so that the next request has the same."""
    database = Database(database_settings(server))
    async with database.lifespan(None):
        yield database


def database_settings(server: Server) -> DatabaseSettings:
    url = f"{server.url()}?options=-c timezone=UTC"
    # Long time-outs, because after a time-out on a busy machine the connection would be replaced.
    return DatabaseSettings(url=url, ssl="off", pool_size=1, max_overflow=0, pool_timeout=30, connect_timeout=30)


def app_with(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database

    @app.get("/change")
    async def change(session: SessionDep, statement: str, status: int = 200) -> int:
        await session.execute(text(statement))
        if status != 200:
            raise HTTPException(status)
        return int(await session.scalar(BACKEND) or 0)

    @app.get("/read")
    async def read(session: ReadSessionDep, statement: str) -> int:
        await session.execute(text(statement))
        return int(await session.scalar(BACKEND) or 0)

    @app.get("/directly")
    async def directly(session: SessionDep, name: str) -> int:
        raw = await (await session.connection()).get_raw_connection()
        await DIRECTLY[name](raw.driver_connection)
        return int(await session.scalar(BACKEND) or 0)

    @app.get("/find")
    async def find(session: SessionDep, statement: str) -> list[Any]:
        return [await session.scalar(text(statement)), await session.scalar(BACKEND)]

    return app


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("name", STATES)
async def test_state_is_reset_for_the_next_request(database: Database, name: str) -> None:
    """On the same connection."""
    change, find, expected = STATES[name]

    async with client_of(app_with(database)) as client:
        for _ in range(2):  # the second time the statement is prepared already
            backend = (await client.get("/change", params={"statement": change})).json()
            found = (await client.get("/find", params={"statement": find})).json()

            assert found == [expected, backend]


@pytest.mark.parametrize("name", DIRECTLY)
async def test_state_set_on_the_driver_connection_is_reset(database: Database, name: str) -> None:
    """SQLAlchemy does not see its statements."""
    _, find, expected = STATES[name]

    async with client_of(app_with(database)) as client:
        backend = (await client.get("/directly", params={"name": name})).json()
        found = (await client.get("/find", params={"statement": find})).json()

    assert found == [expected, backend]


@pytest.mark.parametrize("path", ["/change?status=409", "/read"])
async def test_state_is_reset_after_failed_and_reading_requests(database: Database, path: str) -> None:
    """An advisory lock is released after a failed request and after a request that only reads."""
    change, find, expected = STATES["advisory lock"]

    async with client_of(app_with(database)) as client:
        await client.get(path, params={"statement": change})
        found = (await client.get("/find", params={"statement": find})).json()

    assert found[0] == expected


async def test_connection_without_state_is_not_reset(database: Database) -> None:
    """A connection without session state is returned without RESET statements, which saves a round trip."""
    executed: list[str] = []
    statements = ("SELECT 1", "SET LOCAL statement_timeout = 1000", "SELECT set_config('app.tenant', 'a', true)")

    async with client_of(app_with(database)) as client:
        async with database.engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.add_query_logger(lambda record: executed.append(record.query))
        await client.get("/find", params={"statement": "SELECT 1"})
        executed.clear()  # the reset of the connection that this test has obtained itself
        for statement in statements:
            await client.get("/change", params={"statement": statement})
        async with database.session() as session:
            await session.execute(select(func.set_config("app.tenant", "a", True)))
        quiet = not any("RESET" in query for query in executed)
        for _ in range(2):  # asyncpg tells its logger a moment later
            await client.get("/change", params={"statement": STATES["set"][0]})

    assert quiet
    assert any("RESET ALL" in query for query in executed)


@pytest.mark.parametrize("way", ["cursor", "driver"])
async def test_connection_with_state_of_a_listener_is_replaced(database: Database, way: str) -> None:
    """A reset would undo the listener's state."""

    def connected(connection: Any, _record: object) -> None:
        if way == "driver":
            connection.run_async(lambda driver: driver.execute("SET search_path = shop"))
        else:
            connection.cursor().execute("SET search_path = shop")
            connection.commit()

    event.listen(database.engine.sync_engine, "connect", connected)
    find = "SELECT concat(current_setting('app.tenant', true), current_setting('search_path'))"

    async with client_of(app_with(database)) as client:
        first = (await client.get("/change", params={"statement": STATES["set_config"][0]})).json()
        found, second = (await client.get("/find", params={"statement": find})).json()

    assert found == "shop"
    assert second != first


async def test_listener_without_state_keeps_the_connection(database: Database) -> None:
    """A connect listener that leaves no session state does not make the pool replace the connection."""
    event.listen(database.engine.sync_engine, "connect", lambda _connection, _record: None)

    async with client_of(app_with(database)) as client:
        backends = {(await client.get("/change", params={"statement": STATES["set"][0]})).json() for _ in range(3)}

    assert len(backends) == 1


async def test_connection_that_cannot_be_reset_is_replaced(database: Database) -> None:
    """No request fails."""
    async with client_of(app_with(database)) as client:
        async with database.engine.connect() as connection:
            await connection.execute(text(STATES["set"][0]))
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await connection.commit()
            driver.terminate()
        found = (await client.get("/find", params={"statement": STATES["set"][1]})).json()

    assert found[0] == "30s"


async def test_connection_through_a_pooler_is_not_reset(server: Server) -> None:
    """A connection through PgBouncer keeps its session state, because only the pooler may reset it."""
    one = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}
    database = Database(DatabaseSettings(url=server.url(), ssl="off", pooler="pgbouncer", **one))

    async with database.lifespan(None), client_of(app_with(database)) as client:
        await client.get("/change", params={"statement": STATES["set_config"][0]})
        found = (await client.get("/find", params={"statement": STATES["set_config"][1]})).json()

    assert found[0] == "a"


LASTING = [
    "SET search_path TO a",
    " set search_path = a",
    "/* why */ SET x.y = 1",
    "-- why\nSET x.y = 1",
    "RESET ALL",
    "SELECT set_config('a.b', 'c', false)",
    "SELECT set_config($1, $2, $3)",
    "SELECT set_config('a.b', current_setting('c'), false), set_config('d.e', 'f', true)",
    "SELECT set_config('a.b', coalesce(nullif(x, ''), 'y'), true)",
    "SELECT pg_try_advisory_lock(1), 2",
    "SELECT pg_advisory_lock_shared (1)",
    "CREATE TEMPORARY TABLE a (b int)",
    "CREATE LOCAL TEMP TABLE a (b int)",
    "CREATE OR REPLACE TEMP VIEW a AS SELECT 1",
    "CREATE TABLE pg_temp.a (b int)",
    "SELECT 1 INTO TEMP a",
    "LISTEN a",
    "LOAD 'auto_explain'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET/**/search_path TO a",
    'SET"app".tenant = 1',
    "SET local.tenant = 1",
    "/* a /* nested */ comment */ SET app.tenant = 1",
    "SELECT \"set_config\"('a.b', 'c', false)",
    "SELECT u&\"set\\005fconfig\"('a.b', 'c', false)",
    "SELECT set_config('a.b', 'c, true)', false)",
    "SELECT set_config('a.b', $$c, true)$$, false)",
    "SELECT set_config('a.b', E'c\\', true)', false)",
    "SELECT set_config/**/('a.b', 'c', false)",
    "(SELECT set_config('a.b', 'c', false))",
    "WITH a AS (SELECT set_config('a.b', 'c', false)) SELECT * FROM a",
    "EXPLAIN ANALYZE SELECT set_config('a.b', 'c', false)",
    'SELECT pg_catalog."pg_advisory_lock"(1)',
    'CREATE TABLE "pg_temp".a (b int)',
    "SELECT 1 INTO/**/TEMPORARY a",
    "INSERT INTO pg_temp.a VALUES (1)",
    "UPDATE pg_settings SET setting = 'a' WHERE name = 'b'",
    "DO $$ BEGIN EXECUTE 'SET a.b = 1'; END $$",
    "CALL procedure()",
    "PREPARE a AS SELECT 1",
    "INSERT INTO a VALUES " + "(1), " * 1000 + "(pg_advisory_lock(1))",
]
LOCAL = [
    "SELECT 1",
    "UPDATE a SET b = 1",
    "SET LOCAL search_path TO a",
    "SET TRANSACTION READ ONLY",
    "SET CONSTRAINTS ALL DEFERRED",
    "SELECT set_config('a.b', 'c', TRUE)",
    "SELECT set_config('a.b', current_setting('c'), true)",
    "SELECT pg_advisory_xact_lock(1)",
    "SELECT pg_advisory_unlock(1)",
    "SELECT 'listen', temp, settings FROM sets",
    "INSERT INTO temperatures VALUES (1)",
    "INSERT INTO weather (temp) VALUES (1)",
    "NOTIFY a, 'b'",
    "-- why\n/* because */ (SELECT 1)",
    "SELECT set_config('a''s', $1::VARCHAR, true), set_config('a.b', concat('c', 'd'), true)",
    "INSERT INTO a VALUES " + "(1), " * 1000 + "(1)",
]


@pytest.mark.parametrize(("statements", "expected"), [(LASTING, True), (LOCAL, False)])
def test_leaves_state_reads_the_statement(statements: list[str], expected: bool) -> None:
    """leaves_state distinguishes statements that outlast their transaction from transaction-local ones."""
    assert [statement for statement in statements if leaves_state(statement) is not expected] == []


def test_leaves_state_reads_the_parameters_of_set_config() -> None:
    """leaves_state treats set_config as local only if the third parameter is true in every execution."""
    statement = "SELECT set_config($1::VARCHAR, $2::VARCHAR, $3::BOOLEAN)"

    assert not leaves_state(statement, ("a", "b", True))
    assert not leaves_state(statement, [("a", "b", True), ("c", "d", True)])
    assert leaves_state(statement, ("a", "b", False))
    assert leaves_state(statement, [("a", "b", True), ("c", "d", False)])
    assert leaves_state(statement, ("a", "b"))
