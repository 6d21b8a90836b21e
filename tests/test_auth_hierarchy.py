"""Roles that imply others: of tokens, of API keys, and what is no hierarchy."""

import time

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from fastapi_prodkit import testing
from fastapi_prodkit.auth import Auth, CurrentUser, User, guard_routes, hash_api_key, new_api_key, require_roles
from fastapi_prodkit.auth.hierarchy import with_implied_roles
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import AuthSettings

# The fixture, here in this process.
headers_as = testing.headers_as

HIERARCHY = ("admin > editor > viewer", "owner>editor", "auditor>viewer")
SECRET = "a-secret-of-at-least-thirty-two-bytes"
KEY = new_api_key()
PATHS = ("/viewer", "/admin")


def client_of(auth):
    app = FastAPI()
    app.state.auth = auth
    guard_routes(app, auth)

    @app.get("/roles")
    async def roles(user: CurrentUser) -> list[str]:
        return sorted(user.roles)

    @app.get("/viewer", dependencies=[Depends(require_roles("viewer"))])
    async def viewer() -> str:
        return "ok"

    @app.get("/admin", dependencies=[Depends(require_roles("admin"))])
    async def admin() -> str:
        return "ok"

    return TestClient(app)


@pytest.mark.parametrize(
    ("roles", "all_roles"),
    [
        ((), ()),
        (("viewer",), ("viewer",)),
        (("editor",), ("editor", "viewer")),
        (("admin",), ("admin", "editor", "viewer")),
        (("owner", "auditor", "other"), ("auditor", "editor", "other", "owner", "viewer")),
        (("Admin", "admin>editor"), ("Admin", "admin>editor")),
    ],
)
def test_user_has_all_that_the_roles_imply(roles, all_roles):
    """Directly or not, and never the other way round."""
    user = with_implied_roles(User, HIERARCHY)(id="alice", roles=frozenset(roles))

    assert user == User("alice", roles=frozenset(all_roles))


def test_users_without_a_hierarchy_are_made_by_the_class():
    """So nothing is called that has nothing to do."""
    assert with_implied_roles(User, ()) is User


@pytest.mark.parametrize(
    ("hierarchy", "reason"),
    [
        (("admin",), "roles with > between"),
        (("admin>",), "roles with > between"),
        (("admin>>viewer",), "roles with > between"),
        (("",), "roles with > between"),
        (("admin>admin",), "admin implies itself"),
        (("a>b>c", "c>a"), "implies itself"),
        (("x>a", "a>b", "b>a"), "implies itself"),
    ],
)
def test_impossible_hierarchy_is_an_error(hierarchy, reason):
    """When `Auth` is made."""
    with pytest.raises(ConfigurationError, match=reason):
        Auth(find_key=lambda hashed: None, hierarchy=hierarchy)


def test_key_has_implied_roles():
    """By the setting; the argument is used in place of the setting."""
    entry = f"bot {hash_api_key(KEY)} role=editor"
    settings = AuthSettings(api_keys=(entry,), role_hierarchy=HIERARCHY)
    by_setting, by_argument = client_of(Auth(settings)), client_of(Auth(settings, hierarchy=["editor>admin"]))
    without = client_of(Auth(settings, hierarchy=[]))

    clients = (by_setting, by_argument, without)
    found = [client.get("/roles", headers={"X-API-Key": KEY}).json() for client in clients]
    statuses = [client.get(path, headers={"X-API-Key": KEY}).status_code for client in clients for path in PATHS]

    assert found == [["editor", "viewer"], ["admin", "editor"], ["editor"]]
    assert statuses == [200, 403, 403, 200, 403, 403]


def test_token_has_implied_roles():
    """Also when it is known; its claims say what the issuer has said."""
    jwt = pytest.importorskip("jwt", reason="the extra auth is not installed")
    auth = Auth(AuthSettings(secret=SECRET, role_hierarchy=HIERARCHY))
    client = client_of(auth)
    token = jwt.encode({"sub": "a", "roles": ["admin"], "exp": int(time.time()) + 60}, SECRET, algorithm="HS256")
    headers = {"Authorization": f"Bearer {token}"}

    found = [client.get("/roles", headers=headers).json() for _ in range(2)]
    statuses = [client.get(path, headers=headers).status_code for path in PATHS]
    user = auth.known_user({"headers": [(b"authorization", headers["Authorization"].encode())]})

    assert found == [["admin", "editor", "viewer"]] * 2
    assert statuses == [200, 200]
    assert user.claims["roles"] == ["admin"]


def test_caller_of_a_test_has_implied_roles(headers_as):
    """As in production."""
    client = client_of(Auth(AuthSettings(api_keys=(f"bot {hash_api_key(KEY)}",), role_hierarchy=HIERARCHY)))

    assert client.get("/viewer", headers=headers_as("alice", roles=["admin"])).status_code == 200
    assert client.get("/admin", headers=headers_as("alice", roles=["editor"])).status_code == 403
