"""Rules about the database: its settings, and facts from the server."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from fastapi_prodkit._config.production_rules import is_on_this_machine
from fastapi_prodkit.cli.doctor.database_probe import migration_scripts
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["RULES"]

_PGBOUNCER_PORT = 6432


@rule("database-unreachable", "warning", "The database could not be queried")
def unreachable(facts: Facts) -> Iterator[Problem]:
    """Report why connections, privileges and migrations could not be checked."""
    if facts.server is not None and facts.server.failure is not None:
        yield Problem(
            f"{facts.server.failure}. Pool, role and migrations were not examined.",
            "Run the doctor where the database can be reached, or skip it with --offline.",
        )


@rule("database-tls", "warning", "The database's certificate is not verified")
def tls(facts: Facts) -> Iterator[Problem]:
    """Report TLS without verification; a connection without TLS is reported by `settings-unsafe`."""
    for variable, raw, _, asked in _urls(facts.database):
        if facts.database is None or is_on_this_machine(raw):
            continue
        from fastapi_prodkit.database.tls import stricter  # noqa: PLC0415 - it needs an extra, which is there

        modes = [asked[name] for name in ("sslmode", "ssl") if name in asked]
        if stricter(facts.database.ssl, *modes) == "require":
            yield Problem(
                f"{variable}: the connection is encrypted, but the server is not verified: it may be an attacker.",
                "Set DATABASE_SSL=verify-full, and DATABASE_SSL_ROOT_CERT to the CA file of the provider.",
            )


@rule("database-pool", "error", "The pool is larger than the server allows")
def pool(facts: Facts) -> Iterator[Problem]:
    """Report pools that exceed the server's limit."""
    most, allowed = _connections(facts)
    if most > allowed:
        yield Problem(
            f"One container may open {most} connections (DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW, for each "
            f"worker), and the server allows {allowed} for all its clients.",
            "Lower them or WEB_CONCURRENCY, raise max_connections, or use PgBouncer.",
        )


@rule("database-pool-rollout", "warning", "A deployment needs more connections than the server allows")
def pool_rollout(facts: Facts) -> Iterator[Problem]:
    """Report pools that exceed the limit during a deployment, while old and new containers run."""
    most, allowed = _connections(facts)
    if most <= allowed < 2 * most:
        yield Problem(
            f"One container may open {most} of {allowed} connections, and two run during a deployment.",
            "Lower DATABASE_POOL_SIZE or DATABASE_MAX_OVERFLOW, or use PgBouncer.",
        )


@rule("database-superuser", "warning", "The service is a superuser of the database")
def superuser(facts: Facts) -> Iterator[Problem]:
    """Report a superuser role, with which an SQL injection could take over the server."""
    if facts.server is not None and facts.server.superuser:
        yield Problem(
            "A single SQL injection would reach all databases, and the server's files.",
            "Use a role that has only the rights it needs; set DATABASE_MIGRATIONS_URL for the owner of the tables.",
        )


@rule("database-migrations-pending", "error", "The database lacks migrations")
def migrations_pending(facts: Facts) -> Iterator[Problem]:
    """Report pending migrations, for which /ready returns 503."""
    if facts.server is not None and facts.server.pending is not None:
        yield Problem(f"{facts.server.pending}.", "Run fastapi-prodkit db upgrade before the release.")


@rule("database-migrations-unwatched", "warning", "/ready does not check for pending migrations")
def migrations_unwatched(facts: Facts) -> Iterator[Problem]:
    """Report migrations that /ready does not check."""
    database = facts.database
    if database is None or database.migrations_config is not None:
        return
    if scripts := migration_scripts(database):
        yield Problem(
            f"{scripts} has migrations, and a release that starts before they have run answers with errors.",
            f"Set DATABASE_MIGRATIONS_CONFIG={scripts}.",
        )


@rule("database-timeout-off", "warning", "A time-out of the database is off")
def timeout_off(facts: Facts) -> Iterator[Problem]:
    """Report time-outs that are off; behind a pooler they are set for the role, which is not checked."""
    database = facts.database
    if database is None or database.pooler is not None:
        return
    for name, what in (
        ("statement_timeout", "the server continues a statement after the service has timed out"),
        ("lock_timeout", "a statement waits for a lock without limit"),
        ("idle_transaction_timeout", "a transaction that is left open holds its locks for ever"),
    ):
        if getattr(database, name) is None:
            yield Problem(f"DATABASE_{name.upper()} is off: {what}.", f"Set DATABASE_{name.upper()} to seconds.")


@rule("database-pool-timeout", "warning", "A request may time out while it waits for a connection")
def pool_timeout(facts: Facts) -> Iterator[Problem]:
    """Report a pool time-out that is longer than the time-out of a request."""
    database, limits = facts.database, getattr(facts.settings, "limits", None)
    request = None if limits is None else limits.request_timeout
    if database is not None and request is not None and database.pool_timeout >= request:
        yield Problem(
            f"A request ends after {request:g} s (LIMITS_REQUEST_TIMEOUT), and may wait {database.pool_timeout:g} s "
            "for a connection (DATABASE_POOL_TIMEOUT), so it times out before it gets the 503 that says why.",
            "Lower DATABASE_POOL_TIMEOUT to a few seconds.",
        )


@rule("database-pooler", "warning", "A pooler is not configured as one")
def pooler(facts: Facts) -> Iterator[Problem]:
    """Report PgBouncer's port without DATABASE_POOLER: prepared statements fail in transaction mode."""
    for variable, _, url, _ in _urls(facts.database):
        if url.port == _PGBOUNCER_PORT and facts.database is not None and facts.database.pooler is None:
            yield Problem(
                f"{variable} has PgBouncer's port {_PGBOUNCER_PORT}: in transaction mode prepared statements fail.",
                "Set DATABASE_POOLER=pgbouncer.",
            )


@rule("database-sqlite", "warning", "The database is a file of one container")
def sqlite(facts: Facts) -> Iterator[Problem]:
    """Report SQLite, whose data is lost with the container and not shared between containers."""
    if facts.database is not None and facts.database.url.get_secret_value().startswith("sqlite"):
        yield Problem(
            "SQLite: the next deployment loses the data unless the file is on a volume, and only one process can "
            "write at a time.",
            "Use PostgreSQL, or one container with a volume.",
        )


def _urls(database: DatabaseSettings | None) -> Iterator[tuple[str, str, Any, Mapping[str, str]]]:
    """Yield the URLs of PostgreSQL: the variable, the text, the URL and its parameters.

    `database-unreachable` reports URLs that cannot be parsed, and a missing extra.
    """
    if database is None:
        return
    with suppress(MissingExtraError):
        from fastapi_prodkit.database.url import POSTGRESQL, parameters, parse  # noqa: PLC0415 - it needs an extra

        for variable, secret in (("DATABASE_URL", database.url), ("DATABASE_READ_URL", database.read_url)):
            raw = "" if secret is None else secret.get_secret_value()
            with suppress(ConfigurationError):
                url = parse(raw)
                if url.drivername in POSTGRESQL:
                    yield variable, raw, *parameters(url)


def _connections(facts: Facts) -> tuple[int, float]:
    """Return how many connections one container may open, and how many the server allows; infinity if unknown."""
    if facts.database is None or facts.server is None or facts.server.allowed is None:
        return 0, math.inf
    from fastapi_prodkit.database.sizing import max_connections  # noqa: PLC0415 - it needs an extra, which is there

    return max_connections(facts.database), facts.server.allowed


RULES = (
    unreachable,
    tls,
    pool,
    pool_rollout,
    superuser,
    migrations_pending,
    migrations_unwatched,
    timeout_off,
    pool_timeout,
    pooler,
    sqlite,
)
