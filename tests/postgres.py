"""A real PostgreSQL for these tests: the launcher that users' tests have."""

from fastapi_prodkit.testing.postgresql import PASSWORD, PostgresMissingError, Server, postgres

__all__ = ["PASSWORD", "PostgresMissingError", "Server", "postgres"]
