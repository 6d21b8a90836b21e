"""Migrations, loading, and readiness before and after them."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy.exc import StatementError

from service import load, migrate
from service.application import build
from service.config import ServiceSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of an empty database."""
    return tmp_path / "empty.sqlite3"


@pytest.fixture
def settings(sqlite: ServiceSettings, path: Path) -> ServiceSettings:
    database = sqlite.database.model_validate({"url": f"sqlite:///{path}"})
    return sqlite.model_copy(update={"database": database})


def sql(path: Path, *statements: str) -> list[tuple]:
    """Run statements on another connection; return the last result."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def tables(path: Path) -> set[str]:
    return {name for (name,) in sql(path, "select name from sqlite_master where type = 'table'")}


def count(path: Path) -> int:
    return sql(path, "select count(*) from airports")[0][0]


def test_models_agree_with_the_migrations(settings):
    """Alembic's check finds no difference between the models and the migrated database."""
    migrate.upgrade(settings)

    command.check(migrate.alembic_config(settings))


def test_migrations_run_up_and_down(settings, path):
    """Every migration can be downgraded, and the database can be upgraded again afterwards."""
    config = migrate.alembic_config(settings)

    command.upgrade(config, "head")
    assert tables(path) == {"airports", "reports", "alembic_version"}
    command.downgrade(config, "base")
    assert tables(path) == {"alembic_version"}
    command.upgrade(config, "head")
    assert tables(path) == {"airports", "reports", "alembic_version"}


def test_migrating_twice_changes_nothing(settings, path):
    """A second upgrade succeeds and leaves the tables as they are, so a deployment may repeat the step."""
    migrate.upgrade(settings)

    migrate.upgrade(settings)

    assert tables(path) == {"airports", "reports", "alembic_version"}


async def test_migrations_run_under_a_running_event_loop(settings, path):
    """The function `migrate.upgrade` can be called from a coroutine, such as an async test."""
    migrate.upgrade(settings)

    assert "airports" in tables(path)


def test_migrating_does_not_change_logging(settings):
    """Migrations leave existing loggers enabled, and the root logger's handlers and level unchanged."""
    logger = logging.getLogger("existed.before")
    before = (list(logging.root.handlers), logging.root.level)

    migrate.upgrade(settings)

    assert not logger.disabled
    assert (list(logging.root.handlers), logging.root.level) == before


def test_app_never_migrates(settings, path):
    """Without the migration step it is not ready."""
    with TestClient(build(settings)) as client:
        health, ready = client.get("/health"), client.get("/ready")

    assert health.status_code == 200
    assert (ready.status_code, ready.json()["status"]) == (503, "fail")
    assert tables(path) == set()


def test_readiness_fails_with_pending_migrations(settings, path):
    """With the path of alembic.ini, as in .env.example."""
    ini = migrate.alembic_config(settings).config_file_name
    database = settings.database.model_copy(update={"migrations_config": ini})
    settings = settings.model_copy(update={"database": database})

    with TestClient(build(settings)) as client:
        before = client.get("/ready").json()["checks"]
    migrate.upgrade(settings)
    with TestClient(build(settings)) as client:
        after = client.get("/ready").json()["checks"]

    assert before["migrations"][0]["status"] == "fail"
    assert after["migrations"][0]["status"] == "pass"


def test_empty_table_is_a_warning(settings):
    """Readiness answers 200 with status `warn` and the command to run if no airports are loaded."""
    migrate.upgrade(settings)

    with TestClient(build(settings)) as client:
        ready = client.get("/ready")

    assert (ready.status_code, ready.json()["status"]) == (200, "warn")
    assert ready.json()["checks"]["airports"][0]["output"] == "no airports; run python -m service.load"


def test_second_load_updates_airports_and_keeps_reports(settings, path, world, capsys):
    """A second load restores changed and deleted airports, adds no duplicates, and keeps the reports."""
    migrate.upgrade(settings)
    asyncio.run(load.main(settings))
    sql(
        path,
        "update airports set name = 'Nowhere', iata = 'XXX' where icao = 'EDDF'",
        "delete from airports where icao = 'EDDH'",
        "insert into reports (airport, visited_on, rating, comment, created_at) "
        "values ('EDDF', '2025-05-04', 4, 'Good.', '2025-05-05 06:07:08')",
    )

    asyncio.run(load.main(settings))

    assert count(path) == len(world)
    assert f"Loaded {len(world):,} of {len(world):,} airports" in capsys.readouterr().out
    with TestClient(build(settings)) as client:
        assert client.get("/v1/airports/FRA").json()["name"] == "Frankfurt am Main International Airport"
        assert client.get("/v1/airports/EDDH").status_code == 200
        assert client.get("/v1/reports").json()["items"][0]["created_at"] == "2025-05-05T06:07:08Z"


def test_failed_load_is_rolled_back(settings, path, monkeypatch):
    """A load that fails at one airport stores none, so that readers never see a partial list."""
    migrate.upgrade(settings)
    whole = load.row
    spoilt = {"icao": "EDDF", "name": None}
    monkeypatch.setattr(load, "row", lambda airport: spoilt if airport["icao"] == "ZYYY" else whole(airport))

    with pytest.raises(StatementError):
        asyncio.run(load.main(settings))

    assert count(path) == 0
