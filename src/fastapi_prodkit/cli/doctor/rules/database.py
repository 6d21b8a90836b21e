"""Rules about the database: how it is reached, and what it says itself."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from fastapi_prodkit._config.production_rules import stays_here
from fastapi_prodkit.cli.doctor.database_probe import migration_scripts
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["RULES"]

_PGBOUNCER_PORT = 6432


@rule("database-unreachable", "warning", "The database could not be asked")
def unreachable(facts: Facts) -> Iterator[Fault]:
    """Tell why nothing is known of connections, privileges and migrations."""
    if facts.server is not None and facts.server.failure is not None:
        yield Fault(
            f"{facts.server.failure}. Pool, role and migrations were not examined.",
            "Run the doctor where the database can be reached; or leave it out with --offline.",
        )


@rule("database-tls", "warning", "The database's certificate is not verified")
def tls(facts: Facts) -> Iterator[Fault]:
    """Tell of encryption to whoever answers; none at all to another host is `settings-unsafe`."""
    for variable, raw, _, asked in _urls(facts.database):
        if facts.database is None or stays_here(raw):
            continue
        from fastapi_prodkit.database.tls import stricter  # noqa: PLC0415 - it needs an extra, which is there

        modes = [asked[name] for name in ("sslmode", "ssl") if name in asked]
        if stricter(facts.database.ssl, *modes) == "require":
            yield Fault(
                f"{variable}: the connection is encrypted to whoever answers, and that may be somebody in between.",
                "Set DATABASE_SSL=verify-full, and DATABASE_SSL_ROOT_CERT to the CA file of the provider.",
            )


@rule("database-pool", "error", "The pool is larger than what the server allows")
def pool(facts: Facts) -> Iterator[Fault]:
    """Tell of connections that will be refused under load."""
    most, allowed = _connections(facts)
    if most > allowed:
        yield Fault(
            f"One container may open {most} connections (DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW, for each "
            f"worker), and the server allows {allowed} for all its clients.",
            "Lower them or WEB_CONCURRENCY, raise max_connections, or put PgBouncer between.",
        )


@rule("database-pool-rollout", "warning", "Two containers have no room at the database")
def pool_rollout(facts: Facts) -> Iterator[Fault]:
    """Tell of a deployment, in which old and new run at the same time, that runs out of connections."""
    most, allowed = _connections(facts)
    if most <= allowed < 2 * most:
        yield Fault(
            f"One container may open {most} connections of {allowed}, and during a deployment there are two.",
            "Lower DATABASE_POOL_SIZE or DATABASE_MAX_OVERFLOW, or put PgBouncer between.",
        )


@rule("database-superuser", "warning", "The service may do anything in the database")
def superuser(facts: Facts) -> Iterator[Fault]:
    """Tell of a role that an injected statement could take the server over with."""
    if facts.server is not None and facts.server.superuser:
        yield Fault(
            "Its role is a superuser: a single injected statement reaches all databases, and the server's files.",
            "Give it a role of its own that owns its tables, or less, and DATABASE_MIGRATIONS_URL the owner's.",
        )


@rule("database-migrations-pending", "error", "The database lacks migrations")
def migrations_pending(facts: Facts) -> Iterator[Fault]:
    """Tell what the schema is behind: /ready would say 503."""
    if facts.server is not None and facts.server.pending is not None:
        yield Fault(f"{facts.server.pending}.", "Run fastapi-prodkit db upgrade before the release.")


@rule("database-migrations-unwatched", "warning", "/ready does not look for pending migrations")
def migrations_unwatched(facts: Facts) -> Iterator[Fault]:
    """Tell of migrations that the service does not know of."""
    database = facts.database
    if database is None or database.migrations_config is not None:
        return
    if scripts := migration_scripts(database):
        yield Fault(
            f"There is {scripts}, and a release that runs before its migrations answers with errors.",
            f"Set DATABASE_MIGRATIONS_CONFIG={scripts}.",
        )


@rule("database-timeout-off", "warning", "A time-out of the database is off")
def timeout_off(facts: Facts) -> Iterator[Fault]:
    """Tell what the server does without end; behind a pooler the role says how long, and is not asked."""
    database = facts.database
    if database is None or database.pooler is not None:
        return
    for name, what in (
        ("statement_timeout", "the server runs a statement on after the service has given it up"),
        ("lock_timeout", "a statement waits for a lock for as long as somebody holds it"),
        ("idle_transaction_timeout", "a transaction that was forgotten holds its locks for ever"),
    ):
        if getattr(database, name) is None:
            yield Fault(f"DATABASE_{name.upper()} is off: {what}.", f"Set DATABASE_{name.upper()} to seconds.")


@rule("database-pool-timeout", "warning", "A request may wait for a connection to its end")
def pool_timeout(facts: Facts) -> Iterator[Fault]:
    """Tell of a wait for a connection that is longer than a request."""
    database, limits = facts.database, getattr(facts.settings, "limits", None)
    request = None if limits is None else limits.request_timeout
    if database is not None and request is not None and database.pool_timeout >= request:
        yield Fault(
            f"A request ends after {request:g} s (LIMITS_REQUEST_TIMEOUT), and may wait {database.pool_timeout:g} s "
            "for a connection (DATABASE_POOL_TIMEOUT): all of it is waiting, and none gets the 503 that says why.",
            "Lower DATABASE_POOL_TIMEOUT to a few seconds.",
        )


@rule("database-pooler", "warning", "A pooler is not named as one")
def pooler(facts: Facts) -> Iterator[Fault]:
    """Tell of PgBouncer's port: prepared statements fail behind it once several processes share it."""
    for variable, _, url, _ in _urls(facts.database):
        if url.port == _PGBOUNCER_PORT and facts.database is not None and facts.database.pooler is None:
            yield Fault(
                f"{variable} has PgBouncer's port {_PGBOUNCER_PORT}: in transaction mode prepared statements fail.",
                "Set DATABASE_POOLER=pgbouncer.",
            )


@rule("database-sqlite", "warning", "The database is a file of one container")
def sqlite(facts: Facts) -> Iterator[Fault]:
    """Tell of data that goes with the container, and that no second one sees."""
    if facts.database is not None and facts.database.url.get_secret_value().startswith("sqlite"):
        yield Fault(
            "SQLite: the next deployment starts without the data unless the file is on a volume, and there can be one "
            "writer only.",
            "Use PostgreSQL, or one container with a volume.",
        )


def _urls(database: DatabaseSettings | None) -> Iterator[tuple[str, str, Any, Mapping[str, str]]]:
    """Yield the URLs of PostgreSQL: the variable, the text, the URL and its parameters.

    What cannot be parsed is told by `database-unreachable`, and so is an extra that is missing.
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
    """Return how many connections one container may open, and how many the server allows; without end if unknown."""
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
