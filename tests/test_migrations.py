"""Migrations: run once at a time, rolled back if they fail, and checked by readiness."""

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
    def test_migrations_run_up_down_and_up_again(self, directory, url):
        """With the async driver."""
        config = configured(directory, url)

        command.upgrade(config, "head")
        assert version(url) == ["0002"]
        command.check(config)
        command.downgrade(config, "base")
        assert version(url) == []
        command.upgrade(config, "head")
        assert version(url) == ["0002"]

    async def test_migrations_run_under_a_running_event_loop(self, directory, on_sqlite):
        """`command.upgrade` works in an async test or script, where `asyncio.run()` in env.py would fail."""
        command.upgrade(configured(directory, on_sqlite), "head")

        assert await asyncio.to_thread(version, on_sqlite) == ["0002"]

    def test_failed_migration_is_rolled_back(self, directory, url):
        """On SQLite, earlier migrations of the run too."""
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

    def test_transaction_per_migration_keeps_earlier_migrations(self, tmp_path, url):
        """The option `transaction_per_migration` reaches Alembic, so migrations before a failed one stay applied."""
        directory = project(tmp_path / "each", arguments=", transaction_per_migration=True")
        migration(directory, "0003", 'op.execute("nonsense")')

        with pytest.raises(DBAPIError):
            command.upgrade(configured(directory, url), "head")

        assert version(url) == ["0002"]

    def test_logging_is_unchanged(self, directory, on_sqlite):
        """Running migrations leaves existing loggers enabled and the root logger's handlers and level unchanged."""
        logger = logging.getLogger("existed.before")
        before = (list(logging.root.handlers), logging.root.level)

        command.upgrade(configured(directory, on_sqlite), "head")

        assert not logger.disabled
        assert (list(logging.root.handlers), logging.root.level) == before

    def test_progress_is_logged_for_each_migration(self, directory, on_sqlite, caplog):
        """A log line for each completed migration shows the progress of a long upgrade."""
        caplog.set_level(logging.INFO, "fastapi_prodkit.database.migrations")

        command.upgrade(configured(directory, on_sqlite), "head")

        assert [line.partition(" in ")[0] for line in caplog.messages] == ["0001 done", "0002 done"]

    @pytest.mark.parametrize("form", ["notice", "(notice,)"])
    def test_callbacks_of_the_project_are_kept(self, tmp_path, on_sqlite, form):
        """`on_version_apply` may be a function or several."""
        directory = project(tmp_path / "own", arguments=f", on_version_apply={form}")
        env = directory / "migrations" / "env.py"
        notice = "def notice(step, **_): context.config.attributes['seen'].append(step.up_revision_id)\n"
        env.write_text(notice + env.read_text())
        config = configured(directory, on_sqlite, seen=[])

        command.upgrade(config, "head")

        assert config.attributes["seen"] == ["0001", "0002"]

    def test_autogenerate_writes_batches_for_sqlite(self, directory, on_sqlite):
        """A migration autogenerated for SQLite uses `batch_alter_table`, because SQLite rebuilds a changed table."""
        config = configured(directory, on_sqlite)
        command.upgrade(config, "0001")
        (directory / "migrations" / "versions" / "0002_step.py").unlink()

        command.revision(config, "name", autogenerate=True)

        written = next((directory / "migrations" / "versions").glob("*_name.py")).read_text()
        assert "batch_alter_table" in written


class TestSqliteForeignKeys:
    def test_rebuilding_a_table_keeps_referring_rows(self, directory, on_sqlite):
        """With foreign keys enforced, dropping the old table would delete them."""
        command.upgrade(configured(directory, on_sqlite), "head")
        sql(
            on_sqlite,
            "CREATE TABLE parts (item INTEGER REFERENCES items (id) ON DELETE CASCADE)",
            "INSERT INTO items VALUES (1, 'saw')",
            "INSERT INTO parts VALUES (1)",
        )

        command.downgrade(configured(directory, on_sqlite), "0001")

        assert sql(on_sqlite, "SELECT item FROM parts") == [1]

    def test_migration_that_violates_foreign_keys_is_rolled_back(self, directory, on_sqlite):
        """Foreign keys are checked at the end of a migration on SQLite, and the error names both tables."""
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

    def test_autocommit_block_is_outside_any_transaction(self, directory, on_sqlite):
        """`VACUUM`, which SQLite refuses inside a transaction, works in an autocommit block."""
        migration(directory, "0003", 'with op.get_context().autocommit_block():\n    op.execute("VACUUM")')

        command.upgrade(configured(directory, on_sqlite), "head")

        assert version(on_sqlite) == ["0003"]


class TestTarget:
    def test_settings_of_env_py_are_used(self, tmp_path, on_sqlite):
        """`alembic upgrade head` uses the settings factory that env.py passes, with no other configuration."""
        arguments = f", lambda: Settings(database={{'url': {on_sqlite!r}}})"
        directory = project(tmp_path / "own", arguments=arguments)
        env = directory / "migrations" / "env.py"
        env.write_text("from fastapi_prodkit import Settings\n" + env.read_text())

        command.upgrade(alembic_config(directory / "alembic.ini"), "head")

        assert version(on_sqlite) == ["0002"]

    @pytest.mark.parametrize("driver", ["sqlite", "sqlite+pysqlite"])
    def test_url_of_alembic_ini_is_used(self, directory, on_sqlite, driver):
        """With a sync driver as well."""
        ini = directory / "alembic.ini"
        ini.write_text(f"{ini.read_text()}sqlalchemy.url = {on_sqlite.replace('sqlite', driver, 1)}\n")

        command.upgrade(alembic_config(ini), "head")

        assert version(on_sqlite) == ["0002"]

    def test_pyproject_toml_configures_migrations(self, directory, on_sqlite):
        """The section `[tool.alembic]` of pyproject.toml can replace alembic.ini."""
        (directory / "alembic.ini").unlink()
        (directory / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
        config = alembic_config(directory / "pyproject.toml")
        config.attributes["settings"] = DatabaseSettings(url=on_sqlite)

        command.upgrade(config, "head")

        assert version(on_sqlite) == ["0002"]

    def test_connection_of_the_caller_is_used(self, directory, url):
        """In its transaction."""

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

    def test_migrations_url_is_used(self, directory, on_sqlite):
        """Migrations connect to DATABASE_MIGRATIONS_URL instead of DATABASE_URL, for example to bypass a pooler."""
        settings = DatabaseSettings(url="sqlite:////nowhere/at/all.db", migrations_url=on_sqlite)

        command.upgrade(configured(directory, "unused", settings=settings), "head")

        assert version(on_sqlite) == ["0002"]

    def test_missing_database_is_an_error_with_the_remedy(self, directory):
        """A missing database setting raises a ConfigurationError that says to set DATABASE_URL."""
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
    def test_invalid_url_is_an_error_without_the_url(self, directory, url, problem):
        """The error for an invalid database URL describes the problem and contains no part of the secret URL."""
        with pytest.raises(ConfigurationError, match=problem) as caught:
            command.upgrade(configured(directory, url), "head")

        assert SECRET not in str(caught.value)
        assert caught.value.__context__ is None

    def test_sql_does_not_connect(self, directory):
        """`--sql` writes the statements for the dialect of the URL without connecting to the database."""
        config = configured(directory, f"postgres://user:{SECRET}@127.0.0.1:1/name")
        config.output_buffer = io.StringIO()

        command.upgrade(config, "head", sql=True)

        written = config.output_buffer.getvalue()
        assert written.startswith("SET lock_timeout = 2000;\n\nSET statement_timeout = 0;\n\nBEGIN;")
        assert "ADD COLUMN name VARCHAR(50)" in written
        assert written.index("BEGIN") < written.index("CREATE TABLE items") < written.index("COMMIT")
        assert SECRET not in written

    def test_sql_with_a_connection_uses_its_dialect(self, directory):
        """`--sql` with a given connection writes for the dialect of that connection and changes no table."""
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
    def test_concurrent_deployments_migrate_once(self, directory, on_postgresql):
        """CREATE INDEX CONCURRENTLY does not wait for the others."""
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
    def test_concurrent_deployments_on_sqlite_take_turns(self, directory, on_sqlite):
        """Of two concurrent `db upgrade` runs on SQLite, one applies the migrations, and both succeed."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        outputs = [directory / f"{number}.txt" for number in range(2)]

        deployments = [deploy(directory, on_sqlite, output) for output in outputs]
        codes = [deployment.wait(PATIENCE) for deployment in deployments]

        said = [output.read_text() for output in outputs]
        assert codes == [0] * 2, said
        assert sum("Done: 2 migrations" in text for text in said) == 1

    def test_wait_for_the_lock_times_out(self, directory, on_postgresql):
        """The error says where to look."""
        release = hold(on_postgresql)
        try:
            with pytest.raises(MigrationError, match=r"did not end within 1 s; see pg_locks"):
                command.upgrade(configured(directory, on_postgresql, lock_timeout=1), "head")
        finally:
            release()

        command.upgrade(configured(directory, on_postgresql, lock_timeout=0.1), "head")

    def test_current_does_not_wait_for_a_migration(self, directory, on_postgresql, capsys):
        """`alembic current` prints the revision while another process holds the migration lock."""
        command.upgrade(configured(directory, on_postgresql), "head")
        release = hold(on_postgresql)
        try:
            command.current(configured(directory, on_postgresql, lock_timeout=0))
        finally:
            release()

        assert capsys.readouterr().out == "0002 (head)\n"

    def test_lock_is_released(self, directory, on_postgresql):
        """Also on the caller's connection, and after a failure."""
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
    def test_port_of_pgbouncer_is_a_pooler(self, url, pooled):
        """A PostgreSQL URL with port 6432, PgBouncer's default, counts as pooled without an explicit setting."""
        settings = DatabaseSettings(url=url)

        assert is_pooled(settings, engine_for(settings)) is pooled

    def test_pooler_locks_per_transaction(self, directory, on_postgresql, caplog):
        """A warning names the remedy."""
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
        """Return a function that migrates to a revision, and runs the check of a release with some of the scripts."""
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

    async def test_check_passes_at_the_newest_revision(self, at):
        """The migrations check of readiness passes if the database is at the newest revision."""
        await at("head")

    @pytest.mark.parametrize("revision", [None, "0001"])
    async def test_check_fails_with_pending_migrations(self, at, revision, caplog):
        """The log names the missing revision."""
        with pytest.raises(MigrationError, match="and this release needs 0002"):
            await at(revision)

        assert [line.partition(",")[2] for line in caplog.messages if "the database is at" in line] == [
            " and this release needs 0002"
        ]

    async def test_check_warns_with_pending_migrations(self, at):
        """With DATABASE_MIGRATIONS=warn."""
        with pytest.raises(CheckWarning, match="the state before the first migration"):
            await at(None, migrations="warn")

    async def test_check_passes_ahead_of_the_release(self, at):
        """After a rollback of the release."""
        await at("0002", migrations="fail")

    def test_app_with_migrations_config_checks_readiness(self, directory, on_sqlite):
        """The app itself runs no migrations."""
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
    def test_app_without_migrations_config_has_no_check(self, more):
        """The readiness check of migrations is absent without a migrations config, or if migrations are off."""
        settings = DatabaseSettings(url="sqlite://", **more)
        database = cast("Any", Pieces())

        assert list(readiness_checks(database, settings)) == ["database"]

    @pytest.mark.parametrize("location", [None, "nowhere"])
    def test_missing_scripts_fail_when_the_app_is_created(self, tmp_path, location):
        """A missing alembic.ini or script directory raises a ConfigurationError when the app is created."""
        ini = tmp_path / "alembic.ini"
        if location is not None:
            ini.write_text(f"[alembic]\nscript_location = {location}\n")
        settings = DatabaseSettings(url="sqlite://", migrations_config=str(ini))

        with pytest.raises(ConfigurationError, match=r"alembic\.ini|DATABASE_MIGRATIONS_CONFIG"):
            migrations_check(cast("Any", None), settings)

    def test_module_search_path_is_unchanged(self, directory, on_sqlite):
        """The readiness check ignores `prepend_sys_path` of alembic.ini, which is meant for migration processes."""
        ini = directory / "alembic.ini"
        ini.write_text(f"{ini.read_text()}prepend_sys_path = %(here)s\n")
        before = list(sys.path)

        migrations_check(cast("Any", None), DatabaseSettings(url=on_sqlite, migrations_config=str(ini)))

        assert sys.path == before


class Pieces:
    """The part of a Database that the list of checks uses."""

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
    """Take the lock as a maintenance script would, and return a function that releases it."""
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
