"""How a connection begins: time-outs on the server, options, poolers, passwords that change, and room for it."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import threading

import pytest

REASON = "needs the extra: pip install 'fastapi-prodkit[database]'"
pytest.importorskip("sqlalchemy", reason=REASON)
pytest.importorskip("asyncpg", reason=REASON)

from postgres import PASSWORD, PostgresMissingError, postgres
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.database import Database
from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.database.passwords import _Remembered, password_provider, rds_token, secret_password
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings


@pytest.fixture(scope="module")
def server():
    try:
        with postgres() as server:
            yield server
    except PostgresMissingError as missing:
        pytest.skip(str(missing))


def settings_of(url, **options):
    return DatabaseSettings.model_validate({"url": url, "ssl": "off", **options})


async def ask(settings, *statements):
    """Return the first value of each statement, on one connection."""
    engine = create_engine(settings)
    try:
        async with engine.connect() as connection:
            return [await connection.scalar(text(statement)) for statement in statements]
    finally:
        await engine.dispose()


async def test_time_outs_of_the_server(server):
    """A statement, a lock and an idle transaction end on the server, whatever becomes of the client."""
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    shows = [f"SHOW {name}" for name in names]

    production = await ask(settings_of(server.url()), *shows)
    none = await ask(
        settings_of(server.url(), statement_timeout="none", lock_timeout="none", idle_transaction_timeout="none"),
        *shows,
    )

    assert production == ["30s", "10s", "1min"]
    assert none == ["0", "0", "0"]


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(server):
    """It is not only the client that stops waiting."""
    with pytest.raises(DBAPIError, match="statement timeout"):
        await ask(settings_of(server.url(), statement_timeout=0.1), "SELECT pg_sleep(20)")


@pytest.mark.parametrize(
    "options",
    ["-c statement_timeout=5000 -c search_path=app", "-cstatement_timeout=5000 --search-path=app"],
)
async def test_options_of_the_url(server, options):
    """libpq's `options` set what a session begins with, and win over the settings."""
    url = make_url(server.url()).update_query_dict({"options": options}).render_as_string(hide_password=False)

    values = await ask(settings_of(url), "SHOW statement_timeout", "SHOW search_path")

    assert values == ["5s", "app"]


@pytest.mark.parametrize("options", ["statement_timeout", "-c", "-c a b", "--=1"])
def test_options_that_cannot_be_read(options):
    """They are refused where the engine is made, and not repeated: they may be a part of a password."""
    url = make_url("postgresql://u:p@h/d").update_query_dict({"options": options}).render_as_string(hide_password=False)

    with pytest.raises(ConfigurationError, match="options are written as"):
        create_engine(settings_of(url))


async def test_target_session_attrs(server):
    """Of several hosts the one that takes writes; a server that does not is no choice."""
    url = server.url(query="target_session_attrs=read-write")
    several = f"postgresql://postgres@/postgres?host=127.0.0.1:1&host=127.0.0.1:{server.port}"
    both = make_url(several).set(password=PASSWORD).render_as_string(hide_password=False)

    assert await ask(settings_of(url), "SELECT 1") == [1]
    assert await ask(settings_of(both), "SELECT 1") == [1]


async def test_a_pooler_gets_no_settings_and_no_prepared_statements(server):
    """It would refuse the ones, and mix up the others."""
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
    """The remedy is the role's own settings."""
    with pytest.raises(ConfigurationError, match="ALTER ROLE"):
        create_engine(settings_of("postgresql://u:p@h/d?options=-c%20a%3D1", pooler="pgbouncer"))


async def test_through_a_real_pgbouncer(server, tmp_path):
    """Many transactions of several clients share two connections, and none meets another's statements."""
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
    for path in (tmp_path, *tmp_path.parents[:2], tmp_path / "users", tmp_path / "ini"):
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
    """Amazon's own interface, without Amazon."""
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


async def test_a_rotated_password_needs_no_deployment(server, aws, monkeypatch):
    """The role's password and the secret change while the service runs; the next connection has the new one."""
    monkeypatch.setattr("fastapi_prodkit.database.passwords._SECRET_FRESH", 0)
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


async def test_a_password_from_a_function(server):
    """Whatever knows it is asked for each connection, also for the replica's."""
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
async def test_a_secret_that_is_no_object_with_a_password(aws, secret):
    """It is the password itself."""
    aws.client("secretsmanager").create_secret(Name="s", SecretString=secret)

    assert await secret_password("s")() == secret


async def test_a_token_for_iam_authentication(aws):
    """It is signed here, names host and user, and holds for a while."""
    settings = settings_of("postgresql://app@db.example.com:5433/orders", iam_auth=True)
    provider = password_provider(make_url("postgresql://app@db.example.com:5433/orders"), settings)

    token = await provider()

    assert token.startswith("db.example.com:5433/?")
    assert "DBUser=app" in token
    assert await provider() == token
    assert await rds_token("h", 5432, "u")() != token


@pytest.mark.parametrize("url", ["postgresql:///orders", "postgresql://db.example.com/orders"])
def test_a_token_needs_to_know_for_whom(url):
    """Host and user are part of what is signed."""
    with pytest.raises(ConfigurationError, match="DATABASE_IAM_AUTH"):
        password_provider(make_url(url), settings_of(url, iam_auth=True))


def test_a_password_of_the_url_needs_nobody():
    """It is the default."""
    assert password_provider(make_url("postgresql://u:p@h/d"), settings_of("postgresql://u:p@h/d")) is None


async def test_connections_that_open_together_ask_once():
    """And an answer holds for its time."""
    asked = []

    def ask_once():
        asked.append(threading.current_thread())
        return "secret"

    provider = _Remembered(ask_once, 60)

    assert await asyncio.gather(*[provider() for _ in range(5)]) == ["secret"] * 5
    assert len(asked) == 1
    assert asked[0] is not threading.main_thread()


async def test_the_last_password_is_tried_where_a_new_one_cannot_be_had(caplog):
    """A secret store that is down does not take down a service whose password still holds."""
    answers = ["first"]

    def ask():
        return answers.pop()

    provider = _Remembered(ask, 0)

    assert [await provider(), await provider()] == ["first", "first"]
    assert "IndexError" in caplog.text
    assert "first" not in caplog.text.replace("the last one", "")


async def test_without_any_password_the_error_is_told():
    """There is nothing to go on with."""

    def ask():
        raise LookupError

    with pytest.raises(LookupError):
        await _Remembered(ask, 0)()


# Room


@pytest.mark.parametrize(("workers", "warned"), [("1", False), ("20", True), ("auto", False), ("", False)])
async def test_pools_larger_than_the_server_allows_are_warned_about(server, monkeypatch, caplog, workers, warned):
    """100 connections, 3 of them reserved, against ten of each worker; once, with the first connection."""
    caplog.set_level(logging.WARNING, "fastapi_prodkit.database")
    monkeypatch.setenv("WEB_CONCURRENCY", workers)

    await ask(settings_of(server.url()), "SELECT 1")

    assert ("the server allows 97" in caplog.text) == warned


async def test_disposal_is_bounded(server, monkeypatch, caplog):
    """A server that no longer answers does not keep the process from ending."""
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
