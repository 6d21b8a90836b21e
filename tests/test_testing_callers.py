"""Requests of any caller, in apps of every kind, and that nothing but the test's own tokens is accepted."""

import json
import time
from contextlib import asynccontextmanager
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from fastapi_prodkit import Settings, create_app, testing
from fastapi_prodkit.auth import (
    Auth,
    CurrentUser,
    User,
    current_user,
    guard_routes,
    hash_api_key,
    new_api_key,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.testing import ClientAs, HeadersAs, client_of

pytest_plugins = ["pytester"]

# The fixtures, here in this process.
headers_as, client_as = testing.headers_as, testing.client_as

KEY = new_api_key()
ENTRY = f"bot {hash_api_key(KEY)} role=admin"
SECRET = "a-secret-of-at-least-thirty-two-bytes"


class Employee(User):
    @property
    def email(self) -> str:
        return self.claims["email"]


def add_routes(app, caller=current_user):
    @app.get("/me")
    async def me(user: Annotated[User, Depends(caller)]) -> dict:
        return {"id": user.id, "kind": user.kind, "roles": sorted(user.roles), "scopes": sorted(user.scopes)}

    @app.get("/admin", dependencies=[Depends(require_roles("admin"))])
    async def admin() -> str:
        return "admin"


def made(auth, **sections):
    app = create_app(Settings(environment="test", auth=auth, **sections))
    add_routes(app)
    return app


def guarded():
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = Auth(AuthSettings(api_keys=(ENTRY,)))
    guard_routes(app, app.state.auth)
    add_routes(app)
    return app


def alone():
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = Auth(AuthSettings(api_keys=(ENTRY,)))
    add_routes(app, app.state.auth.current_user)
    return app


APPS = {
    "keys": lambda: made({"api_keys": (ENTRY,)}),
    "secret": lambda: made({"secret": SECRET}),
    "issuer": lambda: made({"issuer": ("https://127.0.0.1:9/",), "audience": ("a",)}),
    "guarded": guarded,
    "alone": alone,
}


@pytest.fixture(params=APPS)
def app(request):
    """An app of each kind, with a guard and without one."""
    if request.param in ("secret", "issuer"):
        pytest.importorskip("jwt", reason="the extra auth is not installed")
    return APPS[request.param]()


async def test_client_is_of_the_caller(client_as: ClientAs):
    """Whatever the app accepts in production; a caller without the role is refused as ever."""
    async with client_as("alice", roles=["admin"], scopes=["b", "a"]) as alice, client_as("bob", kind="client") as bob:
        who = [(await client.get("/me")).json() for client in (alice, bob)]
        statuses = [(await client.get("/admin")).status_code for client in (alice, bob)]

    assert who == [
        {"id": "alice", "kind": "user", "roles": ["admin"], "scopes": ["a", "b"]},
        {"id": "bob", "kind": "client", "roles": [], "scopes": []},
    ]
    assert statuses == [200, 403]


async def test_client_without_an_id_is_anonymous(client_as: ClientAs):
    """It gets the challenge of the app."""
    async with client_as() as client:
        response = await client.get("/me")

    assert (response.status_code, response.headers["www-authenticate"][:6]) in [(401, "Bearer"), (401, "ApiKey")]


def test_headers_are_of_the_caller(app, headers_as: HeadersAs):
    """With any client, for all its requests or for one."""
    client = TestClient(app, headers=headers_as("alice"))

    first, second, third = client.get("/me"), client.get("/me", headers=headers_as("bob")), client.get("/me")

    assert [each.json()["id"] for each in (first, second, third)] == ["alice", "bob", "alice"]


@pytest.mark.parametrize("authorization", ["Bearer test.", f"Bearer test.{'0' * 64}", "Bearer alice", "Test alice"])
def test_other_credentials_are_verified(app, headers_as: HeadersAs, authorization):
    """While there are callers, too."""
    headers_as("alice", roles=["admin"])

    assert TestClient(app).get("/me", headers={"Authorization": authorization}).status_code == 401


def test_token_is_accepted_by_its_test_only(app):
    """Neither before the fixture is in use, nor after that, nor by the fixture of another test."""
    one, other = HeadersAs(), HeadersAs()
    headers = one("alice")
    client = TestClient(app)

    before = client.get("/me", headers=headers)
    with one.accepted():
        during = client.get("/me", headers=headers)
    with other.accepted():
        after = client.get("/me", headers=headers)

    assert [each.status_code for each in (before, during, after)] == [401, 200, 401]


@pytest.mark.parametrize("caller", [{"role": ["admin"]}, {"roles": "admin"}, {"scopes": "read write"}])
def test_wrong_keywords_are_errors_of_the_test(headers_as: HeadersAs, caller):
    """And not of the app, in which they would be a 500 or one role for each letter."""
    with pytest.raises(TypeError):
        headers_as("alice", **caller)


def test_caller_of_a_class_of_ones_own_has_claims(headers_as: HeadersAs):
    """They are those that the test gives."""
    app = FastAPI()
    app.state.auth = Auth(AuthSettings(api_keys=(ENTRY,)), user=Employee)
    guard_routes(app, app.state.auth)

    @app.get("/email")
    async def email(user: Annotated[Employee, Depends(current_user)]) -> str:
        return user.email

    client = TestClient(app, headers=headers_as("alice", claims={"email": "alice@example.com"}))

    assert client.get("/email").json() == "alice@example.com"


def test_dependency_that_was_made_before_knows_the_caller(headers_as: HeadersAs):
    """As in an app that was created when its module was imported."""
    auth = Auth(AuthSettings(api_keys=(ENTRY,)))
    original = auth.authenticate
    app = FastAPI()

    @app.get("/")
    async def read(user: Annotated[User | None, Depends(original)]) -> str | None:
        return user and user.id

    client = TestClient(app)

    assert client.get("/", headers=headers_as("alice")).json() == "alice"
    assert client.get("/").json() is None


def test_mounted_app_with_authentication_of_its_own_knows_the_caller(headers_as: HeadersAs):
    """Each `Auth` makes a user of its class."""
    app, inner = guarded(), FastAPI()
    inner.state.auth = Auth(AuthSettings(api_keys=(ENTRY,)), user=Employee)

    @inner.get("/class")
    async def kind(user: CurrentUser) -> str:
        return type(user).__name__

    app.mount("/inner", inner)

    assert TestClient(app).get("/inner/class", headers=headers_as("alice")).json() == "Employee"


def test_websocket_has_the_caller(headers_as: HeadersAs):
    """And is refused without one."""
    app = guarded()

    @app.websocket("/ws", dependencies=[Depends(require_scopes("chat"))])
    async def chat(websocket: WebSocket, user: CurrentUser):
        await websocket.accept()
        await websocket.send_text(user.id)
        await websocket.close()

    client = TestClient(app)
    headers = headers_as("alice", scopes=["chat"], expires_at=time.time() + 60)
    with client.websocket_connect("/ws", headers=headers) as websocket:
        assert websocket.receive_text() == "alice"
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/ws", headers=headers_as()):
        pass


def test_access_line_and_limits_are_as_ever(headers_as: HeadersAs, capsys):
    """The id of the caller is in the line, and the default limit counts."""
    app = made({"api_keys": (ENTRY,)}, log={"format": "json"}, rate_limit={"default": "2/minute"})
    client = TestClient(app, headers=headers_as("alice"))
    capsys.readouterr()

    statuses = [client.get(path).status_code for path in ("/me", "/admin", "/me")]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    served, refused, _ = [line for line in lines if line["event"] == "request"]

    assert statuses == [200, 403, 429]
    assert served["user_id"] == refused["user_id"] == "alice"
    assert "role admin" in refused["reason"]


async def test_clients_of_one_app_share_its_lifespan():
    """It runs once, and ends with the outermost client; then it may run again."""
    events = []

    @asynccontextmanager
    async def lifespan(app):
        events.append("started")
        yield {"shelf": 7}
        events.append("ended")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    @public
    async def read(request: Request) -> int:
        return request.state.shelf

    for _ in range(2):
        async with client_of(app) as outer:
            async with client_of(app, headers={"X": "1"}) as inner:
                assert [(await each.get("/")).json() for each in (outer, inner)] == [7, 7]
            assert (await outer.get("/")).json() == 7

    assert events == ["started", "ended"] * 2


@pytest.mark.system
@pytest.mark.parametrize("runner", ["asyncio", "anyio"])
def test_fixtures_work_in_a_project(pytester, monkeypatch, runner):
    """With the plugin, the project's own `app`, and any runner of asynchronous tests."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(
        """
        import pytest
        from fastapi import FastAPI
        from fastapi_prodkit.auth import Auth, CurrentUser, guard_routes

        pytest_plugins = ["fastapi_prodkit.testing"]

        @pytest.fixture
        def app():
            app = FastAPI()
            auth = app.state.auth = Auth(find_key=lambda hashed: None)
            guard_routes(app, auth)

            @app.get("/")
            async def read(user: CurrentUser) -> str:
                return user.id

            return app

        @pytest.fixture
        def anyio_backend():
            return "asyncio"
        """
    )
    pytester.makepyfile(
        f"""
        import pytest
        from fastapi.testclient import TestClient

        @pytest.mark.{runner}
        async def test_alice(client_as):
            async with client_as("alice") as alice:
                assert (await alice.get("/")).json() == "alice"

        def test_bob(app, headers_as):
            assert TestClient(app, headers=headers_as("bob")).get("/").json() == "bob"
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)
