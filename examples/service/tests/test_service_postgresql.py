"""The service on a real PostgreSQL: migrations, loading, and the queries that could differ from SQLite."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from fastapi.testclient import TestClient
from service import load, migrate
from service.application import build
from service.config import ServiceSettings

launcher = pytest.importorskip("postgres", reason="tests/postgres.py of fastapi-prodkit starts the server")

SERVICE = Path(__file__).parents[1]
VISIT = {"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "Très bien 👩‍✈️"}


@pytest.fixture(scope="module")
def server() -> Iterator[object]:
    try:
        with launcher.postgres() as server:
            yield server
    except launcher.PostgresMissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def postgresql(settings: ServiceSettings, server) -> ServiceSettings:
    database = settings.database.model_validate({"url": server.url(), "ssl": "off"})
    return settings.model_copy(update={"database": database})


def test_the_service_runs_on_postgresql(postgresql, world):
    """The same migrations, the same data, the same answers."""
    config = migrate.alembic_config(postgresql)
    environment = {**os.environ, "DATABASE_URL": postgresql.database.url.get_secret_value(), "DATABASE_SSL": "off"}
    deployments = [  # two at once: the second waits for the first
        subprocess.Popen([sys.executable, "-m", "fastapi_prodkit", "db", "upgrade"], cwd=SERVICE, env=environment)
        for _ in range(2)
    ]
    assert [deployment.wait(60) for deployment in deployments] == [0, 0]
    command.check(config)
    asyncio.run(load.main(postgresql))
    asyncio.run(load.main(postgresql))

    with TestClient(build(postgresql)) as client:
        assert client.get("/ready").json()["status"] == "pass"
        first = client.get("/v1/airports", params={"q": "sao paulo", "country": "br", "limit": 2})
        second = client.get(first.url.join(first.links["next"]["url"]))
        assert first.json()["items"][-1]["icao"] < second.json()["items"][0]["icao"]
        around = client.get("/v1/airports/nearest", params={"lat": 90, "lon": 0, "limit": 3}).json()["items"]
        assert [airport["lat"] for airport in around] == sorted((a["lat"] for a in world.values()), reverse=True)[:3]
        created = client.post("/v1/reports", json=VISIT)
        assert client.get(created.headers["location"]).json() == created.json()
        assert client.get(f"/v1/reports/{2**63 - 1}").status_code == 404
        assert client.delete(created.headers["location"]).status_code == 204

    command.downgrade(config, "base")
