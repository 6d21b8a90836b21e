"""Settings with which staging and prod refuse to start, and the remedy for each.

Each rule is about one section, because sections are validated one by one. So refusals are reported together with all
other errors of the environment.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs

from fastapi_prodkit._config.worker_count import configured_workers, is_one_of_several_workers
from fastapi_prodkit.exceptions import SettingsError, SettingsWarning
from fastapi_prodkit.sections import (
    AuthSettings,
    CorsSettings,
    DatabaseSettings,
    DocsSettings,
    HostsSettings,
    ProxySettings,
    RateLimitSettings,
)

# The hosts of a database URL: behind the password, which ends at the last @, and before path and query.
_HOSTS = re.compile(r"(?:[^:/@]*(?::[^@]*)?@)?([^/?]*)")
_PORT = re.compile(r":\d*$")

# The refusals that `deferred` collects; None outside of it, where a refusal stops the start.
_deferred: ContextVar[dict[str, str] | None] = ContextVar("deferred_refusals", default=None)

SEPARATE_COUNTS = (
    "would count separately, so that clients get a multiple of the limit: set RATE_LIMIT_STORAGE_URL=redis://..., "
    "which all of them share, run one worker per container (WEB_CONCURRENCY=1), or set RATE_LIMIT_ENABLED=false"
)


def counts_separately(rate_limit: RateLimitSettings | None) -> bool:
    """Return whether several workers would count requests separately."""
    return rate_limit is not None and not rate_limit.shared


def refuse_worker(rate_limit: RateLimitSettings | None, environment: str) -> None:
    """Refuse to start one of several workers that count separately; in dev and test, warn.

    The rules for settings do not detect such a worker if it comes from `--workers`, which sets no variable.

    Raises:
        SettingsError: In staging or prod this process is one of several workers, and each would count separately.
    """
    if not (counts_separately(rate_limit) and is_one_of_several_workers()):
        return
    reason = f"this is a worker process, and each {SEPARATE_COUNTS}"
    if environment in ("staging", "prod"):
        raise SettingsError({"RATE_LIMIT_ENABLED": reason})
    warnings.warn(f"RATE_LIMIT_ENABLED: {reason}; staging and prod refuse it", SettingsWarning, stacklevel=1)


@contextmanager
def deferred() -> Iterator[dict[str, str]]:
    """Collect refusals instead of raising them: `fastapi-prodkit doctor` examines apps that would not start."""
    found: dict[str, str] = {}
    token = _deferred.set(found)
    try:
        yield found
    finally:
        _deferred.reset(token)


def refuse(section: str, value: Any, problems: Mapping[str, str]) -> Any:
    """Raise the problems of a section; in `deferred`, collect them, and return None if its middleware would fail.

    Raises:
        SettingsError: The problems, by the names of their variables.
    """
    found = _deferred.get()
    if found is None:
        raise SettingsError(problems)
    found |= problems
    return None if section in ("proxy", "hosts", "cors") else value


def refusals(section: str, value: Any, earlier: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each variable (section and key) that makes the section unsafe, with the reason and the remedy.

    Args:
        section: Name of the field.
        value: The section, or the value of `debug`; None for a section that is switched off.
        earlier: The fields that were validated before; invalid ones are missing.
    """
    match section, value:
        case _, None:
            return
        case "debug", True:
            yield "debug", "shows tracebacks and variables to every client: set it to false"
        case "proxy", _:
            yield from _proxy(value)
        case "hosts", _:
            yield from _hosts(value)
        case "cors", _:
            yield from _cors(value, earlier.get("hosts"))
        case "rate_limit", _:
            yield from _rate_limit(value)
        case "docs", _:
            yield from _docs(value)
        case "auth", _:
            yield from _auth(value)
        case "database", _:
            yield from _database(value)


def _proxy(proxy: ProxySettings) -> Iterator[tuple[str, str]]:
    if any(entry == "*" or entry.endswith("/0") for entry in proxy.trusted):
        yield (
            "proxy_trusted",
            "lets every client choose its own address: list the load balancer's addresses or networks",
        )


def _hosts(hosts: HostsSettings) -> Iterator[tuple[str, str]]:
    if not hosts.allowed:
        yield "hosts_allowed", "is required: list the host names of the service, such as api.example.com"
    elif "*" in hosts.allowed:
        text = (
            "* allows every host name: list the host names, or set HOSTS_ENABLED=false if a load balancer in front "
            "checks them"
        )
        yield "hosts_allowed", text


def _cors(cors: CorsSettings, hosts: HostsSettings | None) -> Iterator[tuple[str, str]]:
    for key in ("origins", "allow_methods", "allow_headers", "expose_headers"):
        if cors.allow_credentials and "*" in getattr(cors, key):
            text = "* together with credentials would let every web site act as its visitors, and browsers refuse it"
            yield f"cors_{key}", f"{text}: list what is allowed, or set CORS_ALLOW_CREDENTIALS=false"
    names = [*(hosts.allowed if hosts else ()), *(origin.partition("://")[2].split(":")[0] for origin in cors.origins)]
    foreign = _foreign_origin(cors.origin_regex, names) if cors.origin_regex else None
    if foreign is not None:
        text = f"also matches {foreign}, whose domain anyone could register"
        yield "cors_origin_regex", f"{text}: escape every dot, put no .* next to a name, or list CORS_ORIGINS"


def _rate_limit(rate_limit: RateLimitSettings) -> Iterator[tuple[str, str]]:
    if (configured_workers() or 1) > 1 and counts_separately(rate_limit):
        yield "rate_limit_enabled", f"each of the WEB_CONCURRENCY workers {SEPARATE_COUNTS}"


def _docs(docs: DocsSettings) -> Iterator[tuple[str, str]]:
    if docs.client_id is not None and docs.token is None:
        yield "docs_client_id", "switches the docs on, but no browser can open them: set DOCS_TOKEN, or remove it"


def _auth(auth: AuthSettings) -> Iterator[tuple[str, str]]:
    if any(url.startswith("http:") for url in auth.issuer):
        yield "auth_issuer", "is an issuer for development, without TLS: use the https URL of a real one"


def _database(database: DatabaseSettings) -> Iterator[tuple[str, str]]:
    urls = [
        url.get_secret_value() for url in (database.url, database.read_url, database.migrations_url) if url is not None
    ]
    if database.ssl == "off" and not all(map(_encrypted, urls)):
        yield "database_ssl", "sends passwords and data in plain text to another host: use verify-full"


def _foreign_origin(pattern: str, names: Sequence[str]) -> str | None:
    """Return an origin that the pattern allows although its domain is not one of `names`; None if there is none."""
    for scheme in ("https://", "http://"):
        for host in ("probe.invalid", "probe.vercel.app", *_lookalikes(pattern, scheme, names)):
            if re.fullmatch(pattern, scheme + host):
                return scheme + host
    return None


def _lookalikes(pattern: str, scheme: str, names: Sequence[str]) -> Iterator[str]:
    """Yield hosts that begin or end like one of `names`; a pattern without an anchor or an escaped dot matches them."""
    for name in names:
        domain = name.removeprefix("*.")
        yield f"{domain}.probe.invalid"
        while "." in domain:
            parent = domain.partition(".")[2]
            # A pattern that allows every subdomain of our own domain allows this one on purpose.
            if "." not in parent or not re.fullmatch(pattern, f"{scheme}probe.{parent}"):
                yield f"probe{domain}"
            domain = parent


def _encrypted(url: str) -> bool:
    """Return whether the URL asks for an encrypted connection, or the database is on this machine."""
    query = parse_qs(url.rpartition("?")[2])
    if {"require", "verify-ca", "verify-full"}.intersection(query.get("sslmode", []) + query.get("ssl", [])):
        return True  # a URL may be stricter than the setting
    return is_on_this_machine(url)


def is_on_this_machine(url: str) -> bool:
    """Return whether the database of the URL is a file or a server on this machine."""
    scheme, _, rest = url.partition("://")
    if scheme.startswith("sqlite"):
        return True
    query = parse_qs(rest.rpartition("?")[2])
    match = _HOSTS.match(rest)
    named = ",".join(query.get("host", [])) or (match[1] if match else "")
    return all(_is_local(host) for host in named.split(","))


def _is_local(host: str) -> bool:
    if host.startswith("[") or host.count(":") == 1:
        host = _PORT.sub("", host)
    if host in ("", "localhost") or host.startswith("/"):  # the path of a Unix socket
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
