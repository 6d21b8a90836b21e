"""A service for each test, on a copy of a database that was migrated and loaded once."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import airportsdata
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from fastapi_prodkit import testing  # fastapi-prodkit new: auth
from fastapi_prodkit.testing import Databases, postgresql_url  # fastapi-prodkit new: postgresql

from service import load, migrate
from service.application import build
from service.config import ServiceSettings


def settings_for(url: str) -> ServiceSettings:
    return ServiceSettings(
        environment="test",
        database={"url": url, "ssl": "off"},
        auth={"secret": "for-tests-whose-callers-have-no-real-tokens"},  # fastapi-prodkit new: auth
        rate_limit={"default": "1000000/minute"},
        log=None,
    )


# fastapi-prodkit new: auth
client_as, headers_as = testing.client_as, testing.headers_as  # the plugin's fixtures


# fastapi-prodkit new: end
@pytest.fixture(scope="session")
def world() -> dict[str, airportsdata.Airport]:
    """Every airport by ICAO code, from the package."""
    return airportsdata.load()


@pytest.fixture(scope="session")
def loaded_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with all migrations and all airports; copy it, do not write to it."""
    path = tmp_path_factory.mktemp("database") / "service.sqlite3"
    settings = settings_for(f"sqlite:///{path}")
    migrate.upgrade(settings)
    asyncio.run(load.main(settings))
    return path


# fastapi-prodkit new: postgresql
__all__ = ["postgresql_url"]  # the plugin's fixture


@pytest.fixture(scope="session")
def loaded_postgresql(postgresql_url: str) -> Iterator[str]:
    """The URL of the same database in PostgreSQL, to be copied; do not connect to it."""
    with Databases(postgresql_url).temporary() as url:
        settings = settings_for(url)
        migrate.upgrade(settings)
        asyncio.run(load.main(settings))
        yield url


# fastapi-prodkit new: end
@pytest.fixture
def sqlite(loaded_database: Path, tmp_path: Path) -> ServiceSettings:
    """Settings with a loaded SQLite database for one test."""
    return settings_for(f"sqlite:///{shutil.copy(loaded_database, tmp_path)}")


# fastapi-prodkit new: postgresql
@pytest.fixture
def postgresql(postgresql_url: str, loaded_postgresql: str) -> Iterator[ServiceSettings]:
    """Settings with a loaded PostgreSQL database for one test."""
    with Databases(postgresql_url).temporary(template=loaded_postgresql) as url:
        yield settings_for(url)


# fastapi-prodkit new: end
@pytest.fixture(
    params=[
        "sqlite",
        "postgresql",  # fastapi-prodkit new: postgresql
    ]
)
def settings(request: pytest.FixtureRequest) -> ServiceSettings:
    """Settings with a loaded database; tests that use them run on each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def read_sqlite(loaded_database: Path) -> ServiceSettings:
    """Settings with the loaded SQLite database itself."""
    return settings_for(f"sqlite:///{loaded_database}")


# fastapi-prodkit new: postgresql
@pytest.fixture(scope="module")
def read_postgresql(postgresql_url: str, loaded_postgresql: str) -> Iterator[ServiceSettings]:
    """Settings with a loaded PostgreSQL database for the tests of one module."""
    with Databases(postgresql_url).temporary(template=loaded_postgresql) as url:
        yield settings_for(url)


# fastapi-prodkit new: end
@pytest.fixture(
    scope="module",
    params=[
        "sqlite",
        "postgresql",  # fastapi-prodkit new: postgresql
    ],
)
def reader(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    """A client of one service for all reading tests of a module, on each kind of database."""
    with TestClient(build(request.getfixturevalue(f"read_{request.param}"))) as client:
        yield client


@pytest.fixture
def app(settings: ServiceSettings) -> FastAPI:
    return build(settings)


@pytest.fixture
def client(
    app: FastAPI,
    headers_as: testing.HeadersAs,  # fastapi-prodkit new: auth
) -> Iterator[TestClient]:
    """A client that may write reports."""
    with TestClient(app) as client:
        client.headers.update(headers_as("alice", roles=["reporter"]))  # fastapi-prodkit new: auth
        yield client
