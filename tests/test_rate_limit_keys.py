"""Rate limits for each caller, wherever the caller is."""

from typing import Annotated

import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.requests import HTTPConnection
from starlette.testclient import WebSocketDenialResponse

from fastapi_prodkit import _scope, testing
from fastapi_prodkit.auth import Auth, CurrentUser, OptionalUser, User, current_user, guard_routes, public
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit import RateLimit, RateLimitMiddleware, by_address, by_user

# The fixture, here in this process.
headers_as = testing.headers_as

ONE, OTHER = ("192.0.2.1", 1000), ("192.0.2.2", 1000)
LIMIT = "1/minute"


@pytest.fixture
def app():
    """An app whose routes are guarded."""
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = Auth(find_key=lambda hashed: None)
    guard_routes(app, app.state.auth)
    return app


def statuses(app, *requests, path="/"):
    """Return the statuses of requests, each with headers and an address."""
    return [TestClient(app, client=address).get(path, headers=headers).status_code for headers, address in requests]


def by_dependency(app):
    app.get("/", dependencies=[Depends(RateLimit(LIMIT, key=by_user))])(lambda: "ok")


def by_decorator(app):
    pytest.importorskip("slowapi", reason="the extra is not installed")
    from fastapi_prodkit.rate_limit import Limiter

    @app.get("/")
    @Limiter(key_func=by_user).limit(LIMIT)
    async def read(request: Request): ...


@pytest.mark.parametrize("limit", [by_dependency, by_decorator])
def test_each_caller_has_a_quota(app, headers_as, limit):
    """Two behind one address have two; one at two addresses has one."""
    limit(app)
    alice, bob = headers_as("alice"), headers_as("bob")

    assert statuses(app, (alice, ONE), (bob, ONE), (alice, ONE), (alice, OTHER), (bob, OTHER)) == [
        200,
        200,
        429,
        429,
        429,
    ]


def test_caller_is_an_issuer_a_kind_and_an_id(app, headers_as):
    """Another issuer's alice is somebody else, and so is an API key of this name."""
    by_dependency(app)
    callers = [
        headers_as("alice"),
        headers_as("alice", issuer="https://one.example.com/"),
        headers_as("alice", issuer="https://two.example.com/"),
        headers_as("alice", kind="key"),
        headers_as("alice", kind="client"),
    ]

    assert statuses(app, *((caller, ONE) for caller in callers)) == [200] * 5
    assert statuses(app, *((caller, ONE) for caller in callers)) == [429] * 5


def test_request_without_a_caller_counts_by_address(app, headers_as):
    """On a public route; its quota is not that of a caller at the same address."""

    @app.get("/", dependencies=[Depends(RateLimit(LIMIT, key=by_user))])
    @public
    async def read(user: OptionalUser): ...

    nobody, alice = {}, headers_as("alice")

    assert statuses(app, (nobody, ONE), (alice, ONE), (nobody, ONE), (nobody, OTHER)) == [200, 200, 429, 200]


def test_caller_of_a_public_route_that_does_not_ask_is_not_known(app, headers_as):
    """So requests count by address: whether the token is right is not found out."""
    app.get("/", dependencies=[Depends(RateLimit(LIMIT, key=by_user))])(public(lambda: "ok"))

    assert statuses(app, (headers_as("alice"), ONE), (headers_as("bob"), ONE)) == [200, 429]


@pytest.mark.parametrize("ask", ["app.state.auth", "auth"])
def test_dependency_further_up_is_enough_without_a_guard(headers_as, ask):
    """By `current_user`, and by the method of `Auth`."""
    app, auth = FastAPI(), Auth(find_key=lambda hashed: None)
    app.state.auth = auth
    add_problem_handlers(app)
    caller = current_user if ask == "app.state.auth" else auth.current_user
    app.get("/", dependencies=[Depends(caller), Depends(RateLimit(LIMIT, key=by_user))])(lambda: "ok")

    assert statuses(app, *((headers_as(name), ONE) for name in ("alice", "bob"))) == [200, 200]


def test_websockets_count_by_caller(app, headers_as):
    """As requests do."""

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, user: CurrentUser, _: Annotated[None, Depends(RateLimit(LIMIT, key=by_user))]):
        await websocket.accept()
        await websocket.send_text(user.id)
        await websocket.close()

    client = TestClient(app)
    alice, bob = headers_as("alice"), headers_as("bob")
    for headers, name in ((alice, "alice"), (bob, "bob")):
        with client.websocket_connect("/ws", headers=headers) as websocket:
            assert websocket.receive_text() == name
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws", headers=alice):
        pass

    assert refused.value.status_code == 429


def test_default_limit_takes_no_key():
    """It counts before a token is verified, so a key by user would always be the address."""
    with pytest.raises(ConfigurationError, match="key"):
        RateLimitMiddleware(FastAPI(), key=by_user)


def test_key_has_no_part_of_the_id():
    """An id may be an address of e-mail, and is not stored."""
    scope = {"type": "http", "headers": [], "client": ONE}
    connection = HTTPConnection(scope)
    assert by_user(connection) == by_address(connection)

    scope[_scope.USER] = None, User("alice@example.com")

    assert by_user(connection).startswith("#")
    assert "alice" not in by_user(connection)
