"""What a route requires of its caller, with and without a guard."""

import json
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import (
    ApiKey,
    Auth,
    CurrentUser,
    OptionalUser,
    User,
    current_user,
    hash_api_key,
    new_api_key,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.auth.rules import rule_of
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.openapi import add_problem_schemas

KEY = new_api_key()
CALLER = {"X-API-Key": KEY}


class Bot(User):
    @property
    def upper(self):
        return self.id.upper()


def find_key(digest):
    """Return the one key that there is."""
    known = {hash_api_key(KEY): ApiKey(name="bot", hash=digest, scopes={"a", "b"}, roles={"reader"})}
    return known.get(digest)


@pytest.fixture
def app():
    """An app with authentication and without a guard."""
    app = FastAPI()
    app.state.auth = Auth(find_key=find_key, user=Bot)
    add_problem_handlers(app)
    return app


@pytest.mark.parametrize(
    ("requirement", "met"),
    [
        (require_scopes("a"), True),
        (require_scopes("a", "b"), True),
        (require_scopes("a", "c"), False),
        (require_scopes("a", "c", match="any"), True),
        (require_scopes("c", "d", match="any"), False),
        (require_scopes("reader"), False),
        (require_roles("reader"), True),
        (require_roles("Reader"), False),
        (require_roles("read"), False),
        (require_roles("admin", "reader", match="any"), True),
        (require_roles("admin", "reader"), False),
    ],
)
def test_membership_is_exact(requirement, met):
    """In the names and in their case; all by default, or any."""
    user = User("bot", roles=frozenset({"reader"}), scopes=frozenset({"a", "b"}))

    if met:
        requirement.check(user)
    else:
        with pytest.raises(ProblemError) as caught:
            requirement.check(user)
        assert caught.value.status_code == 403


def test_challenge_names_the_missing_scopes():
    """As RFC 6750 section 3.1 has it; for roles there is none."""
    with pytest.raises(ProblemError) as scopes:
        require_scopes("write", "read").check(User("bot"))
    with pytest.raises(ProblemError) as roles:
        require_roles("admin").check(User("bot"))

    assert scopes.value.headers == {"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="read write"'}
    assert not roles.value.headers


@pytest.mark.parametrize("scope", ["lesen:€", 'a"', "a\\b", "a\r\nX: y", "read\n"])
def test_scope_with_other_characters_is_an_error(scope):
    """The challenge of a 403 could not be sent, or would be another one."""
    with pytest.raises(ConfigurationError, match="cannot be a scope"):
        require_scopes("read", scope)

    assert require_roles(scope).names == {scope}


@pytest.mark.parametrize("require", [require_roles, require_scopes])
@pytest.mark.parametrize("names", [(), ("",), ("a", "")])
def test_requirement_without_a_name_is_an_error(require, names):
    """It would let everybody pass, or nobody."""
    with pytest.raises(ConfigurationError, match="name at least one"):
        require(*names)


@pytest.mark.parametrize("match", ["All", "ALL", "", "none", True])
def test_other_match_is_an_error(match):
    """It would mean any."""
    with pytest.raises(ConfigurationError, match="use 'all' or 'any'"):
        require_roles("a", "b", match=match)


def test_method_of_an_object_cannot_be_marked():
    """The mark would be on the function of its class, and so on those of all objects."""

    class Views:
        async def get(self): ...

    with pytest.raises(ConfigurationError, match="cannot mark"):
        public(Views().get)


def test_only_public_makes_a_mark():
    """An object with any attribute has none."""

    class Proxy:
        def __getattr__(self, name):
            return True

    assert not rule_of(Proxy(), [Proxy()]).public
    assert rule_of(None, [public(Proxy())]).public


def test_requirements_hold_without_a_guard(app):
    """As dependencies, which return the caller."""

    @app.get("/read")
    async def read(user: Annotated[Bot, Depends(require_scopes("a"))]) -> str:
        return user.upper

    app.get("/write", dependencies=[Depends(require_scopes("w"))])(lambda: None)
    client = TestClient(app)

    assert [client.get(path).status_code for path in ("/read", "/write")] == [401, 401]
    assert client.get("/read", headers=CALLER).json() == "BOT"
    assert client.get("/write", headers=CALLER).status_code == 403


def test_caller_is_authenticated_once(app):
    """However many dependencies ask who it is."""
    asked = []
    app.state.auth = Auth(find_key=lambda digest: asked.append(digest) or find_key(digest))
    app.get("/", dependencies=[Depends(require_scopes("a")), Depends(require_roles("reader"))])(
        lambda user=Depends(current_user): user.id
    )

    assert TestClient(app).get("/", headers=CALLER).json() == "bot"
    assert len(asked) == 1


def test_public_route_of_create_app_may_ask_who_calls():
    """Then it needs a caller after all."""
    app = create_app(Settings(environment="test", rate_limit=None), auth=Auth(find_key=find_key))

    @app.get("/me")
    @public
    async def me(user: CurrentUser) -> str:
        return user.id

    client = TestClient(app)

    assert client.get("/me").status_code == 401
    assert client.get("/me", headers=CALLER).json() == "bot"


def test_caller_may_be_optional_without_a_guard(app):
    """None without credentials; wrong ones are refused."""

    @app.get("/")
    async def read(user: OptionalUser) -> str | None:
        return user and user.id

    client = TestClient(app)

    assert [client.get("/", headers=headers).json() for headers in ({}, CALLER)] == [None, "bot"]
    assert client.get("/", headers={"X-API-Key": "wrong"}).status_code == 401


def test_log_line_has_the_caller_of_a_dependency(capsys):
    """Of a public route, too."""
    app = create_app(Settings(environment="test", log={"format": "json"}), auth=Auth(find_key=find_key))

    @app.get("/")
    @public
    async def read(user: OptionalUser) -> str | None:
        return user and user.id

    client = TestClient(app)
    capsys.readouterr()
    client.get("/", headers=CALLER)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["user_id"] for line in lines if line["event"] == "request"] == ["bot"]


def test_caller_without_authentication_is_a_configuration_error():
    """It says what to set."""
    app = FastAPI()

    @app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    with pytest.raises(ConfigurationError, match="AUTH_ISSUER, AUTH_SECRET or AUTH_API_KEYS, or app"):
        TestClient(app).get("/me")


def test_websocket_has_a_caller(app):
    """The same dependency serves both."""

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, user: CurrentUser):
        await websocket.accept()
        await websocket.send_text(user.id)

    with TestClient(app).websocket_connect("/ws", headers=CALLER) as websocket:
        assert websocket.receive_text() == "bot"


def test_schema_shows_401_and_403_of_a_requirement(app):
    """Where it is, and nowhere else."""
    app.get("/closed", dependencies=[Depends(require_roles("admin"))])(lambda: None)
    app.get("/open")(lambda: None)
    add_problem_schemas(app)

    paths = app.openapi()["paths"]

    assert {"401", "403"} <= paths["/closed"]["get"]["responses"].keys()
    assert {"401", "403"}.isdisjoint(paths["/open"]["get"]["responses"])
