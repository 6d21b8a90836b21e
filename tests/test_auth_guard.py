"""Deny by default: which routes need a caller, and that nothing of a request happens before one is known."""

import json
from typing import Annotated

import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, WebSocket
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.routing import Host, Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.testclient import WebSocketDenialResponse

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import (
    Auth,
    CurrentUser,
    OptionalUser,
    current_user,
    guard_routes,
    hash_api_key,
    new_api_key,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.sections import AuthSettings

KEY = new_api_key()
CALLER = {"X-API-Key": KEY}
SETTINGS = AuthSettings(api_keys=(f"bot {hash_api_key(KEY)} scope=reports:read role=reader",))


@pytest.fixture(params=[True, False], ids=["index", "no index"])
def app(request):
    """An app whose routes are guarded, with the index of the routes and without it."""
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = Auth(SETTINGS)
    if request.param:
        index_routes(app)
    guard_routes(app, app.state.auth)
    return app


@pytest.fixture
def client(app):
    return TestClient(app, follow_redirects=False)


def answer():
    return "served"


def statuses(client, path, method="GET"):
    """Return the statuses without a caller, and with one."""
    return [client.request(method, path, headers=headers).status_code for headers in ({}, CALLER)]


async def status_before_the_body(app, path, headers=()):
    """Return the status of a POST whose body may not be asked for."""
    sent = []

    async def receive():
        raise AssertionError("the body was asked for")

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": list(headers),
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return sent[0]["status"]


def test_route_needs_a_caller(app, client):
    """A 401 names what may be sent, and the handler knows the caller."""

    @app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    refused, served = client.get("/me"), client.get("/me", headers=CALLER)

    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "ApiKey")
    assert (served.status_code, served.json()) == (200, "bot")


def test_wrong_key_is_refused(app, client):
    """With 401, and without the handler."""
    app.get("/me")(answer)

    assert client.get("/me", headers={"X-API-Key": KEY[:-1]}).status_code == 401


def test_public_endpoint_needs_no_caller(app, client):
    """Whatever credentials are sent, which are not looked at."""
    app.get("/prices")(public(lambda: "p"))

    answers = [client.get("/prices", headers=headers) for headers in ({}, CALLER, {"X-API-Key": "wrong"})]

    assert [each.status_code for each in answers] == [200, 200, 200]


def test_public_router_needs_no_caller(app, client):
    """Also for routes that it gets after it was included, and for those of routers inside of it."""
    outer, inner = public(APIRouter(prefix="/outer")), APIRouter(prefix="/inner")
    outer.include_router(inner)
    app.include_router(outer)
    outer.get("/late")(answer)
    inner.get("/late")(answer)

    assert statuses(client, "/outer/late") == [200, 200]
    assert statuses(client, "/outer/inner/late") == [200, 200]


def test_router_beside_a_public_one_is_closed(app, client):
    """A mark is for its own router only."""
    shared = APIRouter()
    shared.get("/shared")(answer)
    app.include_router(public(APIRouter()), prefix="/open")
    app.include_router(shared, prefix="/closed")

    assert statuses(client, "/closed/shared") == [401, 200]


def test_requirement_wins_over_public(app, client):
    """A role that a route of a public router requires is required all the same."""
    router = public(APIRouter())
    router.get("/admin", dependencies=[Depends(require_roles("admin"))])(answer)
    app.include_router(router)

    assert statuses(client, "/admin") == [401, 403]


def test_requirements_of_app_router_and_route_add_up(app, client):
    """All of them must be met."""
    router = APIRouter(dependencies=[Depends(require_roles("reader"))])
    router.get("/read", dependencies=[Depends(require_scopes("reports:read"))])(answer)
    router.get("/write", dependencies=[Depends(require_scopes("reports:write"))])(answer)
    app.include_router(router)

    assert statuses(client, "/read") == [401, 200]
    assert statuses(client, "/write") == [401, 403]


def test_body_is_not_received_before_a_caller_is_known(app, client):
    """Nor is it parsed, so an invalid body is a 401 and not a 422."""
    received = []

    def body():
        received.append("body")
        yield b"{"

    app.post("/reports")(lambda report=Body(): report)

    refused = client.post("/reports", content=body(), headers={"Content-Type": "application/json"})
    forbidden = client.post("/reports", content=b"{", headers={"Content-Type": "application/json", **CALLER})

    assert (refused.status_code, forbidden.status_code) == (401, 422)


async def test_server_is_not_asked_for_the_body_of_a_refused_request(app):
    """`receive` is never called."""
    app.post("/reports")(lambda report=Body(): report)

    assert await status_before_the_body(app, "/reports") == 401


WRONG = {"X-API-Key": f"{KEY[:-1]}x"}


async def test_public_route_that_needs_a_caller_is_refused_before_the_body(app):
    """The guard sees the dependency; so it does where a caller is optional, if credentials are wrong."""

    @app.post("/mine")
    @public
    async def mine(user: CurrentUser, report: Annotated[str, Body()]): ...

    @app.post("/known")
    @public
    async def known(user: OptionalUser, report: Annotated[str, Body()]): ...

    wrong = [(b"x-api-key", WRONG["X-API-Key"].encode())]

    assert await status_before_the_body(app, "/mine") == 401
    assert await status_before_the_body(app, "/known", wrong) == 401


def test_public_route_may_know_its_caller(app, client):
    """It is served without one; wrong credentials are refused, unlike on a public route that does not ask."""

    @app.get("/prices")
    @public
    async def prices(user: OptionalUser) -> str | None:
        return user and user.id

    assert [client.get("/prices", headers=headers).json() for headers in ({}, CALLER)] == [None, "bot"]
    assert client.get("/prices", headers=WRONG).status_code == 401


def test_optional_caller_does_not_open_a_route(app, client):
    """Only `public` does, and the default."""

    @app.get("/prices")
    async def prices(user: OptionalUser): ...

    assert statuses(client, "/prices") == [401, 200]


def test_unknown_path_is_a_404_without_a_caller(client):
    """Nothing serves it, so there is nothing to protect."""
    assert statuses(client, "/nope") == [404, 404]


def test_other_method_needs_a_caller(app, client):
    """As the route does, so that a 405 tells nobody more."""
    app.get("/me")(answer)

    assert statuses(client, "/me", "DELETE") == [401, 405]


def test_redirect_of_a_slash_needs_no_caller(app, client):
    """It leads to a path that is guarded."""
    app.get("/me")(answer)

    assert statuses(client, "/me/") == [307, 307]


def test_path_with_a_line_break_is_guarded(app, client):
    """Starlette's routes match it, and the index leaves it to the router."""
    app.get("/me")(answer)

    assert statuses(client, "/me%0A") == [401, 200]


def test_route_that_is_added_later_is_guarded(app, client):
    """Before and after the first request."""
    assert statuses(client, "/late") == [404, 404]

    app.get("/late")(answer)

    assert statuses(client, "/late") == [401, 200]


def test_path_that_middleware_rewrites_is_guarded_as_what_it_becomes(app):
    """The guard is inside of the app's middleware."""

    class Rewriting:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/prices":
                scope["path"] = "/me"
            await self.app(scope, receive, send)

    app.get("/me")(answer)
    app.get("/prices")(public(lambda: "p"))
    app.add_middleware(Rewriting)

    assert statuses(TestClient(app), "/prices") == [401, 200]


def test_mounted_app_needs_a_caller(app, client, tmp_path):
    """Whatever framework it is of."""
    (tmp_path / "a.txt").write_text("a")
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.mount("/open", public(StaticFiles(directory=tmp_path)))

    assert statuses(client, "/static/a.txt") == [401, 200]
    assert statuses(client, "/open/a.txt") == [200, 200]


def test_mount_can_be_marked(app, client):
    """The route, in place of the app that it has."""
    app.router.routes.append(public(Mount("/open", PlainTextResponse("open"))))

    assert statuses(client, "/open/x") == [200, 200]


def test_mounted_fastapi_app_is_guarded_at_its_own_routes(app, client):
    """So its public endpoints are public."""
    inner = FastAPI()
    inner.get("/a")(answer)
    inner.get("/b")(public(lambda: "b"))
    app.mount("/sub", inner)

    assert statuses(client, "/sub/a") == [401, 200]
    assert statuses(client, "/sub/b") == [200, 200]
    assert statuses(client, "/sub/nope") == [404, 404]


def test_mount_with_middleware_is_one_route(app, client):
    """The middleware may answer by itself, in front of a guard inside."""
    inner = FastAPI()
    inner.get("/b")(public(lambda: "b"))
    app.router.routes.append(Mount("/sub", inner, middleware=[Middleware(Passing)]))

    assert statuses(client, "/sub/b") == [401, 200]


def test_object_with_a_fastapi_app_inside_is_one_route(app, client):
    """It may answer by itself, or choose another app."""
    app.mount("/sub", Passing(FastAPI()))
    app.mount("/dashboard", Passing(app))

    assert statuses(client, "/sub/docs") == [401, 200]
    assert statuses(client, "/dashboard/docs")[0] == 401


def test_mounted_app_that_is_exchanged_is_guarded(app, client):
    """Each request asks whether the app that is mounted now has a guard."""
    mount = Mount("/sub", FastAPI())
    app.router.routes.append(mount)
    assert statuses(client, "/sub/a") == [404, 404]

    mount.app = FastAPI()
    mount.app.get("/a")(answer)
    assert statuses(client, "/sub/a") == [401, 200]

    mount.app.router = APIRouter()
    mount.app.router.get("/a")(answer)
    mount.app.middleware_stack = None
    assert statuses(client, "/sub/a") == [401, 200]


def test_mounted_app_with_authentication_of_its_own_uses_that(app, client):
    """A role of one is no role of the other, in the guard and in dependencies."""
    key = new_api_key()
    inner = FastAPI()
    inner.state.auth = Auth(AuthSettings(api_keys=(f"inner {hash_api_key(key)} role=reader",)))
    inner.get("/a", dependencies=[Depends(require_roles("reader"))])(lambda user=Depends(current_user): user.id)
    app.mount("/sub", inner)

    assert statuses(client, "/sub/a") == [401, 401]
    assert client.get("/sub/a", headers={"X-API-Key": key}).json() == "inner"


@pytest.mark.parametrize("default", ["required", "optional"])
def test_app_of_its_own_authentication_is_guarded_from_the_first_request_on(default):
    """Also if only the router can tell that this request, whose path has a line break, is for it."""
    app, inner = FastAPI(), FastAPI()
    guard_routes(app, Auth(SETTINGS, default=default))
    inner.state.auth = Auth(AuthSettings(api_keys=(f"inner {hash_api_key(new_api_key())}",)))
    inner.get("/files/{path:path}")(answer)
    app.mount("/sub", inner)

    assert statuses(TestClient(app), "/sub/files/a%0A") == [401, 401]


def test_app_that_is_mounted_under_two_guards_is_an_error(app, client):
    """Whose users are admitted must not depend on which request comes first."""
    inner, other = FastAPI(), FastAPI()
    inner.get("/a")(answer)
    for outer in (app, other):
        outer.mount("/sub", inner)
    guard_routes(other, Auth(AuthSettings(api_keys=(f"other {hash_api_key(new_api_key())}",))))

    assert statuses(client, "/sub/a") == [401, 200]
    with pytest.raises(ConfigurationError, match="another Auth"):
        TestClient(other).get("/sub/a")


def test_public_route_of_a_mounted_app_may_ask_who_calls(app, client):
    """The guard's own authentication is asked, if the app has none."""
    inner = FastAPI()
    inner.get("/me")(public(me))
    app.mount("/sub", inner)

    assert statuses(client, "/sub/me") == [401, 200]


async def me(user: CurrentUser) -> str:
    return user.id


def test_app_that_an_included_router_mounts_is_guarded(app, client, tmp_path):
    """As one that the app mounts itself."""
    (tmp_path / "a.txt").write_text("a")
    inner, router = FastAPI(), APIRouter()
    inner.get("/b")(public(lambda: "b"))
    inner.get("/c")(answer)
    router.mount("/inner", inner)
    router.mount("/open", public(StaticFiles(directory=tmp_path)))
    router.mount("/closed", StaticFiles(directory=tmp_path))
    app.include_router(router, prefix="/v1")

    assert statuses(client, "/v1/inner/b") == [200, 200]
    assert statuses(client, "/v1/inner/c") == [401, 200]
    assert statuses(client, "/v1/open/a.txt") == [200, 200]
    assert statuses(client, "/v1/closed/a.txt") == [401, 200]


class Passing:
    """Middleware that changes nothing."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


def test_public_mounted_app_is_not_guarded(app, client):
    """Its routes need no caller, and what they require is required by their dependencies."""
    inner = public(FastAPI())
    inner.state.auth = app.state.auth
    inner.get("/a")(answer)
    inner.get("/b", dependencies=[Depends(require_roles("reader"))])(answer)
    app.mount("/sub", inner)

    assert statuses(client, "/sub/a") == [200, 200]
    assert statuses(client, "/sub/b") == [401, 200]


def test_host_is_guarded(app, client):
    """As a mount is."""
    app.router.routes.append(Host("testserver", PlainTextResponse("host")))

    assert statuses(client, "/anything") == [401, 200]


def test_plain_route_can_be_public(app, client):
    """Routes of Starlette have no dependencies, so only the mark counts."""
    app.router.routes.append(Route("/closed", lambda _: PlainTextResponse("c")))
    app.router.routes.append(Route("/open", public(lambda _: PlainTextResponse("o"))))

    assert statuses(client, "/closed") == [401, 200]
    assert statuses(client, "/open") == [200, 200]


def test_route_of_an_unknown_class_is_guarded(app, client):
    """Only the router can tell what it matches, so a mark does not count."""

    class Odd(Route):
        def matches(self, scope):
            return super().matches(scope)

    app.router.routes.append(Odd("/odd", lambda _: PlainTextResponse("odd")))
    app.router.routes.append(Odd("/open", public(lambda _: PlainTextResponse("open"))))

    assert statuses(client, "/odd") == [401, 200]
    assert statuses(client, "/open") == [401, 200]


def test_public_route_that_does_not_match_in_its_own_way_opens_nothing(app, client):
    """Such as one of an old version, in front of a closed route of the same path."""

    class Versioned(APIRoute):
        def matches(self, scope):
            return super().matches(scope) if b"x-version" in dict(scope["headers"]) else (Match.NONE, {})

    old = APIRouter(route_class=Versioned)
    old.get("/thing")(public(lambda: "old"))
    app.include_router(old)
    app.get("/thing")(answer)

    assert statuses(client, "/thing") == [401, 200]


def test_app_behind_the_router_needs_a_caller(app, client):
    """What the router calls for a path without a route is a handler, if it is not its own 404."""
    app.router.default = PlainTextResponse("legacy")
    app.get("/me")(answer)

    assert statuses(client, "/legacy") == [401, 200]
    assert statuses(client, "/me/") == [401, 307]


def test_route_that_is_replaced_by_an_equal_one_is_noticed(app, client):
    """Routes are equal if path, endpoint and methods are, whatever they require."""
    app.get("/me")(answer)
    assert statuses(client, "/me") == [401, 200]

    place = next(place for place, route in enumerate(app.router.routes) if getattr(route, "path", "") == "/me")
    app.router.routes[place] = APIRoute("/me", answer, dependencies=[Depends(require_roles("admin"))])

    assert statuses(client, "/me") == [401, 403]


def test_everything_of_an_included_router_can_be_public(app, client):
    """WebSockets, routes of Starlette, and apps that it mounts."""
    router = APIRouter()

    @router.websocket("/ws")
    @public
    async def ws(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    class Endpoint(HTTPEndpoint):
        async def get(self, _):
            return PlainTextResponse("class")

    router.add_route("/plain", public(lambda _: PlainTextResponse("plain")))
    router.add_route("/class", public(Endpoint))
    router.mount("/mounted", public(Passing(PlainTextResponse("mounted"))))
    app.include_router(router, prefix="/v1")

    with client.websocket_connect("/v1/ws"):
        pass
    assert [client.get(f"/v1/{path}").status_code for path in ("plain", "class", "mounted/x")] == [200, 200, 200]


def test_requirement_of_an_included_websocket_is_checked(app, client):
    """By the guard, before the handshake reaches the app."""
    router = APIRouter()

    @router.websocket("/ws", dependencies=[Depends(require_roles("admin"))])
    async def ws(websocket: WebSocket):
        await websocket.accept()

    app.include_router(router)

    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws", headers=CALLER):
        pass
    assert refused.value.status_code == 403


def test_files_of_a_front_end_need_a_caller(app, client, tmp_path):
    """Only the router knows them."""
    (tmp_path / "index.html").write_text("<p>hello")
    app.frontend("/", directory=tmp_path)

    assert statuses(client, "/index.html") == [401, 200]


def test_websocket_needs_a_caller(app, client):
    """The handshake is refused with 401."""

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, user: CurrentUser):
        await websocket.accept()
        await websocket.send_text(user.id)
        await websocket.close()

    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
        pass
    with client.websocket_connect("/ws", headers=CALLER) as websocket:
        text = websocket.receive_text()

    assert (refused.value.status_code, text) == (401, "bot")


def test_second_guard_does_nothing(app, client):
    """Unless it is of another Auth, which is an error."""
    guard_routes(app, app.state.auth)
    app.get("/me")(answer)

    assert statuses(client, "/me") == [401, 200]
    with pytest.raises(ConfigurationError, match="another Auth"):
        guard_routes(app, Auth(AuthSettings(api_keys=(f"other {hash_api_key(new_api_key())}",))))


def test_router_that_cannot_be_guarded_is_an_error(app):
    """It is not served without a guard."""

    class OwnRouter(APIRouter):
        async def app(self, scope, receive, send): ...

    other = FastAPI()
    other.router = OwnRouter()

    with pytest.raises(ConfigurationError, match="cannot be guarded"):
        guard_routes(other, app.state.auth)


def test_route_is_searched_once_for_guard_and_router(monkeypatch):
    """The index serves what the guard has decided about."""
    app = FastAPI()
    index_routes(app)
    guard_routes(app, Auth(SETTINGS))
    app.get("/me")(answer)
    asked = []
    matches = APIRoute.matches
    monkeypatch.setattr(APIRoute, "matches", lambda route, scope: asked.append(route.path) or matches(route, scope))

    assert statuses(TestClient(app), "/me") == [401, 200]
    assert asked == ["/me", "/me"]


def test_rules_are_bounded(app, client, monkeypatch):
    """Routes that come and go take no memory for ever."""
    monkeypatch.setattr("fastapi_prodkit.auth.guard._MOST_RULES", 1)
    for name in ("a", "b", "c"):
        app.get(f"/{name}")(answer)
        assert statuses(client, f"/{name}") == [401, 200]

    guard = app.router.middleware_stack

    assert len(guard._rules) == 1


@pytest.fixture(params=["setting", "argument"])
def optional_app(request):
    """An app whose routes need no caller by default."""
    if request.param == "setting":
        auth = Auth(AuthSettings(api_keys=SETTINGS.api_keys, default="optional"))
    else:
        auth = Auth(SETTINGS, default="optional")
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = auth
    guard_routes(app, auth)
    return app


@pytest.fixture
def optional_client(optional_app):
    return TestClient(optional_app, follow_redirects=False)


def test_caller_is_optional_by_default(optional_app, optional_client):
    """It is known if there is one, and wrong credentials are refused."""

    @optional_app.get("/prices")
    async def prices(user: OptionalUser) -> str | None:
        return user and user.id

    optional_app.get("/plain")(answer)

    assert [optional_client.get("/prices", headers=headers).json() for headers in ({}, CALLER)] == [None, "bot"]
    for path in ("/prices", "/plain"):
        assert optional_client.get(path, headers=WRONG).status_code == 401
        assert statuses(optional_client, path) == [200, 200]


async def test_route_with_a_rule_needs_a_caller_where_it_is_optional(optional_app, optional_client):
    """Before the body is received."""

    @optional_app.post("/mine")
    async def mine(user: CurrentUser) -> str:
        return user.id

    optional_app.post("/write", dependencies=[Depends(require_scopes("reports:write"))])(answer)
    optional_app.post("/read", dependencies=[Depends(require_roles("reader"))])(answer)

    assert [await status_before_the_body(optional_app, path) for path in ("/mine", "/write", "/read")] == [401] * 3
    assert [statuses(optional_client, path, "POST")[1] for path in ("/mine", "/write", "/read")] == [200, 403, 200]


def test_mounts_follow_the_default(optional_app, optional_client, tmp_path):
    """Files, a FastAPI app with its own rules, and one with authentication of its own, whose default counts there."""
    (tmp_path / "a.txt").write_text("a")
    optional_app.mount("/files", StaticFiles(directory=tmp_path))
    inner, strict = FastAPI(), FastAPI()
    inner.get("/a")(answer)
    inner.get("/mine", dependencies=[Depends(current_user)])(answer)
    strict.state.auth = Auth(SETTINGS)
    strict.get("/a")(answer)
    optional_app.mount("/inner", inner)
    optional_app.mount("/strict", strict)

    assert optional_client.get("/files/a.txt", headers=WRONG).status_code == 401
    assert [statuses(optional_client, path)[0] for path in ("/files/a.txt", "/inner/a")] == [200, 200]
    assert [statuses(optional_client, path) for path in ("/inner/mine", "/strict/a")] == [[401, 200]] * 2


def test_what_only_the_router_can_tell_follows_the_default(optional_app, optional_client, tmp_path):
    """Such as the files of a front end, and an app behind the router."""
    (tmp_path / "index.html").write_text("<html>")
    optional_app.frontend("/", directory=tmp_path)

    assert statuses(optional_client, "/") == [200, 200]
    assert optional_client.get("/", headers=WRONG).status_code == 401


def test_docs_follow_the_default():
    """In production, too, if they are there."""
    client = TestClient(service("prod", AuthSettings(api_keys=SETTINGS.api_keys, default="optional")))

    assert [client.get(path).status_code for path in ("/docs", "/openapi.json")] == [200] * 2


def service(environment="test", section=SETTINGS, **keywords):
    settings = Settings(environment=environment, docs={}, hosts={"allowed": ["testserver"]}, metrics=None, auth=section)
    return create_app(settings, **keywords)


def test_create_app_guards_all_routes_but_the_probes():
    """The caller is on the access line, and readiness knows the issuers."""
    app = service()
    app.get("/me")(answer)

    with TestClient(app) as client:
        assert statuses(client, "/me") == [401, 200]
        assert statuses(client, "/health") == [200, 200]
        assert "auth" in client.get("/ready").json()["checks"]


def test_router_that_replaces_another_is_guarded():
    """When the app starts, however late that is; one that cannot be guarded is not served."""

    class OwnRouter(APIRouter):
        async def app(self, scope, receive, send): ...

    app = service()
    app.router = APIRouter()
    app.router.get("/me")(answer)
    assert statuses(TestClient(app), "/me") == [401, 200]

    app.router = OwnRouter()
    app.middleware_stack = None
    with pytest.raises(ConfigurationError, match="cannot be guarded"):
        TestClient(app).get("/me")


def test_access_line_has_the_caller_and_the_reason(capsys):
    """A refused request has a reason in place of the caller."""
    app = create_app(Settings(environment="test", auth=SETTINGS, log={"format": "json"}))
    app.get("/me")(answer)
    client = TestClient(app)
    capsys.readouterr()

    statuses(client, "/me")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    refused, served = [line for line in lines if line["event"] == "request"]
    assert (refused["reason"], "user_id" in refused) == ("there are no credentials", False)
    assert served["user_id"] == "bot"


@pytest.mark.parametrize(("environment", "expected"), [("test", 200), ("prod", 401)])
def test_docs_need_a_caller_in_production(environment, expected):
    """They are open in dev and test."""
    client = TestClient(service(environment))

    assert [client.get(path).status_code for path in ("/docs", "/openapi.json")] == [expected] * 2


def test_given_auth_is_used():
    """With a class of users of one's own."""
    app = service(auth=Auth(find_key=lambda digest: None))
    app.get("/me")(answer)

    assert statuses(TestClient(app), "/me") == [401, 401]
