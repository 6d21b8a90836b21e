"""`fastapi-prodkit doctor` on authentication: routes that write, issuers, and API keys that expire."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import gathered, ids, in_order, module  # noqa: F401 - a fixture

from fastapi_prodkit.cli.doctor.examination import examine

pytestmark = pytest.mark.usefixtures("in_order")

NOW = datetime(2027, 1, 15, 12, tzinfo=UTC)
HASH = "0123456789abcdef" * 4
TENANT = "8a1b2c3d-0000-4000-8000-0123456789ab"

SERVICE = """
from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.applications import Starlette
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.routing import Route
from fastapi_prodkit import create_app
from fastapi_prodkit.auth import Auth, CurrentUser, guard_routes, optional_user, public, require_roles
from fastapi_prodkit.log_level import log_level_router
from fastapi_prodkit.sections import LogSettings

app = FastAPI(openapi_url=None)
outer = FastAPI(openapi_url=None)
sub = FastAPI(openapi_url=None)
router = APIRouter(prefix="/reports")
auth = Auth(find_key=lambda hashed: None)
optional = Auth(find_key=lambda hashed: None, default="optional")

def add(target, *methods, path="", dependencies=()):
    @target.api_route(path, methods=list(methods), dependencies=dependencies)
    async def write(): ...
    return write

add(router, "GET")
"""
OPEN = [
    ("add(router, 'POST')\napp.include_router(router)", "POST /reports"),
    ("add(router, 'GET', 'PUT', 'DELETE', path='/{id}')\napp.include_router(router)", "DELETE/PUT /reports/{id}"),
    ("add(router, 'PATCH')\napp = create_app(routers=[router])", "PATCH /reports"),
    ("add(sub, 'POST', path='/x')\napp.mount('/sub', sub)", "POST /sub/x"),
    ("add(sub, 'POST', path='/x')\nguard_routes(outer, auth)\napp.mount('/in', outer)\napp.mount('/inner', sub)",
     "POST /inner/x"),
    ("add(router, 'POST')\napp.include_router(router)\nguard_routes(app, optional)", "POST /reports"),
    ("add(router, 'POST', dependencies=[Depends(optional_user)])\napp.include_router(router)", "POST /reports"),
    ("add(router, 'POST', dependencies=[Depends(auth.authenticate)])\napp.include_router(router)", "POST /reports"),
    ("for name in 'abcde': add(app, 'POST', path=f'/{name}')", "POST /a, POST /b, POST /c and 2 more"),
]  # fmt: skip
CLOSED = [
    "app.include_router(router)",
    "public(add(router, 'POST'))\napp.include_router(router)",
    "add(router, 'POST')\napp = create_app(routers=[router], auth=auth)",
    "add(router, 'POST')\napp.include_router(router)\nguard_routes(app, auth)",
    "add(sub, 'POST', path='/x')\nouter.mount('/sub', sub)\nguard_routes(outer, auth)\napp.mount('/outer', outer)",
    "add(router, 'POST', dependencies=[Depends(HTTPBearer())])\napp.include_router(router)",
    "add(router, 'POST', dependencies=[Depends(auth.current_user)])\napp.include_router(router)",
    "add(router, 'POST')\napp.include_router(router, dependencies=[Depends(require_roles('editor'))])",
    "app.include_router(router, dependencies=[Depends(require_roles('a'))])\nguard_routes(app, optional)",
    "@app.post('/reports')\nasync def write(user: CurrentUser): ...",
    "add(router, 'POST')\napp.include_router(router)\napp.add_middleware(AuthenticationMiddleware, backend=None)",
    "app.include_router(log_level_router(LogSettings(level_token='iK3v_8sPq-2mZx7Lw9')))",
    "app.mount('/admin', Starlette(routes=[Route('/login', add(sub, 'GET', path='/'), methods=['POST'])]))",
]


def findings(facts=None):
    """Return what the findings say, by id."""
    return {finding.id: finding for finding in examine(facts or gathered()).findings}


@pytest.mark.parametrize(("code", "named"), OPEN)
def test_routes_that_write_without_a_caller_are_one_finding(code, named):
    """Of each app, with their methods and paths."""
    name = module(f"{SERVICE}\n{code}\n")

    found = findings(gathered(f"{name}:app"))

    assert list(found) == ["auth-missing"]
    assert found["auth-missing"].reason == f"Anyone may call what writes: {named}."


@pytest.mark.parametrize("code", CLOSED)
def test_routes_with_a_caller_or_meant_to_be_open_are_not_found(code):
    """By a guard, a dependency, middleware or a mark; nor routes that only read."""
    name = module(f"{SERVICE}\n{code}\n")

    assert ids(gathered(f"{name}:app")) == set()


@pytest.mark.parametrize(
    ("issuer", "preset"),
    [
        ("https://acme.eu.auth0.com/", "auth0"),
        ("https://cognito-idp.eu-central-1.amazonaws.com/eu-central-1_Ab12Cd", "cognito"),
        (f"https://login.microsoftonline.com/{TENANT}/v2.0", "entra"),
        ("https://accounts.google.com", "google"),
        ("https://clever-fox-12.clerk.accounts.dev", "clerk"),
        ("https://clerk.example.com", "clerk"),
        ("https://login.example.com/realms/orders", "keycloak"),
        ("https://login.example.com/auth/realms/orders", "keycloak"),
    ],
)
def test_known_vendor_without_a_preset_is_named(monkeypatch, issuer, preset):
    """The remedy names the preset; with a preset there is no finding."""
    monkeypatch.setenv("AUTH_ISSUER", issuer)
    monkeypatch.setenv("AUTH_AUDIENCE", "orders")
    without = findings()
    monkeypatch.setenv("AUTH_PRESET", preset)

    assert ids(gathered()) == set()
    assert list(without) == ["auth-preset"]
    assert without["auth-preset"].remedy.startswith(f"Set AUTH_PRESET={preset};")


@pytest.mark.parametrize(
    ("issuer", "preset", "form"),
    [
        ("https://acme.eu.auth0.com", "auth0", "https://TENANT.auth0.com/, with the slash"),
        ("https://login.example.com", "auth0", "https://TENANT.auth0.com/, with the slash"),
        ("https://accounts.google.com/", "google", "https://accounts.google.com, without a slash"),
        ("https://login.microsoftonline.com/common/v2.0", "entra", "https://login.microsoftonline.com/TENANT-ID/v2.0"),
        (f"https://sts.windows.net/{TENANT}/", "entra", "https://login.microsoftonline.com/TENANT-ID/v2.0"),
        ("https://login.example.com", "keycloak", "https://login.example.com/realms/REALM"),
        ("https://login.example.com/,https://acme.auth0.com", "standard,auth0",
         "https://TENANT.auth0.com/, with the slash"),
    ],
)  # fmt: skip
def test_issuer_that_no_token_has_is_found(monkeypatch, issuer, preset, form):
    """By the form of the vendor's issuers, since `iss` is compared exactly."""
    monkeypatch.setenv("AUTH_ISSUER", issuer)
    monkeypatch.setenv("AUTH_AUDIENCE", "orders")
    monkeypatch.setenv("AUTH_PRESET", preset)

    found = findings()

    assert list(found) == ["auth-issuer"]
    assert found["auth-issuer"].remedy == f"Its form is {form}."


@pytest.mark.parametrize("issuer", ["https://login.example.com/", "https://acme.okta.com/oauth2/default"])
def test_issuer_of_an_unknown_vendor_is_not_found(monkeypatch, issuer):
    """Its tokens may follow the standard, and its URL may have any form."""
    monkeypatch.setenv("AUTH_ISSUER", issuer)
    monkeypatch.setenv("AUTH_AUDIENCE", "orders")

    assert ids(gathered()) == set()


@pytest.mark.parametrize(
    ("expires", "said"),
    [
        (["2027-01-14"], "has expired: 2027-01-14"),
        (["2027-02-14"], "expires: 2027-02-14"),
        (["2027-01-14", "2027-02-01"], "expires: 2027-02-01"),
        (["2027-02-15"], None),
        (["2027-01-14", "2028-01-01"], None),
        (["2028-01-01", "2027-01-14"], None),
        (["2027-01-14", None], None),
    ],
)
def test_api_key_that_expires_within_30_days_is_found(monkeypatch, expires, said):
    """Unless another one of that name is valid longer."""
    days = [f" expires={day}" if day else "" for day in expires]
    monkeypatch.setenv("AUTH_API_KEYS", ",".join(f"billing {HASH}{day}" for day in days))

    found = findings(replace(gathered(), now=NOW))

    assert [each.reason for each in found.values()] == ([f"The API key of billing {said}."] if said else [])
    assert HASH not in repr(found)
