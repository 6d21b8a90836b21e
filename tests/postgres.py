"""A real PostgreSQL server for these tests, started as in users' tests."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fastapi_prodkit.testing.postgresql import PASSWORD, PostgresMissingError, Server, postgres

__all__ = ["PASSWORD", "PostgresMissingError", "Server", "postgres", "postgres_or_skip"]


@contextmanager
def postgres_or_skip(*, certificate: bytes | None = None, key: bytes | None = None) -> Iterator[Server]:
    """Start a server; skip the tests that need it if PostgreSQL is not installed."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgres(certificate=certificate, key=key))
        except PostgresMissingError as missing:
            pytest.skip(str(missing))
        yield server
