"""Migrations: run once whoever starts them, undone if they fail, and known to readiness."""

import asyncio
import io
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from migrating import INDEX, configured, environment, migration, project, sql, version
from postgres import Server

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError, MigrationError
from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

import sqlalchemy
from alembic import command
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.database.engine import create_engine
from fastapi_prodkit.database.migration_lock import LOCK
from fastapi_prodkit.database.migration_target import engine_for, is_pooled
from fastapi_prodkit.database.migrations import alembic_config
from fastapi_prodkit.database.readiness import migrations_check, readiness_checks

SECRET = "hunter2-7f3a"
PATIENCE = 60.0  # seconds that ten processes may take on a busy machine


@pytest.fixture
def on_postgresql(server: Server) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    sql(server.url(), f"CREATE DATABASE {name} STRATEGY file_copy")
    yield server.url(name)
    sql(server.url(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def on_sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"on_{request.param}"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return project(tmp_path / "project")


class TestRunning:
    def test_up_and_down_and_up_again(self, directory, url):
        """Migrations run with the async driver, in both directions, and again."""
        config = configured(directory, url)

        command.upgrade(config, "head")
        assert version(url) == ["0002"]
        command.check(config)
        command.downgrade(config, "base")
        assert version(url) == []
        command.upgrade(config, "head")
        assert version(url) == ["0002"]

    async def test_under_a_running_event_loop(self, directory, on_sqlite):
        """An async test or script can migrate, where `asyncio.run()` in env.py would fail."""
        command.upgrade(configured(directory, on_sqlite), "head")

        assert await asyncio.to_thread(version, on_sqlite) == ["0002"]

    def test_a_failing_migration_leaves_nothing(self, directory, url):
        """What a migration did before it failed is undone; on SQLite, those before it are, too."""
        migration(directory, "0003", 'op.create_table("halves", sa.Column("id", sa.Integer()))\nop.execute("nonsense")')

        with pytest.raises(DBAPIError):
            command.upgrade(configured(directory, url), "head")

        with pytest.raises(DBAPIError):
            sql(url, "SELECT * FROM halves")
        if url.startswith("postgresql"):
            assert version(url) == ["0002"]
        else:
            with pytest.raises(DBAPIError):
                version(url)

    def test_a_transaction_for_each_migration(self, tmp_path, url):
        """Options reach Alembic: those before the failing one stay."""
        directory = project(tmp_path / "each", arguments=", transaction_per_migration=True")
        migration(directory, "0003", 'op.execute("nonsense")')

        with pytest.raises(DBAPIError):
            command.upgrade(configured(directory, url), "head")

        assert version(url) == ["0002"]

    def test_logging_stays_as_it_is(self, directory, on_sqlite):
        """Loggers that exist stay enabled, and the root logger keeps its handlers and level."""
        logger = logging.getLogger("existed.before")
        before = (list(logging.root.handlers), logging.root.level)

        command.upgrade(configured(directory, on_sqlite), "head")

        assert not logger.disabled
        assert (list(logging.root.handlers), logging.root.level) == before

    def test_progress_is_logged_for_each_migration(self, directory, on_sqlite, caplog):
        """A long run shows how far it is."""
        caplog.set_level(logging.INFO, "fastapi_prodkit.database.migrations")

        command.upgrade(configured(directory, on_sqlite), "head")

        assert [line.partition(" in ")[0] for line in caplog.messages] == ["0001 done", "0002 done"]

    @pytest.mark.parametrize("form", ["notice", "(notice,)"])
    def test_callbacks_of_the_project_are_kept(self, tmp_path, on_sqlite, form):
        """`on_version_apply` takes one function or several, as Alembic's does."""
        directory = project(tmp_path / "own", arguments=f", on_version_apply={form}")
        env = directory / "migrations" / "env.py"
        notice = "def notice(step, **_): context.config.attributes['seen'].append(step.up_revision_id)\n"
        env.write_text(notice + env.read_text())
        config = configured(directory, on_sqlite, seen=[])

        command.upgrade(config, "head")

        assert config.attributes["seen"] == ["0001", "0002"]

    def test_autogenerate_writes_batches_for_sqlite(self, directory, on_sqlite):
        """SQLite changes a table by rebuilding it, and new migrations are written for that."""
        config = configured(directory, on_sqlite)
        command.upgrade(config, "0001")
        (directory / "migrations" / "versions" / "0002_step.py").unlink()

        command.revision(config, "name", autogenerate=True)

        written = next((directory / "migrations" / "versions").glob("*_name.py")).read_text()
        assert "batch_alter_table" in written


class TestSqliteForeignKeys:
    def test_rebuilding_a_table_keeps_the_rows_that_refer_to_it(self, directory, on_sqlite):
        """With foreign keys enforced, dropping the old table would empty its children."""
        command.upgrade(configured(directory, on_sqlite), "head")
        sql(
            on_sqlite,
            "CREATE TABLE parts (item INTEGER REFERENCES items (id) ON DELETE CASCADE)",
            "INSERT INTO items VALUES (1, 'saw')",
            "INSERT INTO parts VALUES (1)",
        )

        command.downgrade(configured(directory, on_sqlite), "0001")

        assert sql(on_sqlite, "SELECT item FROM parts") == [1]

    def test_a_migration_that_leaves_rows_alone_is_undone(self, directory, on_sqlite):
        """What foreign keys would have refused is refused at the end of the migration, by the names of the tables."""
        command.upgrade(configured(directory, on_sqlite), "head")
        sql(
            on_sqlite,
            "CREATE TABLE parts (item INTEGER REFERENCES items (id))",
            "INSERT INTO items VALUES (1, 'saw')",
            "INSERT INTO parts VALUES (1)",
        )
        migration(directory, "0003", 'op.execute("DELETE FROM items")')

        with pytest.raises(MigrationError, match="0003 would violate foreign keys: parts -> items"):
            command.upgrade(configured(directory, on_sqlite), "head")

        assert version(on_sqlite) == ["0002"]
        assert sql(on_sqlite, "SELECT id FROM items") == [1]

    def test_an_autocommit_block_is_outside_any_transaction(self, directory, on_sqlite):
        """VACUUM works in it."""
        migration(directory, "0003", 'with op.get_context().autocommit_block():\n    op.execute("VACUUM")')

        command.upgrade(configured(directory, on_sqlite), "head")

        assert version(on_sqlite) == ["0003"]


class TestTarget:
    def test_settings_that_env_py_names(self, tmp_path, on_sqlite):
        """`alembic upgrade head` needs nothing but env.py."""
        arguments = f", lambda: Settings(database={{'url': {on_sqlite!r}}})"
        directory = project(tmp_path / "own", arguments=arguments)
        env = directory / "migrations" / "env.py"
        env.write_text("from fastapi_prodkit import Settings\n" + env.read_text())

        command.upgrade(alembic_config(directory / "alembic.ini"), "head")

        assert version(on_sqlite) == ["0002"]

    @pytest.mark.parametrize("driver", ["sqlite", "sqlite+pysqlite"])
    def test_the_url_of_alembic_ini(self, directory, on_sqlite, driver):
        """A project that keeps its URL there keeps it, with a sync driver as well."""
        ini = directory / "alembic.ini"
        ini.write_text(f"{ini.read_text()}sqlalchemy.url = {on_sqlite.replace('sqlite', driver, 1)}\n")

        command.upgrade(alembic_config(ini), "head")

        assert version(on_sqlite) == ["0002"]

    def test_pyproject_toml(self, directory, on_sqlite):
        """`[tool.alembic]` configures as well as alembic.ini does."""
        (directory / "alembic.ini").unlink()
        (directory / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
        config = alembic_config(directory / "pyproject.toml")
        config.attributes["settings"] = DatabaseSettings(url=on_sqlite)

        command.upgrade(config, "head")

        assert version(on_sqlite) == ["0002"]

    def test_a_connection_of_the_callers(self, directory, url):
        """A test that migrates inside its own transaction can roll everything back."""

        async def migrate_and_roll_back() -> list[str]:
            engine = create_engine(DatabaseSettings(url=url, ssl="off"))
            async with engine.connect() as connection:
                await connection.execute(sqlalchemy.text("CREATE TABLE before (id INTEGER)"))
                await connection.run_sync(
                    lambda shared: command.upgrade(configured(directory, url, connection=shared), "head")
                )
                found = await connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version"))
                rows = list(found.scalars())
                await connection.rollback()
            await engine.dispose()
            return rows

        assert asyncio.run(migrate_and_roll_back()) == ["0002"]
        if url.startswith("postgresql"):
            assert sql(url, "SELECT to_regclass('alembic_version')") == [None]

    def test_a_url_of_its_own(self, directory, on_sqlite):
        """DATABASE_MIGRATIONS_URL leads around a pooler."""
        settings = DatabaseSettings(url="sqlite:////nowhere/at/all.db", migrations_url=on_sqlite)

        command.upgrade(configured(directory, "unused", settings=settings), "head")

        assert version(on_sqlite) == ["0002"]

    def test_no_database(self, directory):
        """The remedy is named."""
        with pytest.raises(ConfigurationError, match="set DATABASE_URL"):
            command.upgrade(alembic_config(directory / "alembic.ini"), "head")

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            (f"mysql+nothing://user:{SECRET}@localhost/x", "is not one that SQLAlchemy understands"),
            (f"postgresql+psycopg2://user:{SECRET}@localhost:port/x", "is not one that SQLAlchemy understands"),
            (f"postgresql+pg8000://user:{SECRET}@localhost/x", "needs a driver that is not installed: pg8000"),
            (SECRET, "is not a URL"),
            (f"{SECRET}@localhost:5432/x", "is not a URL"),
            (f"{SECRET}://localhost/x", "is not one that SQLAlchemy understands"),
            (f"{SECRET}:x@localhost/x?next=http://x", "is not one that SQLAlchemy understands"),
        ],
    )
    def test_a_url_that_cannot_be_used(self, directory, url, problem):
        """The error names the driver and never the URL, nor what stands in the place of its scheme."""
        with pytest.raises(ConfigurationError, match=problem) as caught:
            command.upgrade(configured(directory, url), "head")

        assert SECRET not in str(caught.value)
        assert caught.value.__context__ is None

    def test_sql_needs_no_database(self, directory):
        """`--sql` writes what would run, for the dialect of the URL; nothing connects."""
        config = configured(directory, f"postgres://user:{SECRET}@127.0.0.1:1/name")
        config.output_buffer = io.StringIO()

        command.upgrade(config, "head", sql=True)

        written = config.output_buffer.getvalue()
        assert written.startswith("SET lock_timeout = 2000;\n\nSET statement_timeout = 0;\n\nBEGIN;")
        assert "ADD COLUMN name VARCHAR(50)" in written
        assert written.index("BEGIN") < written.index("CREATE TABLE items") < written.index("COMMIT")
        assert SECRET not in written

    def test_sql_with_a_connection_of_the_callers(self, directory):
        """It says which dialect to write, and is left alone."""
        engine = sqlalchemy.create_engine("sqlite://")
        with engine.connect() as connection:
            config = configured(directory, "unused", connection=connection)
            config.output_buffer = io.StringIO()

            command.upgrade(config, "head", sql=True)

            assert not sqlalchemy.inspect(connection).get_table_names()
        engine.dispose()
        assert "CREATE TABLE items" in config.output_buffer.getvalue()


class TestLock:
    @pytest.mark.system
    def test_five_deployments_at_once_run_it_once(self, directory, on_postgresql):
        """One migrates, four find nothing to do; CREATE INDEX CONCURRENTLY does not wait for those who wait."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        migration(directory, "0003", INDEX)
        outputs = [directory / f"{number}.txt" for number in range(5)]
        release = hold(on_postgresql)
        deployments = [deploy(directory, on_postgresql, output) for output in outputs]
        try:
            await_in(outputs, "another process is migrating", deployments)
        finally:
            release()

        codes = [deployment.wait(PATIENCE) for deployment in deployments]

        said = [output.read_text() for output in outputs]
        assert codes == [0] * 5, said
        assert sum("Done: 3 migrations" in text for text in said) == 1
        assert sum("Nothing to do" in text for text in said) == 4
        assert version(on_postgresql) == ["0003"]
        assert sql(on_postgresql, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'items_name'::regclass") == [True]

    @pytest.mark.system
    def test_deployments_take_turns_on_sqlite(self, directory, on_sqlite):
        """There a transaction that writes from its beginning is the lock."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        outputs = [directory / f"{number}.txt" for number in range(2)]

        deployments = [deploy(directory, on_sqlite, output) for output in outputs]
        codes = [deployment.wait(PATIENCE) for deployment in deployments]

        said = [output.read_text() for output in outputs]
        assert codes == [0] * 2, said
        assert sum("Done: 2 migrations" in text for text in said) == 1

    def test_the_wait_ends(self, directory, on_postgresql):
        """A lock that stays is an error that says where to look, and not a deployment that hangs."""
        release = hold(on_postgresql)
        try:
            with pytest.raises(MigrationError, match=r"did not end within 1 s; see pg_locks"):
                command.upgrade(configured(directory, on_postgresql, lock_timeout=1), "head")
        finally:
            release()

        command.upgrade(configured(directory, on_postgresql, lock_timeout=0.1), "head")

    def test_current_does_not_wait(self, directory, on_postgresql, capsys):
        """It answers while somebody migrates."""
        command.upgrade(configured(directory, on_postgresql), "head")
        release = hold(on_postgresql)
        try:
            command.current(configured(directory, on_postgresql, lock_timeout=0))
        finally:
            release()

        assert capsys.readouterr().out == "0002 (head)\n"

    def test_nothing_stays_locked(self, directory, on_postgresql):
        """The session's lock is gone, also on a connection that the caller keeps, and after a failure."""
        migration(directory, "0003", 'op.execute("nonsense")')

        async def fail() -> list[int]:
            engine = create_engine(DatabaseSettings(url=on_postgresql, ssl="off"))
            async with engine.connect() as connection:
                with pytest.raises(DBAPIError):
                    await connection.run_sync(
                        lambda shared: command.upgrade(configured(directory, on_postgresql, connection=shared), "head")
                    )
                held = await connection.execute(
                    sqlalchemy.text(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                        "(SELECT oid FROM pg_database WHERE datname = current_database())"
                    )
                )
                rows = list(held.scalars())
            await engine.dispose()
            return rows

        assert asyncio.run(fail()) == [0]

    @pytest.mark.parametrize(
        ("url", "pooled"),
        [
            ("postgresql://user:password@pool.example.com:6432/name", True),
            ("postgresql://user:password@db.example.com:5432/name", False),
            ("sqlite:///6432", False),
        ],
    )
    def test_a_pooler_is_known_by_its_port(self, url, pooled):
        """PgBouncer's own port gives it away where no setting says so."""
        settings = DatabaseSettings(url=url)

        assert is_pooled(settings, engine_for(settings)) is pooled

    def test_through_a_pooler_the_transaction_holds_the_lock(self, directory, on_postgresql, caplog):
        """A session's lock would stay behind on a connection of the pooler's; the remedy is told."""
        settings = DatabaseSettings.model_validate({"url": on_postgresql, "ssl": "off", "pooler": "pgbouncer"})
        release = hold(on_postgresql)
        try:
            with pytest.raises(MigrationError, match="another process"):
                command.upgrade(configured(directory, on_postgresql, settings=settings, lock_timeout=0), "head")
        finally:
            release()

        command.upgrade(configured(directory, on_postgresql, settings=settings, lock_timeout=0), "head")

        assert version(on_postgresql) == ["0002"]
        assert any("DATABASE_MIGRATIONS_URL" in line for line in caplog.messages)
        assert sql(on_postgresql, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [0]


class TestReadiness:
    @pytest.fixture
    async def at(self, directory, on_sqlite):
        """Return a function that migrates to a revision and runs the check for a release with some of the scripts."""
        engine = create_engine(DatabaseSettings(url=on_sqlite))

        async def run(revision: str | None, **settings: str) -> None:
            if revision is not None:
                command.upgrade(configured(directory, on_sqlite), revision)
            section = DatabaseSettings(url=on_sqlite, migrations_config=str(directory / "alembic.ini"), **settings)
            if revision == "0002" and settings.get("migrations") == "fail":  # the release before
                (directory / "migrations" / "versions" / "0002_step.py").unlink()
            await migrations_check(engine, section)()

        yield run
        await engine.dispose()

    async def test_the_newest_passes(self, at):
        """A database that has what the release needs is ready."""
        await at("head")

    @pytest.mark.parametrize("revision", [None, "0001"])
    async def test_pending_ones_fail(self, at, revision, caplog):
        """A release does not get traffic on a schema that it was not made for; the log says which it needs."""
        with pytest.raises(MigrationError, match="and this release needs 0002"):
            await at(revision)

        assert [line.partition(",")[2] for line in caplog.messages if "the database is at" in line] == [
            " and this release needs 0002"
        ]

    async def test_pending_ones_warn_if_that_is_asked_for(self, at):
        """DATABASE_MIGRATIONS=warn leaves the decision to whoever reads the warning."""
        with pytest.raises(CheckWarning, match="the state before the first migration"):
            await at(None, migrations="warn")

    async def test_ahead_passes(self, at):
        """A release that was rolled back serves on the schema of the newer one."""
        await at("0002", migrations="fail")

    def test_the_app_adds_it_where_it_knows_the_scripts(self, directory, on_sqlite):
        """DATABASE_MIGRATIONS_CONFIG makes /ready 503 until the migrations have run; the app itself runs none."""
        database = {"url": on_sqlite, "migrations_config": str(directory / "alembic.ini")}
        settings = Settings(environment="test", database=database, health={"details": True, "cache": 0}, log=None)

        with TestClient(create_app(settings)) as client:
            before = client.get("/ready")
            command.upgrade(configured(directory, on_sqlite), "head")
            after = client.get("/ready")

        assert before.status_code == 503
        assert before.json()["checks"]["migrations"][0]["status"] == "fail"
        assert after.status_code == 200

    @pytest.mark.parametrize("more", [{}, {"migrations": "off", "migrations_config": "nowhere.ini"}])
    def test_without_scripts_or_switched_off_it_is_left_out(self, more):
        """Nothing is read then."""
        settings = DatabaseSettings(url="sqlite://", **more)
        database = cast("Any", Pieces())

        assert list(readiness_checks(database, settings)) == ["database"]

    @pytest.mark.parametrize("location", [None, "nowhere"])
    def test_scripts_that_cannot_be_found(self, tmp_path, location):
        """It is said when the app is made, with the name of the setting or the file."""
        ini = tmp_path / "alembic.ini"
        if location is not None:
            ini.write_text(f"[alembic]\nscript_location = {location}\n")
        settings = DatabaseSettings(url="sqlite://", migrations_config=str(ini))

        with pytest.raises(ConfigurationError, match=r"alembic\.ini|DATABASE_MIGRATIONS_CONFIG"):
            migrations_check(cast("Any", None), settings)

    def test_the_search_path_of_modules_stays(self, directory, on_sqlite):
        """`prepend_sys_path` is meant for a process that migrates, not for the service."""
        ini = directory / "alembic.ini"
        ini.write_text(f"{ini.read_text()}prepend_sys_path = %(here)s\n")
        before = list(sys.path)

        migrations_check(cast("Any", None), DatabaseSettings(url=on_sqlite, migrations_config=str(ini)))

        assert sys.path == before


class Pieces:
    """As much of a Database as the list of checks looks at."""

    engine = None

    async def check(self) -> None: ...


def deploy(directory: Path, url: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fastapi_prodkit", "db", "upgrade"],
            cwd=directory,
            env=environment(url),
            stdout=file,
            stderr=file,
        )


def await_in(outputs: list[Path], text: str, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(text in output.read_text() for output in outputs):
        ended = [process.poll() for process in processes]
        assert ended == [None] * len(processes), [output.read_text() for output in outputs]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def hold(url: str) -> Any:
    """Take the lock as a maintenance script would, and return what lets go of it."""
    loop = asyncio.new_event_loop()
    engine = create_engine(DatabaseSettings(url=url, ssl="off"))

    async def take() -> Any:
        connection = await engine.connect()
        await connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK})"))
        await connection.commit()
        return connection

    connection = loop.run_until_complete(take())

    def release() -> None:
        loop.run_until_complete(connection.close())
        loop.run_until_complete(engine.dispose())
        loop.close()

    return release
