"""Rules about authentication: routes that write without it, issuers, and API keys that expire."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.security.base import SecurityBase
from starlette.applications import Starlette

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit.cli.doctor.apps import apps, endpoints, module_of
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule
from fastapi_prodkit.sections import AuthSettings

__all__ = ["RULES"]

_WRITING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_OPTIONAL: Final = ("authenticate", "optional_user")  # dependencies of ours that return None without a caller
_MOST_NAMED: Final = 3  # routes in one finding
_SOON: Final = timedelta(days=30)
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class _Vendor:
    """How the `iss` of a vendor's tokens looks.

    Attributes:
        host: Regular expression of the vendor's own hosts; None if each customer has one.
        path: Regular expression of the path.
        form: An example.
    """

    host: str | None
    path: str
    form: str


# By preset. Sources: see auth.presets.
_VENDORS: Final = {
    "auth0": _Vendor(r".+\.auth0\.com", "/", "https://TENANT.auth0.com/, with the slash"),
    "clerk": _Vendor(r".+\.clerk\.accounts\.dev|clerk\..+", "", "https://clerk.example.com, without a slash"),
    "cognito": _Vendor(
        r"cognito-idp\..+\.amazonaws\.com", r"/[\w-]+_\w+", "https://cognito-idp.REGION.amazonaws.com/POOL"
    ),
    "entra": _Vendor(
        r"login\.microsoftonline\.(com|us)|sts\.windows\.net",
        r"/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/v2\.0",
        "https://login.microsoftonline.com/TENANT-ID/v2.0",
    ),
    "google": _Vendor(r"accounts\.google\.com", "", "https://accounts.google.com, without a slash"),
    "keycloak": _Vendor(None, r"(/.+)?/realms/[^/]+", "https://login.example.com/realms/REALM"),
}


@rule("auth-missing", "warning", "Everyone may write")
def missing(facts: Facts) -> Iterator[Problem]:
    """Report routes that write in an app without authentication, unless their endpoints are `public`."""
    guarded: list[str] = []
    for prefix, app in apps(facts.app):
        if _is_guarded(app) or any(f"{prefix}/".startswith(f"{outer}/") for outer in guarded):
            guarded.append(prefix)
        elif names := [f"{methods} {prefix}{path}" for methods, path in _open_writes(app)]:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            yield Problem(
                f"Anyone may call what writes: {', '.join(names[:_MOST_NAMED])}{more}.",
                "Set AUTH_ISSUER, AUTH_SECRET or AUTH_API_KEYS. Mark an endpoint `public` if everyone may call it; if "
                "a gateway in front authenticates, ignore this.",
            )


@rule("auth-preset", "warning", "The kind of issuer is not set")
def preset(facts: Facts) -> Iterator[Problem]:
    """Report issuers of a known vendor, whose tokens differ from the standard, without AUTH_PRESET."""
    auth = _section(facts)
    if auth is not None and not auth.preset:
        for issuer in auth.issuer:
            if name := _vendor_of(issuer):
                yield Problem(
                    f"{issuer} looks like {name}, whose tokens have their claims elsewhere.",
                    f"Set AUTH_PRESET={name}; or standard, if its tokens follow RFC 9068.",
                )


@rule("auth-issuer", "warning", "No token has this issuer")
def issuer_form(facts: Facts) -> Iterator[Problem]:
    """Report issuers that differ from the `iss` of the vendor's tokens, which is compared exactly."""
    auth = _section(facts)
    if auth is None:
        return
    presets = auth.preset * len(auth.issuer) if len(auth.preset) == 1 else auth.preset
    for issuer, given in zip_longest(auth.issuer, presets):
        name = given or _vendor_of(issuer)
        if name in _VENDORS and not re.fullmatch(_VENDORS[name].path, urlsplit(issuer).path):
            yield Problem(
                f"AUTH_ISSUER has {issuer}, which is not the `iss` of a token of {name}.",
                f"Its form is {_VENDORS[name].form}.",
            )


@rule("auth-key-expires", "warning", "An API key expires soon")
def key_expires(facts: Facts) -> Iterator[Problem]:
    """Report machines whose last API key has expired, or expires within 30 days."""
    auth = _section(facts)
    if auth is None or facts.now is None:
        return
    last: dict[str, datetime] = {}
    for key in auth.api_keys:
        last[key.name] = max(key.expires or _NEVER, last.get(key.name, key.expires or _NEVER))
    for name, expires in last.items():
        if expires <= facts.now + _SOON:
            yield Problem(
                f"The API key of {name} {'has expired' if expires <= facts.now else 'expires'}: {expires:%Y-%m-%d}.",
                f"Add another one of that name, which `fastapi-prodkit key {name}` makes, to AUTH_API_KEYS.",
            )


def _section(facts: Facts) -> AuthSettings | None:
    section: AuthSettings | None = getattr(facts.settings, "auth", None)
    return section


def _is_guarded(app: Starlette) -> bool:
    """Return whether the app has a guard that needs a caller, or middleware that authenticates by its name."""
    guard = vars(app.router).get(_scope.ROUTER_GUARD)
    names = (getattr(each.cls, "__name__", "") for each in app.user_middleware)
    return (guard is not None and guard.auth.default == "required") or any("auth" in name.lower() for name in names)


def _open_writes(app: Starlette) -> Iterator[tuple[str, str]]:
    """Yield method and path of the routes that write and need no caller, except for ours and for `public` ones."""
    for path, endpoint, route in endpoints(app) if isinstance(app, FastAPI) else ():
        methods = sorted(_WRITING.intersection(getattr(route, "methods", None) or ()))
        is_meant = getattr(endpoint, _scope.PUBLIC, False) or module_of(endpoint).startswith("fastapi_prodkit.")
        dependencies = walk_dependencies(getattr(route, "dependant", None))
        if methods and not is_meant and not any(map(_authenticates, dependencies)):
            yield "/".join(methods), path


def _authenticates(dependency: Any) -> bool:
    """Return whether a dependency is a security scheme of FastAPI, or one of ours that needs a caller."""
    if getattr(dependency, "__name__", "") in _OPTIONAL:
        return False
    return isinstance(dependency, SecurityBase) or module_of(dependency).startswith("fastapi_prodkit.auth")


def _vendor_of(issuer: str) -> str | None:
    """Return the preset for an issuer's URL; None if the vendor is not known."""
    parts = urlsplit(issuer)
    host = str(parts.hostname)
    for name, vendor in _VENDORS.items():
        if re.fullmatch(vendor.host, host) if vendor.host else re.fullmatch(vendor.path, parts.path):
            return name
    return None


RULES = (missing, preset, issuer_form, key_expires)
