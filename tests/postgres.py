"""A real PostgreSQL for these tests: the launcher that users' tests have."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fastapi_prodkit.testing.postgresql import PASSWORD, PostgresMissingError, Server, postgres

__all__ = ["PASSWORD", "PostgresMissingError", "Server", "postgres", "postgres_or_skip"]


@contextmanager
def postgres_or_skip(*, certificate: bytes | None = None, key: bytes | None = None) -> Iterator[Server]:
    """Start a server; where there is none, the tests that need it are skipped and say so."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgres(certificate=certificate, key=key))
        except PostgresMissingError as missing:
            pytest.skip(str(missing))
        yield server
