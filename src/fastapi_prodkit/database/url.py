"""Parse DATABASE_URL in every form that platforms provide, with libpq's parameters."""

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

# libpq's parameters, which asyncpg's SQLAlchemy dialect would pass on as unknown keyword arguments. `ssl` is a common
# alias of sslmode with asyncpg. The dialect itself reads `host` and `port`.
_TRANSLATED = (
    *("sslmode", "ssl", "sslrootcert", "application_name", "connect_timeout", "options", "target_session_attrs"),
)
_UNDERSTOOD = (*_TRANSLATED, "host", "port")

# Several hosts in libpq's form, user:password@one:5432,two:5432, which SQLAlchemy cannot parse.
_SEVERAL = re.compile(r"([^:]+://(?:[^@]*@)?)([^/?@]*,[^/?@]*)((?:/[^?]*)?)(?:\?(.*))?", re.DOTALL)
_PORT = re.compile(r":(\d+)$")
_LAST_PORT = 65_535


def parse(raw: str) -> URL:
    """Return the parsed URL.

    Raises:
        ConfigurationError: The text is not a URL, or its scheme is not supported. The message omits the URL.
    """
    url = None
    with suppress(ArgumentError, ValueError):  # not chained to the error below: they may quote a part of the password
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
    """Return whether the URL is a SQLite database in memory, which exists as long as its connection."""
    return url.drivername in SQLITE and url.database in {None, "", ":memory:"}


def parameters(url: URL) -> tuple[URL, Mapping[str, str]]:
    """Split a PostgreSQL URL into a URL for asyncpg's dialect and the parameters that we handle.

    Raises:
        ConfigurationError: A parameter is unknown, or the hosts cannot be parsed.
    """
    if not url.query.keys() <= set(_UNDERSTOOD):  # not named: behind a stray & it may be a password
        raise ConfigurationError(f"DATABASE_URL: after the question mark only {', '.join(_UNDERSTOOD)} are understood")
    asked = {name: values[-1] for name, values in url.normalized_query.items()}  # the last value counts, as in libpq
    hosts = url.normalized_query.get("host", ())
    if len(hosts) > 1:  # the dialect has no default port
        url = url.update_query_dict({"host": [host if _PORT.search(host) else f"{host}:5432" for host in hosts]})
    return url.set(drivername="postgresql+asyncpg").difference_update_query(_TRANSLATED), asked


def read_options(text: str) -> dict[str, str]:
    """Parse `-c name=value --name=value`, the form of the server's command line.

    Raises:
        ConfigurationError: The text has another form. The message omits the text.
    """
    words = re.sub(r"(^|\s)-c\s*", r"\1--", text).split()
    pairs = [word.removeprefix("--").partition("=") for word in words]
    if not all(word.startswith("--") and name and equals for word, (name, equals, _) in zip(words, pairs, strict=True)):
        raise ConfigurationError(
            "DATABASE_URL: options are written as options=-c%20name=value, without spaces in a value"
        )
    return {name.replace("-", "_"): value for name, _, value in pairs}


def read_seconds(value: str) -> float:
    """Parse `connect_timeout`, in seconds.

    Raises:
        ConfigurationError: The value is not a positive number.
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
    local = url.database and url.password is None and url.port is None  # over libpq's default socket
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
    """Rewrite several hosts in SQLAlchemy's form: ?host=one:5432&host=two:5432."""
    several = _SEVERAL.fullmatch(raw)
    if several is None or re.search(r"[?&]host=", raw):  # a `host` parameter takes precedence
        return raw
    before, hosts, path, query = several.groups()
    if not all(hosts.split(",")):
        return raw
    listed = [f"host={host}" for host in hosts.split(",")]
    return f"{before}{path}?{'&'.join(filter(None, [query, *listed]))}"
