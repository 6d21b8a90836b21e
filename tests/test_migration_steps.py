"""Migrations while a service uses the tables: time-outs of locks, and repetitions."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from migrating import INDEX, configured, migration, project, sql, transaction, version
from postgres import Server

from fastapi_prodkit.exceptions import MigrationError
from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from alembic import command
from sqlalchemy.exc import DBAPIError

from fastapi_prodkit.database import migration_steps

READER = "SELECT * FROM items"
TWO_STATEMENTS = 'op.create_table("parts", sa.Column("id", sa.Integer()))\nop.execute("ALTER TABLE items ADD size int")'
UNIQUE_INDEX = INDEX.replace('"items", ["name"]', '"items", ["name"], unique=True')


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    sql(server.url(), f"CREATE DATABASE {name} STRATEGY file_copy")
    yield server.url(name)
    sql(server.url(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return project(tmp_path / "project")


@pytest.fixture
def upgrade(directory, url):
    """Return a function that migrates with a short lock time-out."""

    def run(revision="head", **settings):
        changes = {"migrations_statement_lock_timeout": 0.05, **settings}
        section = DatabaseSettings.model_validate({"url": url, "ssl": "off", **changes})
        command.upgrade(configured(directory, url, settings=section), revision)

    return run


@pytest.fixture
def begin(url):
    """Return a function that opens a transaction of another client, and returns a function that ends it."""
    ends = []

    def run(*statements):
        end = transaction(url, *statements)
        ends.append(end)

        def once():
            ends.remove(end)
            end()

        return once

    yield run
    for end in ends:
        end()


class Clock:
    """A clock that only pauses advance; each pause runs one of the actions in another thread."""

    def __init__(self):
        self.pauses = []
        self.actions = []

    def monotonic(self):
        return 100.0 + sum(self.pauses)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        with ThreadPoolExecutor(max_workers=1) as thread:  # where no event loop runs
            thread.submit(self.actions.pop(0)).result()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(migration_steps, "time", clock)
    return clock


class TestRepetition:
    def test_revision_without_a_lock_is_rolled_back_and_repeated(self, directory, url, upgrade, clock, caplog, begin):
        """In the pause it holds no lock."""
        upgrade()
        migration(directory, "0003", TWO_STATEMENTS)
        end = begin(READER)
        seen = []

        def look():
            seen.append(sql(url, READER, "SELECT to_regclass('parts')"))

        clock.actions += [look, look, end]
        upgrade()

        assert version(url) == ["0003"]
        assert seen == [[None], [None]]
        first, second, third = clock.pauses
        assert (0.5 <= first <= 1, 1 <= second <= 2, 2 <= third <= 4) == (True, True, True)
        said = [line for line in caplog.messages if "runs again in" in line]
        assert len(said) == 3
        assert said[0].startswith("0003 did not get a lock in time: ALTER TABLE items ADD size int. It is rolled back ")

    def test_each_revision_is_repeated_alone(self, directory, url, upgrade, clock, begin):
        """Earlier revisions stay committed; `+2` counts from the start of the run."""
        migration(directory, "0003", TWO_STATEMENTS)
        upgrade("0001")
        end = begin(READER)
        migration(directory, "0002", 'op.create_table("shops", sa.Column("id", sa.Integer()))')
        migration(directory, "0003", TWO_STATEMENTS)
        migration(directory, "0004", "pass")
        seen = []

        def look():
            seen.append(version(url))
            end()

        clock.actions.append(look)
        upgrade("+2")

        assert seen == [["0002"]]
        assert version(url) == ["0003"]

    def test_downgrade_is_repeated(self, directory, url, upgrade, clock, begin):
        """`-1` reverts one revision at any attempt."""
        upgrade()
        clock.actions.append(begin(READER))
        section = DatabaseSettings(url=url, ssl="off", migrations_statement_lock_timeout=0.05)

        command.downgrade(configured(directory, url, settings=section), "-1")

        assert len(clock.pauses) == 1
        assert version(url) == ["0001"]

    def test_deadlock_is_repeated(self, directory, url, upgrade, clock, caplog):
        """A revision that ends in a deadlock is repeated, because PostgreSQL has rolled its transaction back."""
        once = "IF nextval(''attempts'') = 1 THEN RAISE ''deadlock'' USING ERRCODE = ''40P01''; END IF;"
        sql(url, "CREATE SEQUENCE attempts")
        migration(directory, "0003", f"""op.execute("DO 'BEGIN {once} END'")""")

        clock.actions.append(lambda: None)
        upgrade()

        assert version(url) == ["0003"]
        assert any(line.startswith("0003 was in a deadlock: DO ") for line in caplog.messages)

    def test_repetition_ends_after_its_time(self, directory, url, upgrade, clock, begin):
        """The error names the statement and where to look."""
        upgrade()
        migration(directory, "0003", TWO_STATEMENTS)
        begin(READER)
        clock.actions += [lambda: None] * 3

        with pytest.raises(MigrationError) as caught:
            upgrade(migrations_retry_for=2.0)

        assert sum(clock.pauses) == pytest.approx(2.0)
        assert str(caught.value) == (
            "0003 did not get a lock in time: ALTER TABLE items ADD size int. It is rolled back. It was tried for "
            "2 s: look for transactions that stay open in pg_stat_activity, and run it again."
        )
        assert version(url) == ["0002"]
        assert sql(url, "SELECT to_regclass('parts')") == [None]

    def test_other_errors_are_not_repeated(self, directory, url, upgrade):
        """Nor a lost connection."""
        migration(directory, "0003", 'op.execute("SELECT pg_terminate_backend(pg_backend_pid())")')

        with pytest.raises(DBAPIError) as caught:
            upgrade()

        assert caught.value.connection_invalidated
        assert version(url) == ["0002"]

    def test_pooler_repeats_all_revisions(self, directory, url, upgrade, clock, begin):
        """One transaction holds the lock between two runs."""
        upgrade("0001")
        migration(directory, "0003", TWO_STATEMENTS)
        end = begin(READER)

        clock.actions.append(end)
        upgrade(pooler="pgbouncer")

        assert version(url) == ["0003"]

    def test_command_counts_a_repeated_revision_once(self, directory, url, clock, begin, monkeypatch, capsys):
        """Each attempt is shown."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        from fastapi_prodkit.cli import main

        command.upgrade(configured(directory, url), "0001")
        monkeypatch.chdir(directory)
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("DATABASE_SSL", "off")
        clock.actions.append(begin(READER))

        code = main(["db", "upgrade", "--statement-lock-timeout", "0.05"])

        said = capsys.readouterr().err.splitlines()
        assert code == 0
        assert said.count("Running upgrade 0001 -> 0002") == 2
        assert "0002 did not get a lock in time: ALTER TABLE items ADD COLUMN name VARCHAR(50)." in said[1]
        assert said[-1].startswith("Done: 1 migration in ")

    def test_run_without_revisions_creates_the_version_table(self, directory, url):
        """As `alembic ensure_version` does."""
        command.ensure_version(configured(directory, url))

        assert version(url) == []

    def test_two_databases_in_one_env_py_have_separate_revisions(self, directory, url, server):
        """Each call of `run_migrations` in env.py migrates its own database from the revision of that database."""
        name = f"test_{uuid4().hex}"
        sql(server.url(), f"CREATE DATABASE {name} STRATEGY file_copy")
        env = directory / "migrations" / "env.py"
        first, second = (f"{{'url': {each!r}, 'ssl': 'off'}}" for each in (url, server.url(name)))
        body = env.read_text().replace("run_migrations(context, metadata)", "")
        body += "from fastapi_prodkit.sections import DatabaseSettings as Settings\n"
        body += f"for each in ({first}, {second}):\n    run_migrations(context, metadata, Settings(**each))\n"
        env.write_text(body)
        try:
            command.upgrade(configured(directory, url, settings=None), "head")

            assert [version(url), version(server.url(name))] == [["0002"], ["0002"]]
        finally:
            sql(server.url(), f"DROP DATABASE {name} WITH (FORCE)")


class TestPartialRevision:
    def test_autocommit_block_is_not_repeated(self, directory, url, upgrade, begin):
        """The error has the statement, the invalid index, and the remedy."""
        upgrade()
        migration(directory, "0003", INDEX)
        end = begin("INSERT INTO items VALUES (1)")

        with pytest.raises(MigrationError) as caught:
            upgrade()
        end()

        assert str(caught.value) == (
            "0003 did not get a lock in time: CREATE INDEX CONCURRENTLY IF NOT EXISTS items_name ON items (name). "
            "A part of 0003 is committed, as an autocommit block does, so it is not repeated. The index items_name is "
            "INVALID: DROP INDEX CONCURRENTLY items_name. Undo its other changes, and run it again, with a longer "
            "--statement-lock-timeout if transactions last longer."
        )
        assert version(url) == ["0002"]
        sql(url, "DROP INDEX CONCURRENTLY items_name")
        upgrade()
        assert version(url) == ["0003"]

    def test_revision_is_repeated_before_its_autocommit_block(self, directory, url, upgrade, clock, begin):
        """A lock time-out before the autocommit block rolls the revision back, so the revision can be repeated."""
        upgrade()
        migration(directory, "0003", f'op.execute("ALTER TABLE items ADD size int")\n{INDEX}')
        end = begin(READER)

        clock.actions.append(end)
        upgrade()

        assert version(url) == ["0003"]

    def test_only_commits_of_the_failed_attempt_count(self, directory, url, upgrade, clock, begin):
        """A revision is repeated after an attempt without commits, but not after one that committed a part."""
        upgrade()
        migration(directory, "0003", f'op.execute("ALTER TABLE items ADD size int")\n{INDEX}')
        end = begin(READER)

        def write():
            end()
            begin("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1")  # CONCURRENTLY waits for its snapshot

        clock.actions.append(write)
        with pytest.raises(MigrationError, match="The index items_name is INVALID"):
            upgrade()

        assert len(clock.pauses) == 1

    @pytest.mark.parametrize("after", [READER, "ALTER TABLE items ADD size int"])
    def test_revision_with_a_commit_is_not_repeated(self, directory, url, upgrade, after, begin):
        """PostgreSQL reports what is committed."""
        upgrade()
        migration(directory, "0003", f'op.execute("COMMIT")\nop.execute("{after}")\nop.execute("DROP TABLE items")')
        begin("INSERT INTO items VALUES (1)")

        with pytest.raises(MigrationError, match=r"A part of 0003 is committed.* Undo its other changes"):
            upgrade()

    def test_other_errors_log_an_invalid_index(self, directory, url, upgrade, caplog):
        """A failed unique index keeps its database error, and a log line names the INVALID index to drop."""
        upgrade()
        sql(url, "INSERT INTO items VALUES (1, 'saw'), (2, 'saw')")
        migration(directory, "0003", UNIQUE_INDEX)

        with pytest.raises(DBAPIError, match="could not create unique index"):
            upgrade()

        assert [line.partition("INVALID")[2] for line in caplog.messages if "A part of 0003 is committed" in line] == [
            ": DROP INDEX CONCURRENTLY items_name. Undo its other changes, and run it again."
        ]


class TestTimeouts:
    SHOW = (
        "row = op.get_bind().execute(sa.text(\"SELECT current_setting('lock_timeout'), "
        "current_setting('statement_timeout')\")).one()\n"
        "op.get_context().config.attributes['seen'].append(tuple(row))"
    )
    IN_A_BLOCK = f"with op.get_context().autocommit_block():\n    {SHOW.replace(chr(10), chr(10) + '    ')}"

    @pytest.mark.parametrize(
        ("settings", "attributes", "shown"),
        [
            ({}, {}, "2s"),
            ({"migrations_statement_lock_timeout": 0.0001}, {}, "1ms"),
            ({"migrations_statement_lock_timeout": "none"}, {}, "0"),
            ({}, {"statement_lock_timeout": 4.5}, "4500ms"),
            ({}, {"statement_lock_timeout": 0}, "0"),
            ({"lock_timeout": 7}, {}, "2s"),
        ],
    )
    def test_every_statement_has_the_time_outs(self, directory, url, settings, attributes, shown):
        """In an autocommit block, and after a revision that has changed them."""
        migration(directory, "0003", f'{self.IN_A_BLOCK}\n{self.SHOW}\nop.execute("SET lock_timeout = 77")')
        migration(directory, "0004", f'{self.SHOW}\nop.execute("SET statement_timeout = 5000")\n{self.IN_A_BLOCK}')
        section = DatabaseSettings.model_validate({"url": url, "ssl": "off", **settings})
        seen: list[tuple[str, str]] = []

        command.upgrade(configured(directory, url, settings=section, seen=seen, **attributes), "head")

        assert seen == [(shown, "0")] * 4

    def test_time_outs_of_url_and_role_do_not_apply(self, directory, url):
        """Migrations use their own time-outs instead of those in the URL and of the database."""
        role = f"ALTER DATABASE {url.rpartition('/')[2]} SET statement_timeout = 9000"
        migration(directory, "0003", self.SHOW)
        sql(url, role)
        seen: list[tuple[str, str]] = []
        section = DatabaseSettings(url=f"{url}?options=-c%20lock_timeout%3D9000", ssl="off")

        command.upgrade(configured(directory, url, settings=section, seen=seen), "head")

        assert seen == [("2s", "0")]

    def test_pooler_sets_time_outs_for_the_transaction(self, directory, url):
        """With a pooler, time-outs are set per transaction, so the connection returned to the pool keeps none."""
        migration(directory, "0003", f"{self.SHOW}\n{self.IN_A_BLOCK}")
        section = DatabaseSettings.model_validate({"url": url, "ssl": "off", "pooler": "pgbouncer"})
        seen: list[tuple[str, str]] = []

        command.upgrade(configured(directory, url, settings=section, seen=seen), "head")

        assert seen == [("2s", "0"), ("0", "0")]


@pytest.mark.system
def test_waiting_migration_does_not_block_readers(directory, url, upgrade, monkeypatch, begin):
    """Readers are not blocked while a migration waits for the lock that an open transaction holds."""
    upgrade()
    migration(directory, "0003", TWO_STATEMENTS)
    monkeypatch.setattr(migration_steps, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(migration_steps, "_LONGEST_PAUSE", 0.02)
    end = begin(READER)
    migrating = threading.Thread(target=upgrade)
    migrating.start()
    try:
        for _ in range(5):
            sql(url, READER)
        waiting = migrating.is_alive()
    finally:
        end()
        migrating.join()

    assert waiting
    assert version(url) == ["0003"]
