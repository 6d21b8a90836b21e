"""Concurrent deployments and downgrades on PostgreSQL."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from alembic import command
from fastapi.testclient import TestClient
from fastapi_prodkit.testing import Databases

from service import load, migrate
from service.application import build

SERVICE = Path(__file__).parents[1]


def test_concurrent_deployments_migrate_once(postgresql_url, postgresql):
    """The models agree, and the migrations run down again."""
    with Databases(postgresql_url).temporary() as url:
        environment = {**os.environ, "DATABASE_URL": url, "DATABASE_SSL": "off"}
        deployments = [
            subprocess.Popen([sys.executable, "-m", "fastapi_prodkit", "db", "upgrade"], cwd=SERVICE, env=environment)
            for _ in range(2)
        ]
        ended = [deployment.wait(60) for deployment in deployments]
        database = postgresql.database.model_validate({"url": url, "ssl": "off"})
        settings = postgresql.model_copy(update={"database": database})
        config = migrate.alembic_config(settings)

        assert ended == [0, 0]
        command.check(config)
        command.downgrade(config, "base")


def test_loading_twice_changes_nothing(postgresql, world):
    """A second load into PostgreSQL succeeds, and the service is ready and returns the airports afterwards."""
    asyncio.run(load.main(postgresql))

    with TestClient(build(postgresql)) as client:
        assert client.get("/ready").json()["status"] == "pass"
        code = next(iter(world))
        assert client.get(f"/v1/airports/{code}").json()["icao"] == code
