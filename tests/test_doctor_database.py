"""`fastapi-prodkit doctor` on databases: rules about settings, and facts from a real PostgreSQL."""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import REMOTE, SECRET, gathered, ids, in_order  # noqa: F401 - a fixture
from migrating import project, sql
from postgres import postgres_or_skip

from fastapi_prodkit.cli.doctor.database_probe import ask
from fastapi_prodkit.cli.doctor.examination import gather
from fastapi_prodkit.cli.doctor.facts import Server
from fastapi_prodkit.sections import DatabaseSettings

REASON = "needs the extra: pip install 'fastapi-prodkit[database]'"
pytestmark = pytest.mark.usefixtures("in_order")


class TestSettings:
    @pytest.mark.parametrize(
        ("expected", "fault"),
        [
            ("database-tls", {"DATABASE_SSL": "require"}),
            ("database-tls", {"DATABASE_SSL": "require", "DATABASE_READ_URL": REMOTE}),
            ("database-pooler", {"DATABASE_URL": REMOTE.replace(".com/", ".com:6432/")}),
            ("database-timeout-off", {"DATABASE_STATEMENT_TIMEOUT": "none"}),
            ("database-pool-timeout", {"DATABASE_POOL_TIMEOUT": "20"}),
            ("database-sqlite", {"DATABASE_URL": "sqlite:////data/orders.db"}),
        ],
    )
    def test_problem_in_the_settings_has_one_finding(self, monkeypatch, expected, fault):
        """Without a connection."""
        pytest.importorskip("sqlalchemy", reason=REASON)
        for name, value in {"DATABASE_URL": REMOTE, **fault}.items():
            monkeypatch.setenv(name, value)

        assert ids(gathered()) == {expected}

    @pytest.mark.parametrize(
        "sound",
        [
            {},
            {"DATABASE_SSL": "require", "DATABASE_URL": f"{REMOTE}?sslmode=verify-full"},
            {"DATABASE_SSL": "require", "DATABASE_URL": REMOTE.replace("db.example.com", "127.0.0.1")},
            {"DATABASE_URL": REMOTE.replace(".com/", ".com:6432/"), "DATABASE_POOLER": "pgbouncer"},
            {"DATABASE_STATEMENT_TIMEOUT": "none", "DATABASE_POOLER": "pgbouncer"},
            {"LIMITS_ENABLED": "true", "DATABASE_POOL_TIMEOUT": "19"},
        ],
    )
    def test_safe_settings_have_no_findings(self, monkeypatch, sound):
        """Safe database settings, with or without a pooler, cause no finding of the doctor."""
        pytest.importorskip("sqlalchemy", reason=REASON)
        for name, value in {"DATABASE_URL": REMOTE, **sound}.items():
            monkeypatch.setenv(name, value)

        assert ids(gathered()) == set()

    @pytest.mark.parametrize(
        ("server", "expected"),
        [
            (Server(failure="it is down"), {"database-unreachable"}),
            (Server(allowed=9), {"database-pool"}),
            (Server(allowed=10), {"database-pool-rollout"}),
            (Server(allowed=19), {"database-pool-rollout"}),
            (Server(allowed=20), set()),
            (Server(superuser=True), {"database-superuser"}),
            (Server(pending="the database is at 1, and this release needs 2"), {"database-migrations-pending"}),
            (Server(), set()),
        ],
    )
    def test_pool_is_compared_with_the_limit_of_the_server(self, monkeypatch, server, expected):
        """For one container, and for two during a deployment."""
        pytest.importorskip("sqlalchemy", reason=REASON)
        monkeypatch.setenv("DATABASE_URL", REMOTE)

        assert ids(replace(gathered(), server=server)) == expected

    def test_migrations_that_ready_does_not_check_are_found(self, monkeypatch):
        """An alembic.ini causes a finding unless DATABASE_MIGRATIONS_CONFIG names the file."""
        monkeypatch.setenv("DATABASE_URL", REMOTE)
        Path("alembic.ini").touch()
        before = ids(gathered())
        monkeypatch.setenv("DATABASE_MIGRATIONS_CONFIG", "alembic.ini")

        after = ids(gathered())

        assert (before, after) == ({"database-migrations-unwatched"}, set())

    def test_missing_extra_is_reported_by_the_probe(self, monkeypatch):
        """Rules about the URL have no findings."""
        monkeypatch.setenv("DATABASE_URL", REMOTE)
        monkeypatch.setitem(sys.modules, "sqlalchemy", None)
        for name in [name for name in sys.modules if name.startswith("fastapi_prodkit.database")]:
            monkeypatch.delitem(sys.modules, name)

        facts = gather(None, environment="prod", factory=False, timeout=1)

        assert "fastapi-prodkit[database]" in facts.server.failure
        assert ids(replace(facts, container=None, installed={}, tracked=())) == {"database-unreachable"}


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("sqlalchemy", reason=REASON)
    pytest.importorskip("alembic", reason=REASON)
    with postgres_or_skip() as server:
        yield server


def settings_of(url, **options):
    return DatabaseSettings.model_validate({"url": url, "ssl": "off", **options})


class TestAsking:
    def test_superuser_is_found(self, server):
        """The database probe reports a superuser role and the number of connections that the server allows."""
        said = ask(settings_of(server.url()), 20)

        assert said == Server(allowed=97, superuser=True)

    def test_limit_of_the_role_counts(self, server):
        """If it is lower than the server's."""
        sql(server.url(), f"CREATE ROLE orders LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 7")

        said = ask(settings_of(f"postgresql://orders:{quote(SECRET)}@127.0.0.1:{server.port}/postgres"), 20)

        assert said == Server(allowed=7, superuser=False)

    def test_pending_migrations_are_found(self, server, tmp_path):
        """With scripts in the default place, or where the settings say; a warning too."""
        Path("orders").mkdir()
        config = project(tmp_path / "orders") / "alembic.ini"
        named = ask(settings_of(server.url(), migrations_config=str(config), migrations="warn"), 20)
        project(tmp_path / "here")
        Path("alembic.ini").write_text((tmp_path / "here" / "alembic.ini").read_text().replace("%(here)s", "here"))

        found = ask(settings_of(server.url()), 20)

        assert named.pending == found.pending
        assert found.pending == "the database is at the state before the first migration, and this release needs 0002"

    def test_migrated_database_has_no_finding(self, server, tmp_path):
        """A database at the latest migration of the project has neither a pending migration nor a failure."""
        config = project(tmp_path / "orders") / "alembic.ini"
        sql(server.url(), "CREATE DATABASE migrated")
        sql(server.url("migrated"), "CREATE TABLE alembic_version AS SELECT '0002'::varchar AS version_num")

        said = ask(settings_of(server.url("migrated"), migrations_config=str(config)), 20)

        assert said.pending is None
        assert said.failure is None

    def test_sqlite_has_no_roles_and_connections(self, tmp_path):
        """The database probe reports neither a superuser nor a connection limit for SQLite."""
        pytest.importorskip("aiosqlite", reason=REASON)

        assert ask(settings_of(f"sqlite:///{tmp_path}/orders.db"), 20) == Server()

    def test_database_that_is_down_is_a_finding(self):
        """With the reason, without the password."""
        pytest.importorskip("asyncpg", reason=REASON)

        said = ask(settings_of(f"postgresql://orders:{SECRET}@127.0.0.1:1/orders"), 20)

        assert said.failure.startswith("cannot connect to the database: ")
        assert SECRET not in said.failure

    def test_silent_database_is_a_finding_after_the_time_out(self):
        """The probe of a database that never answers fails at the time-out, so the doctor does not hang."""
        pytest.importorskip("asyncpg", reason=REASON)
        begun = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]

            said = ask(settings_of(f"postgresql://orders:{SECRET}@127.0.0.1:{port}/orders"), 0.5)

        assert said.failure is not None
        assert time.monotonic() - begun < 15

    def test_invalid_url_is_the_reason_of_the_probe(self):
        """For an invalid DATABASE_URL the database probe returns the validation message as its failure."""
        pytest.importorskip("sqlalchemy", reason=REASON)

        said = ask(settings_of("mysql://db.example.com/orders"), 20)

        assert said.failure.startswith("DATABASE_URL must begin with one of postgresql://")

    def test_examination_reads_settings_and_database(self, server, monkeypatch):
        """gather reads the settings and probes the database server, so the database rules see both."""
        monkeypatch.setenv("DATABASE_URL", server.url())
        monkeypatch.setenv("DATABASE_POOL_SIZE", "98")
        monkeypatch.setenv("DATABASE_SSL", "off")

        facts = gather(None, environment="prod", factory=False, timeout=20)

        assert {"database-pool", "database-superuser"} <= ids(facts)
