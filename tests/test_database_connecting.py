"""Opening connections: time-outs of the server, options, poolers, changing passwords, and limits."""

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack

import pytest

REASON = "needs the extra: pip install 'fastapi-prodkit[database]'"
pytest.importorskip("sqlalchemy", reason=REASON)
pytest.importorskip("asyncpg", reason=REASON)

from outages import Outages
from postgres import PASSWORD
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.database import Database, is_unavailable
from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.database.passwords import CachedPassword, password_provider, rds_token, secret_password
from fastapi_prodkit.database.url import parameters, parse
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings


def settings_of(url, **options):
    return DatabaseSettings.model_validate({"url": url, "ssl": "off", **options})


async def ask(settings, *statements):
    """Execute each statement on one connection, and return the first values."""
    engine = create_engine(settings)
    try:
        async with engine.connect() as connection:
            return [await connection.scalar(text(statement)) for statement in statements]
    finally:
        await engine.dispose()


async def test_server_ends_slow_statements_locks_and_idle_transactions(server):
    """Connections set PostgreSQL's time-outs for statements, locks and idle transactions; none disables them."""
    names = (
        *("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
        "client_connection_check_interval",
    )
    shows = [f"SHOW {name}" for name in names]

    production = await ask(settings_of(server.url()), *shows)
    none = await ask(
        settings_of(server.url(), statement_timeout="none", lock_timeout="none", idle_transaction_timeout="none"),
        *shows,
    )

    assert production == ["30s", "10s", "1min", "1s"]
    assert none == ["0", "0", "0", "1s"]


async def test_time_out_below_a_millisecond_is_rounded_up(server):
    """0 would mean no time-out."""
    assert await ask(settings_of(server.url(), lock_timeout=0.0001), "SHOW lock_timeout") == ["1ms"]


async def test_statement_timeout_ends_the_statement_in_the_server(server):
    """PostgreSQL itself cancels a statement after statement_timeout, so the query does not run on."""
    with pytest.raises(DBAPIError, match="statement timeout"):
        await ask(settings_of(server.url(), statement_timeout=0.1), "SELECT pg_sleep(20)")


async def test_server_ends_the_query_of_a_killed_worker(server):
    """PostgreSQL ends a running query after its client connection is lost, without a cancel request."""
    engine = create_engine(settings_of(server.url(), pool_size=2))
    async with engine.connect() as witness:
        await witness.execution_options(isolation_level="AUTOCOMMIT")  # a transaction sees one state of the activity
        lost = await engine.connect()
        pid = await lost.scalar(text("SELECT pg_backend_pid()"))
        query = asyncio.create_task(lost.scalar(text("SELECT pg_sleep(60)")))
        alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND state = :state")

        async def count(state):
            return await witness.scalar(alive, {"pid": pid, "state": state})

        async with asyncio.timeout(10):
            while not await count("active"):
                await asyncio.sleep(0.02)
            driver = (await lost.get_raw_connection()).driver_connection
            driver.terminate()
            while await count("active"):
                await asyncio.sleep(0.05)

    with pytest.raises(DBAPIError):
        await query
    await lost.invalidate()
    await lost.close()
    await engine.dispose()


async def test_unknown_client_check_is_left_out(server, monkeypatch, caplog):
    """Other unknown options are an error."""
    url = make_url(server.url()).update_query_dict({"options": "-c no_such_option=1"})
    settings = settings_of(url.render_as_string(hide_password=False))

    with pytest.raises(Exception, match="no_such_option"):  # SQLAlchemy 2.0 lets asyncpg's own through
        await ask(settings, "SELECT 1")
    monkeypatch.setattr("fastapi_prodkit.database.connecting.CHECK_INTERVAL", "no_such_option")
    found = await ask(settings, "SELECT 1")

    assert found == [1]
    assert "the server has no no_such_option" in caplog.text


@pytest.mark.parametrize(
    "options",
    ["-c statement_timeout=5000 -c search_path=app", "-cstatement_timeout=5000 --search-path=app"],
)
async def test_options_of_the_url_win_over_the_settings(server, options):
    """The URL's options parameter overrides statement_timeout of the settings and can set search_path."""
    url = make_url(server.url()).update_query_dict({"options": options}).render_as_string(hide_password=False)

    values = await ask(settings_of(url), "SHOW statement_timeout", "SHOW search_path")

    assert values == ["5s", "app"]


@pytest.mark.parametrize("options", ["statement_timeout", "-c", "-c a b", "--=1"])
def test_invalid_options_fail_without_their_text(options):
    """They may be a part of a password."""
    url = make_url("postgresql://u:p@h/d").update_query_dict({"options": options}).render_as_string(hide_password=False)

    with pytest.raises(ConfigurationError, match="options are written as"):
        create_engine(settings_of(url))


def several(server, *hosts, **query):
    """Return a URL of several hosts in libpq's form."""
    before, _, after = server.url().partition(f"127.0.0.1:{server.port}")
    parameters = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{before}{','.join(hosts)}{after}?{parameters}"


async def test_target_session_attrs_chooses_the_primary(server):
    """Without one it is an outage."""
    here = f"127.0.0.1:{server.port}"
    sqlalchemy_like = f"postgresql://postgres@/postgres?host=127.0.0.1:1&host={here}"
    urls = [
        server.url(query="target_session_attrs=read-write"),
        several(server, "127.0.0.1:1", here, target_session_attrs="primary"),
        several(server, here, "127.0.0.1:1", target_session_attrs="prefer-standby"),
        several(server, "127.0.0.1:1", here),
        make_url(sqlalchemy_like).set(password=PASSWORD).render_as_string(hide_password=False),
    ]

    served = [await ask(settings_of(url), "SELECT 1") for url in urls]
    database = Database(settings_of(several(server, here, "127.0.0.1:1", target_session_attrs="standby")))
    with pytest.raises(DBAPIError) as nobody:
        await database.check()

    assert served == [[1]] * 5
    assert is_unavailable(nobody.value)


async def test_silent_host_uses_only_its_part_of_the_time_out(server):
    """The host that was reached is tried first from then on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog for ever
        url = several(server, f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{server.port}")
        engine = create_engine(settings_of(url, connect_timeout=0.6))
        started = time.perf_counter()
        async with engine.connect():
            first = time.perf_counter() - started
            async with engine.connect() as connection:
                second = time.perf_counter() - started - first
                found = await connection.scalar(text("SELECT 1"))
        await engine.dispose()

    assert found == 1
    assert second < 0.3 <= first


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://u:p@a,b:6432/d", ("a:5432", "b:6432")),
        ("postgresql://a:1,b:2/d?application_name=x@y", ("a:1", "b:2")),
        ("postgres://u:a%2Cb@h,i?sslmode=require", ("h:5432", "i:5432")),
        ("postgresql://u:p@/d?host=a&host=b", ("a:5432", "b:5432")),
        ("postgresql://u:p@x,y/d?host=a&host=b:1", ("a:5432", "b:1")),
    ],
)
def test_several_hosts_are_parsed(url, hosts):
    """In the form of libpq or SQLAlchemy; the port has a default."""
    plain, _ = parameters(parse(url))

    assert plain.normalized_query["host"] == hosts


def test_comma_in_a_password_separates_no_hosts():
    """A comma in the URL's password stays part of the password and does not split the host list."""
    assert parse("postgresql://u:a,b@h/d").password == "a,b"
    assert parse("postgresql://u:a,b@h/d").host == "h"


async def test_pooler_gets_no_settings_and_no_prepared_statements(server):
    """With pooler=pgbouncer, connections set no time-outs and leave no prepared statements on the server."""
    url = server.url(query="application_name=orders")
    engine = create_engine(settings_of(url, pooler="pgbouncer"))
    async with engine.connect() as connection:
        for _ in range(7):
            shown = await connection.scalar(text("SHOW statement_timeout"))
        name = await connection.scalar(text("SHOW application_name"))
        prepared = await connection.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
    await engine.dispose()

    assert (shown, name, prepared) == ("0", "orders", 0)


def test_options_through_a_pooler_are_refused():
    """The error names the role's settings as the remedy."""
    with pytest.raises(ConfigurationError, match="ALTER ROLE"):
        create_engine(settings_of("postgresql://u:p@h/d?options=-c%20a%3D1", pooler="pgbouncer"))


async def test_clients_share_connections_of_a_real_pgbouncer(server, tmp_path):
    """Sixty transactions of two clients share two PgBouncer connections without prepared-statement conflicts."""
    binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")  # where Debian has it
    if binary is None:
        pytest.skip("needs pgbouncer (Debian package)")
    from processes import free_port, listens

    port = free_port()
    (tmp_path / "users").write_text(f'"postgres" "{PASSWORD}"\n')
    (tmp_path / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\n"
        f"auth_type=plain\nauth_file={tmp_path}/users\npool_mode=transaction\ndefault_pool_size=2\n"
        f"unix_socket_dir=\nlogfile={tmp_path}/log\npidfile={tmp_path}/pid\nuser=nobody\n"
    )
    ours = [path for path in tmp_path.parents if path.name.startswith(("pytest-", "popen-"))]
    for path in (tmp_path, *ours, tmp_path / "users", tmp_path / "ini"):
        path.chmod(0o777)
    process = subprocess.Popen([binary, str(tmp_path / "ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not listens(port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            await asyncio.sleep(0.02)
        url = make_url(server.url()).set(port=port).render_as_string(hide_password=False)
        databases = [Database(settings_of(url, pooler="pgbouncer")) for _ in range(2)]

        async def work(database, number):
            async with database.session() as session:
                return await session.scalar(text(f"SELECT {number} + :one"), {"one": 1})

        results = await asyncio.gather(*[work(databases[number % 2], number) for number in range(60)])
        for database in databases:
            await database.engine.dispose()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)

    assert results == [number + 1 for number in range(60)]


# Passwords


@pytest.fixture
def aws(monkeypatch):
    """Mock AWS with moto."""
    moto = pytest.importorskip("moto", reason="needs moto")
    boto3 = pytest.importorskip("boto3", reason="needs the extra: pip install 'fastapi-prodkit[aws]'")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }.items():
        monkeypatch.setenv(name, value)
    with moto.mock_aws():
        yield boto3


async def test_rotated_password_is_read_again(server, aws, monkeypatch):
    """When the server refuses the cached one."""
    monkeypatch.setattr("fastapi_prodkit.database.passwords._PAUSE", 0)
    client = aws.client("secretsmanager")
    client.create_secret(Name="orders/db", SecretString=json.dumps({"username": "rotated", "password": "first"}))
    await ask(settings_of(server.url()), "SELECT 1")
    admin = create_engine(settings_of(server.url()))
    url = f"postgresql://rotated@127.0.0.1:{server.port}/postgres"
    engine = create_engine(settings_of(url, password_secret="orders/db", pool_size=1))
    async with admin.begin() as connection:
        await connection.execute(text("CREATE ROLE rotated LOGIN PASSWORD 'first'"))

    async with engine.connect() as connection:
        before = await connection.scalar(text("SELECT current_user"))
    async with admin.begin() as connection:
        await connection.execute(text("ALTER ROLE rotated PASSWORD 'second'"))
    client.put_secret_value(SecretId="orders/db", SecretString=json.dumps({"password": "second"}))
    await engine.dispose()
    async with engine.connect() as connection:
        after = await connection.scalar(text("SELECT current_user"))

    assert (before, after) == ("rotated", "rotated")
    await engine.dispose()
    await admin.dispose()


async def test_wrong_password_is_read_once_per_second(server):
    """Together for all connections."""
    asked = []

    def ask_store():
        asked.append(True)
        return "wrong"

    provider = CachedPassword(ask_store, 60)
    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
    database = Database(settings_of(url), password=provider)

    results = await asyncio.gather(*[database.check() for _ in range(5)], return_exceptions=True)
    provider._read_at -= 2  # as if two seconds had passed
    with pytest.raises(DBAPIError):
        await database.check()
    await database.engine.dispose()

    assert all(is_unavailable(result) for result in results)
    assert len(asked) == 2


async def test_wrong_password_of_a_function_is_not_read_again(server):
    """It is called for each connection anyway."""
    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
    database = Database(settings_of(url), password=lambda: "wrong")

    with pytest.raises(DBAPIError) as refused:
        await database.check()

    assert is_unavailable(refused.value)


async def test_unreadable_password_is_a_503(server):
    """An error of the password function counts as an outage of the database, which is answered with a 503."""

    def ask_store():
        raise LookupError("no store")

    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
    database = Database(settings_of(url), password=ask_store)

    with pytest.raises(DBAPIError) as failed:
        await database.check()

    assert is_unavailable(failed.value)


async def test_hanging_store_blocks_one_thread():
    """However many requests wait for it."""
    started, go = threading.Event(), threading.Event()
    asked = []

    def ask_store():
        asked.append(True)
        started.set()
        go.wait(10)
        return "secret"

    provider = CachedPassword(ask_store, 60)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(provider(), 0.01)
    waiting = asyncio.create_task(provider())
    await asyncio.to_thread(started.wait, 10)
    go.set()

    assert await waiting == "secret"
    assert len(asked) == 1


def test_two_password_sources_are_refused():
    """iam_auth together with password_secret is a ConfigurationError, since the two exclude each other."""
    url = "postgresql://u@h/d"

    with pytest.raises(ConfigurationError, match="exclude each other"):
        create_engine(settings_of(url, iam_auth=True, password_secret="s"))


async def test_password_function_is_called_for_each_connection(server):
    """Of the replica too."""
    asked = []

    async def password():
        asked.append(True)
        return PASSWORD

    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
    database = Database(settings_of(url, read_url=url), password=password)
    await database.check()
    async with database.read_session() as session:
        await session.execute(text("SELECT 1"))
    async with database.lifespan(None):
        pass

    assert len(asked) == 2


@pytest.mark.parametrize("secret", ["plain", '{"username": "x"}', '"text"'])
async def test_secret_without_a_password_key_is_the_password(aws, secret):
    """A secret that is no JSON object with a password key is used unchanged as the password."""
    aws.client("secretsmanager").create_secret(Name="s", SecretString=secret)

    assert await secret_password("s")() == secret


async def test_iam_token_names_host_and_user(aws):
    """It is cached."""
    settings = settings_of("postgresql://app@db.example.com:5433/orders", iam_auth=True)
    provider = password_provider(make_url("postgresql://app@db.example.com:5433/orders"), settings)

    token = await provider()

    assert token.startswith("db.example.com:5433/?")
    assert "DBUser=app" in token
    assert await provider() == token
    assert await rds_token("h", 5432, "u")() != token


@pytest.mark.parametrize("url", ["postgresql:///orders", "postgresql://db.example.com/orders"])
def test_iam_token_requires_host_and_user(url):
    """IAM authentication needs host and user in the URL, because the token signs both."""
    with pytest.raises(ConfigurationError, match="DATABASE_IAM_AUTH"):
        password_provider(make_url(url), settings_of(url, iam_auth=True))


def test_password_of_the_url_has_no_provider():
    """A URL that contains a password needs no password provider, so password_provider returns None."""
    assert password_provider(make_url("postgresql://u:p@h/d"), settings_of("postgresql://u:p@h/d")) is None


async def test_concurrent_connections_read_the_password_once():
    """It is cached."""
    asked = []

    def ask_once():
        asked.append(threading.current_thread())
        return "secret"

    provider = CachedPassword(ask_once, 60)

    assert await asyncio.gather(*[provider() for _ in range(5)]) == ["secret"] * 5
    assert len(asked) == 1
    assert asked[0] is not threading.main_thread()


async def test_last_password_is_used_while_the_store_is_down(caplog):
    """CachedPassword returns the last password while the secret store fails, and logs the store's error."""
    answers = ["first"]

    def ask():
        return answers.pop()

    provider = CachedPassword(ask, 0)

    assert [await provider(), await provider()] == ["first", "first"]
    assert "IndexError" in caplog.text
    assert "first" not in caplog.text.replace("the last one", "")


async def test_error_of_the_store_is_raised_without_a_password():
    """CachedPassword raises the error of the secret store if no earlier password is cached."""

    def ask():
        raise LookupError

    with pytest.raises(LookupError):
        await CachedPassword(ask, 0)()


# Room


@pytest.mark.parametrize(("workers", "warned"), [("1", False), ("20", True), ("auto", False), ("", False)])
async def test_pools_larger_than_the_server_allows_log_a_warning(server, monkeypatch, caplog, workers, warned):
    """Once, at the first connection."""
    caplog.set_level(logging.WARNING, "fastapi_prodkit.database")
    monkeypatch.setenv("WEB_CONCURRENCY", workers)

    await ask(settings_of(server.url()), "SELECT 1")

    assert ("the server allows 97" in caplog.text) == warned


async def test_limit_of_the_role_counts(server, caplog):
    """The pool-size warning reports the role's CONNECTION LIMIT if that is below the server's limit."""
    admin = create_engine(settings_of(server.url()))
    async with admin.begin() as connection:
        await connection.execute(text("CREATE ROLE limited LOGIN PASSWORD 'x' CONNECTION LIMIT 7"))
    await admin.dispose()

    found = await ask(settings_of(f"postgresql://limited:x@127.0.0.1:{server.port}/postgres"), "SELECT 1")

    assert found == [1]
    assert "the server allows 7" in caplog.text


async def test_server_without_a_known_limit_serves(server, monkeypatch, caplog):
    """Servers similar to PostgreSQL may lack its catalogue."""
    monkeypatch.setattr("fastapi_prodkit.database.sizing.ALLOWED_CONNECTIONS_SQL", "SELECT nothing")

    assert await ask(settings_of(server.url()), "SELECT 1") == [1]
    assert "is unknown: UndefinedColumnError" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_shutdown_drops_connections_to_a_frozen_server(server, caplog):
    """Without a traceback for each."""
    database = Database(settings_of(server.url(), read_url=server.url(), pool_timeout=2))

    async def use(engine):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(0.1)"))

    with Outages(server) as outages:
        async with AsyncExitStack() as stack:
            async with database.lifespan(None):
                engines = [database.engine, database.read_engine]
                await asyncio.gather(*[use(engine) for engine in engines for _ in range(4)])
                stack.enter_context(outages.frozen())
                started = time.perf_counter()
            took = time.perf_counter() - started

    assert took < 2
    assert caplog.text.count("4 connections were dropped") == 2
    assert "Traceback" not in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_failed_close_after_a_second_cancellation_is_not_logged(server, caplog):
    """SQLAlchemy closes the connection of a cancelled statement; a second cancellation ends its wait."""
    database = Database(settings_of(server.url(), pool_timeout=0.4))

    async def sleep():
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            started.set()
            await session.execute(text("SELECT pg_sleep(30)"))

    with Outages(server) as outages:
        async with database.lifespan(None):
            started = asyncio.Event()
            sleeping = asyncio.ensure_future(sleep())
            await started.wait()
            with outages.frozen():
                while not sleeping.done():
                    sleeping.cancel()
                    await asyncio.sleep(0)
                closing = asyncio.all_tasks() - {asyncio.current_task()}
                await asyncio.wait(closing)
            del closing, sleeping
            gc.collect()

    assert "never retrieved" not in caplog.text


async def test_shutdown_closes_connections_within_a_bound(server, monkeypatch, caplog):
    """Shutdown logs a warning and continues if closing the database connections exceeds its time limit."""
    database = Database(settings_of(server.url()))

    async def never():
        await asyncio.sleep(60)

    async with database.lifespan(None):
        await database.check()
        real = database.engine.dispose
        monkeypatch.setattr("fastapi_prodkit.database.session._DISPOSAL", 0.05)
        monkeypatch.setattr(type(database.engine), "dispose", lambda self: never())

    assert "not closed in time" in caplog.text
    monkeypatch.undo()
    await real()
