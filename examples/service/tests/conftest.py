"""A service of its own for each test, on a copy of one database that was migrated and loaded once."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import airportsdata
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service import load, migrate
from service.application import build
from service.config import ServiceSettings


def settings_for(url: str) -> ServiceSettings:
    return ServiceSettings(
        environment="test", database={"url": url, "ssl": "off"}, rate_limit={"default": "1000000/minute"}, log=None
    )


@pytest.fixture(scope="session")
def world() -> dict[str, airportsdata.Airport]:
    """Every airport by ICAO code, from the package."""
    return airportsdata.load()


@pytest.fixture(scope="session")
def loaded_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with all migrations and all airports; copy it, do not write to it."""
    path = tmp_path_factory.mktemp("database") / "airports.sqlite3"
    settings = settings_for(f"sqlite:///{path}")
    migrate.upgrade(settings)
    asyncio.run(load.main(settings))
    return path


@pytest.fixture
def settings(loaded_database: Path, tmp_path: Path) -> ServiceSettings:
    return settings_for(f"sqlite:///{shutil.copy(loaded_database, tmp_path)}")


@pytest.fixture
def app(settings: ServiceSettings) -> FastAPI:
    return build(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client
