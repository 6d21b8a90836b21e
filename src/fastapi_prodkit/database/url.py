"""What DATABASE_URL says: any spelling that platforms hand out, and libpq's parameters."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["POSTGRESQL", "SQLITE", "URL", "is_in_memory", "parameters", "parse", "read_options", "read_seconds"]

POSTGRESQL = ("postgresql", "postgres", "postgresql+asyncpg")
SQLITE = ("sqlite", "sqlite+aiosqlite")

# What PostgreSQL's own clients understand in a URL and asyncpg's SQLAlchemy dialect would pass on as an unknown keyword
# argument. `ssl` is how asyncpg's users have come to write sslmode; `host` and `port` are the dialect's to read.
_TRANSLATED = (
    *("sslmode", "ssl", "sslrootcert", "application_name", "connect_timeout", "options", "target_session_attrs"),
)
_UNDERSTOOD = (*_TRANSLATED, "host", "port")

# Hosts as libpq lists them, user:password@one:5432,two:5432 - which SQLAlchemy does not read.
_SEVERAL = re.compile(r"([^:]+://(?:[^@]*@)?)([^/?@]*,[^/?@]*)((?:/[^?]*)?)(?:\?(.*))?", re.DOTALL)
_PORT = re.compile(r":(\d+)$")
_LAST_PORT = 65_535


def parse(raw: str) -> URL:
    """Return the parsed URL.

    Raises:
        ConfigurationError: It is none, or its scheme is not one of ours. The message does not repeat it.
    """
    url = None
    with suppress(ArgumentError, ValueError):  # not chained to ours below: they may quote a part of the password
        url = make_url(_list_hosts(raw))
    if url is None or (
        url.drivername in POSTGRESQL and (raw.count("@") > 1 or raw != raw.strip() or " " in (url.host or ""))
    ):
        raise ConfigurationError(
            "DATABASE_URL is not a URL like postgresql://user:password@host:5432/name; "
            "special characters in the user name and the password must be percent-encoded (an @ is %40)"
        )
    if url.drivername not in POSTGRESQL + SQLITE:
        raise ConfigurationError(
            f"DATABASE_URL must begin with one of {', '.join(f'{name}://' for name in POSTGRESQL + SQLITE)}"
        )
    if url.drivername in POSTGRESQL:
        _check_hosts(url)
    return url


def is_in_memory(url: URL) -> bool:
    """Whether it is an SQLite database that lives and dies with its connection."""
    return url.drivername in SQLITE and url.database in {None, "", ":memory:"}


def parameters(url: URL) -> tuple[URL, Mapping[str, str]]:
    """Return what asyncpg's dialect can read of a PostgreSQL URL, and the parameters that are left for us.

    Raises:
        ConfigurationError: There is a parameter that nobody understands, or hosts that cannot be read.
    """
    if not url.query.keys() <= set(_UNDERSTOOD):  # not named: after a stray & it may be a part of a password
        raise ConfigurationError(f"DATABASE_URL: after the question mark only {', '.join(_UNDERSTOOD)} are understood")
    asked = {name: values[-1] for name, values in url.normalized_query.items()}  # the last one counts, as in libpq
    hosts = url.normalized_query.get("host", ())
    if len(hosts) > 1:  # the dialect knows no default port
        url = url.update_query_dict({"host": [host if _PORT.search(host) else f"{host}:5432" for host in hosts]})
    return url.set(drivername="postgresql+asyncpg").difference_update_query(_TRANSLATED), asked


def read_options(text: str) -> dict[str, str]:
    """Read `-c name=value --name=value`, which is what the server's own command line takes.

    Raises:
        ConfigurationError: It is written otherwise. The message does not repeat it.
    """
    words = re.sub(r"(^|\s)-c\s*", r"\1--", text).split()
    pairs = [word.removeprefix("--").partition("=") for word in words]
    if not all(word.startswith("--") and name and equals for word, (name, equals, _) in zip(words, pairs, strict=True)):
        raise ConfigurationError(
            "DATABASE_URL: options are written as options=-c%20name=value, without spaces in a value"
        )
    return {name.replace("-", "_"): value for name, _, value in pairs}


def read_seconds(value: str) -> float:
    """Read `connect_timeout`.

    Raises:
        ConfigurationError: It is not a positive number.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigurationError("DATABASE_URL: connect_timeout must be a number of seconds above 0")
    return seconds


def _check_hosts(url: URL) -> None:
    listed = url.normalized_query.get("host", ())
    local = url.database and url.password is None and url.port is None  # over the socket that libpq knows
    if not (listed or local or all((url.host or "").split(","))):
        raise ConfigurationError(
            "DATABASE_URL names no host: write postgresql://user:password@host:5432/name, "
            "or ?host=/run/postgresql for a socket"
        )
    ports = [found[1] for host in listed if (found := _PORT.search(host))]
    ports += [str(url.port or 0)] if url.port is not None else []
    ports += [port for text in url.normalized_query.get("port", ()) for port in text.split(",")]
    if not all(port.isdecimal() and 0 < int(port) <= _LAST_PORT for port in ports):
        raise ConfigurationError("DATABASE_URL: a port is a number from 1 to 65535")


def _list_hosts(raw: str) -> str:
    """Write several hosts as SQLAlchemy does: ?host=one:5432&host=two:5432."""
    several = _SEVERAL.fullmatch(raw)
    if several is None or re.search(r"[?&]host=", raw):  # which wins over the hosts before it
        return raw
    before, hosts, path, query = several.groups()
    if not all(hosts.split(",")):
        return raw
    listed = [f"host={host}" for host in hosts.split(",")]
    return f"{before}{path}?{'&'.join(filter(None, [query, *listed]))}"
