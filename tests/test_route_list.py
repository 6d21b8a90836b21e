"""The list of routes: what it says about a route is what a client meets, and what a review sees of a change."""

import asyncio
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed import ask
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit._route_list.check import changes, check_routes, differences
from fastapi_prodkit._route_list.listing import defaults_of, list_routes
from fastapi_prodkit._route_list.lock import Line, command_in, lines_of, read_lines, write_lines
from fastapi_prodkit.auth import (
    Auth,
    CurrentUser,
    current_user,
    guard_routes,
    hash_api_key,
    new_api_key,
    optional_user,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware, Timeout
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.health import health_router
from fastapi_prodkit.metrics import metrics_router
from fastapi_prodkit.rate_limit import RateLimit, RateLimitMiddleware
from fastapi_prodkit.sections import AuthSettings, MetricsSettings

KEY = new_api_key()
AUTH = AuthSettings(api_keys=(f"bot {hash_api_key(KEY)} role=reader",))


def answer():
    return "served"


def guarded(default=None):
    """Return a plain app whose routes need a caller."""
    app = FastAPI(openapi_url=None)
    app.state.auth = Auth(AUTH, default=default)
    add_problem_handlers(app)
    guard_routes(app, app.state.auth)
    return app


def made(**options):
    """Return an app of `create_app` whose routes need a caller."""
    return create_app(Settings(environment="test", auth=AUTH, **options))


def rows(app):
    """Return the rows by method and path."""
    return {f"{each.method} {each.path}": each for each in list_routes(app)}


def rules(app):
    """Return the rules by method and path."""
    return {route: row.rule for route, row in rows(app).items()}


def texts(app):
    """Return the lines of the file."""
    return [each.text for each in lines_of(list_routes(app))]


def without_rule(app):
    """Return the routes without an explicit rule."""
    return [each.route for failure in check_routes(list_routes(app), None, strict=True) for each in failure.findings]


# --- rules


@pytest.mark.parametrize(
    ("dependencies", "rule"),
    [
        ([], "any user"),
        ([require_roles("editor")], "role editor"),
        ([require_roles("b", "c", "a")], "roles a and b and c"),
        ([require_roles("b", "a", match="any")], "roles a or b"),
        ([require_scopes("x:write", "x:read")], "scopes x:read and x:write"),
        ([require_scopes("x"), require_roles("b"), require_roles("a"), require_roles("a")], "role a; role b; scope x"),
    ],
)
def test_rule_is_sorted_and_joined(dependencies, rule):
    """So that neither the order in the code nor that of a set changes it."""
    app = guarded()
    app.get("/a", dependencies=[Depends(each) for each in dependencies])(answer)

    assert rules(app) == {"GET /a": rule}


@pytest.mark.parametrize("place", ["endpoint", "router", "outer router"])
def test_public_routes_are_listed_as_such(place):
    """Wherever the mark is; a role that they require wins."""
    app, outer, inner = guarded(), APIRouter(), APIRouter()
    endpoint = partial(answer)
    public({"endpoint": endpoint, "router": inner, "outer router": outer}[place])
    inner.add_api_route("/a", endpoint)
    inner.add_api_route("/b", endpoint, dependencies=[Depends(require_roles("admin"))])
    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")

    assert rules(app) == {"GET /v1/a": "public", "GET /v1/b": "role admin"}


def test_unguarded_app_says_so():
    """Except for routes that ask for a caller themselves, and those that are meant to be public."""
    auth, app = Auth(AUTH), FastAPI(openapi_url=None)
    app.get("/a")(answer)
    app.get("/b", dependencies=[Depends(auth.current_user)])(answer)
    app.get("/c", dependencies=[Depends(auth.authenticate)])(answer)
    app.get("/d", dependencies=[Depends(require_roles("admin"))])(answer)
    app.get("/e")(public(lambda: "open"))
    app.include_router(metrics_router(MetricsSettings(token="0123456789abcdef")))
    app.include_router(health_router())

    listed = rules(app)

    assert [listed[f"GET /{each}"] for each in "abcde"] == ["unguarded", "any user", "optional", "role admin", "public"]
    assert listed["GET /metrics"] == "METRICS_TOKEN"
    assert listed["GET /health"] == "probe"
    assert without_rule(app) == ["GET /a"]


def test_optional_callers_are_listed_as_such():
    """By default, which is no explicit rule, and on public routes that ask for the caller."""
    app, plain = guarded("optional"), Starlette(routes=[Route("/a", answer)])
    app.get("/a")(answer)
    app.get("/b", dependencies=[Depends(optional_user)])(public(partial_of(answer)))
    app.get("/c")(public(partial_of(answer)))
    app.get("/d", dependencies=[Depends(current_user)])(answer)
    app.mount("/e", plain)

    assert list(rules(app).values()) == ["optional", "optional", "public", "any user", "optional"]
    assert without_rule(app) == ["GET /a", "GET /e/a"]


def test_install_lists_the_routes_of_an_app():
    """With auth, and with the docs pages of the library."""
    app = FastAPI()
    app.get("/a")(answer)
    install(app, Settings(environment="prod", auth=AUTH, hosts=None, docs={}))

    listed = rules(app)

    assert (listed["GET /a"], listed["GET /docs"], listed["GET /health"]) == ("any user", "any user", "probe")


def test_routes_of_the_framework_are_listed():
    """The schema and the docs pages, which FastAPI adds, need a caller in a guarded app, and none in another one."""
    app, bare = FastAPI(), FastAPI()
    guard_routes(app, Auth(AUTH))

    assert rules(app) == dict.fromkeys(rules(bare), "any user")
    assert set(rules(bare)) == {"GET /docs", "GET /docs/oauth2-redirect", "GET /openapi.json", "GET /redoc"}
    assert without_rule(app) == []
    assert len(without_rule(bare)) == 4


def test_a_route_of_an_unknown_class_hides_what_follows():
    """Only the router can tell what serves a request, so that `public` has no effect behind such a route."""

    class Odd(APIRoute):
        def matches(self, scope):
            return super().matches(scope)

    app = guarded()
    app.get("/before")(public(lambda: "open"))
    app.router.add_api_route("/odd", public(lambda: "odd"), route_class_override=Odd)
    app.get("/behind")(public(lambda: "closed"))
    client = TestClient(app)

    assert rules(app) == {"GET /before": "public", "GET /odd": "any user", "GET /behind": "any user"}
    assert rows(app)["GET /odd"].note == "class Odd"
    assert [client.get(path).status_code for path in ("/before", "/odd", "/behind")] == [200, 401, 401]


def test_app_behind_a_route_of_an_unknown_class_has_its_own_users():
    """In addition to those of the app around it, unless the mounted app is public."""

    class Odd(Mount):
        def matches(self, scope):
            return super().matches(scope)

    app = guarded()
    for path, mark in (("/odd", lambda app: app), ("/open", public)):
        inner = FastAPI(openapi_url=None)
        inner.state.auth = Auth(AuthSettings(api_keys=(f"other {hash_api_key(new_api_key())}",)))
        inner.get("/a")(answer)
        inner.get("/b")(public(lambda: "open"))
        app.router.routes.append(Odd(path, app=mark(inner)))
    paths = ["/odd/a", "/odd/b", "/open/a", "/open/b"]
    client = TestClient(app)

    assert rules(app) == {f"GET {path}": "any user" for path in paths}
    assert [client.get(path).status_code for path in paths] == [401] * 4
    assert [client.get(path, headers={"X-API-Key": KEY}).status_code for path in paths] == [401, 200, 200, 200]


def test_what_only_the_router_can_tell_is_listed(tmp_path):
    """Files of a front end, a default app, a route without a path, and a router of a class of its own."""

    class Closed(BaseRoute):
        """A route of an unknown kind."""

    class OwnRouter(APIRouter):
        async def handle(self, scope, receive, send): ...

    app, router, own = guarded(), APIRouter(prefix="/shop"), OwnRouter()
    own.get("/a")(answer)
    router.frontend("/ui", directory=tmp_path)
    app.frontend("/", directory=tmp_path)
    app.include_router(router, prefix="/v1")
    app.include_router(own, prefix="/own")
    app.router.routes.append(Closed())
    app.router.default = PlainTextResponse("default")

    assert sorted(texts(app)) == [
        "ANY /*  any user  is class Closed",
        "ANY /*  any user  is default app",
        "ANY /own/*  any user  is class OwnRouter",
        "GET /*  any user  is frontend",
        "GET /v1/shop/ui/*  any user  is frontend",
    ]


# --- kinds of routes


def test_each_method_is_one_row():
    """GET includes HEAD; a class without methods has any; a WebSocket has a name of its own."""

    class Endpoint(HTTPEndpoint):
        pass

    app, router = guarded(), APIRouter()
    app.router.routes.append(Route("/plain", answer, methods=["GET"]))
    app.router.routes.append(Route("/class", Endpoint))
    router.api_route("/both", methods=["PUT", "POST"])(answer)
    router.api_route("/head", methods=["HEAD"])(answer)
    router.add_route("/included", answer, methods=["GET"])

    @router.websocket("/socket")
    async def socket(socket: WebSocket, user: CurrentUser): ...

    app.include_router(router)

    assert list(rows(app)) == [
        "POST /both",
        "PUT /both",
        "ANY /class",
        "HEAD /head",
        "GET /included",
        "GET /plain",
        "WEBSOCKET /socket",
    ]
    assert rows(app)["WEBSOCKET /socket"].explicit


def test_mounted_apps_are_listed_with_their_routes():
    """A FastAPI app as its own guard decides; in another one, as the mount does; what cannot be read is one row."""
    app, inner, own, wrapped = guarded(), FastAPI(openapi_url=None), guarded(), FastAPI(openapi_url=None)
    for each in (inner, own, wrapped):
        each.get("/a")(answer)
        each.get("/b")(public(lambda: "open"))
    plain = Starlette(routes=[Route("/a", answer)])
    app.mount("/inner", inner)
    app.mount("/own", public(own))
    app.mount("/open", public(plain))
    app.mount("/files", public(StaticFiles(directory=Path(__file__).parent)))
    app.router.routes.append(Mount("/wrapped", app=wrapped, middleware=[Middleware(BodyLimitMiddleware)]))
    app.router.routes.append(Mount("/routes", routes=[Route("/a", answer)]))
    app.router.routes.append(Host("api.test", app=inner))

    assert rules(app) == {
        "GET //api.test/a": "any user",
        "GET //api.test/b": "public",
        "ANY /files/*": "public",
        "GET /inner/a": "any user",
        "GET /inner/b": "public",
        "GET /open/a": "public",
        "GET /own/a": "any user",
        "GET /own/b": "public",
        "GET /routes/a": "any user",
        "ANY /wrapped/*": "any user",
        "GET /wrapped/a": "any user",
        "GET /wrapped/b": "any user",
    }
    assert rows(app)["ANY /files/*"].note == "app StaticFiles"
    assert rows(app)["ANY /wrapped/*"].note == "app BodyLimitMiddleware"


class Answering:
    """Middleware that answers by itself."""

    def __init__(self, app=None):
        self.app = app

    async def __call__(self, scope, receive, send):
        await PlainTextResponse("answered")(scope, receive, send)


class AnsweringRouter(Answering, Router):
    def __init__(self):
        Router.__init__(self)


class AnsweringApp(Answering, Starlette):
    def __init__(self):
        Starlette.__init__(self)


@pytest.mark.parametrize("mounted", [Answering(Starlette()), AnsweringRouter(), AnsweringApp()])
def test_what_may_answer_without_a_route_is_one_row(mounted):
    """Otherwise nobody would see that it is open."""
    app = guarded()
    app.mount("/m", public(mounted))

    assert texts(app) == [f"ANY /m/*  public  is app {type(mounted).__name__}"]
    assert TestClient(app).get("/m/any").text == "answered"


@pytest.mark.parametrize("around", [Answering, lambda app: app])
def test_app_inside_of_itself_is_one_row(around):
    """Such as a dashboard that is given the app whose routes it shows."""
    app = guarded()
    app.get("/a")(answer)
    app.mount("/m", around(app))

    assert rules(app) == {"GET /a": "any user", "ANY /m/*": "any user"}


def test_management_routes_have_rules_of_their_own():
    """In front of the guard, in mounted apps too; not those that a route of the app overrides."""
    app = made(metrics={"token": "0123456789abcdef", "public": False}, log={"level_token": "0123456789abcdef"})
    app.get("/ready")(answer)
    app.mount("/inner", made(metrics={"public": True}))

    listed = rows(app)

    assert {route: row.rule for route, row in listed.items() if row.by_settings and "/docs" not in route} == {
        "GET /health": "probe",
        "GET /inner/health": "probe",
        "GET /inner/metrics": "public",
        "GET /inner/openapi.json": "public",
        "GET /inner/ready": "probe",
        "GET /inner/startup": "probe",
        "DELETE /log-level": "LOG_LEVEL_TOKEN",
        "GET /log-level": "LOG_LEVEL_TOKEN",
        "POST /log-level": "LOG_LEVEL_TOKEN",
        "GET /metrics": "METRICS_TOKEN",
        "GET /openapi.json": "public",
        "GET /startup": "probe",
    }
    assert (listed["GET /ready"].rule, listed["GET /ready"].by_settings) == ("any user", False)
    assert without_rule(app) == ["GET /ready"]
    assert texts(app) == ["GET /ready  any user"]


def test_management_routes_of_a_mounted_app_need_the_caller_that_the_mount_needs():
    """A mount with middleware is closed, and all that is in it."""
    app = guarded()
    app.router.routes.append(
        Mount("/inner", app=create_app(Settings(environment="test")), middleware=[Middleware(BodyLimitMiddleware)])
    )

    client = TestClient(app)

    assert rules(app)["GET /inner/health"] == "any user; probe"
    assert client.get("/inner/health").status_code == 401
    assert client.get("/inner/health", headers={"X-API-Key": KEY}).status_code == 200


def test_schema_is_that_of_the_app():
    """Routes of an app without a schema, plain routes, and routes that are left out are hidden."""
    app, router = create_app(Settings(environment="test")), APIRouter()
    router.get("/shown")(answer)
    router.get("/hidden", include_in_schema=False)(answer)
    router.add_route("/plain", answer)
    app.include_router(router)
    closed, shown = FastAPI(openapi_url=None), FastAPI(docs_url=None, redoc_url=None)
    for each in (closed, shown):
        each.get("/a")(answer)
    app.mount("/closed", closed)
    app.mount("/inner", shown)

    in_schema = {route for route, row in rows(app).items() if row.in_schema}

    assert in_schema == {"GET /shown", "GET /inner/a"}
    assert [each for each in texts(app) if "hidden" in each] == ["GET /hidden  unguarded  hidden"]
    assert set(app.openapi()["paths"]) == {"/shown"}


# --- limits


def test_rate_limits_are_the_default_one_and_those_of_the_route():
    """Exempt routes are named, and limits are in one notation."""
    app = made(rate_limit={"default": "100 per 1 minute"})
    shared = RateLimit("1 per 5 second")
    app.get("/a")(answer)
    app.get("/b", dependencies=[Depends(RateLimit("2/second; 100 per hour")), Depends(shared), Depends(shared)])(answer)
    app.mount("/files", StaticFiles(directory=Path(__file__).parent))
    inner = FastAPI(openapi_url=None)
    inner.get("/a")(answer)
    inner.add_middleware(RateLimitMiddleware, default="7/day")
    app.mount("/inner", inner)

    limits = {route: row.limit for route, row in rows(app).items()}

    assert limits["GET /a"] == "default"
    assert limits["GET /b"] == "default; 2/second; 100/hour; 1/5 seconds"
    assert limits["ANY /files/*"] == limits["GET /docs"] == limits["GET /health"] == "exempt"
    assert limits["GET /openapi.json"] == "default"
    assert limits["GET /inner/a"] == "default; 7/day"
    assert defaults_of(app) == "rate limit 100/minute, deadline 30 s, body 1 MiB"


def test_limits_of_decorators_are_listed():
    """Those that apply to the method; not those of an endpoint that is exempt from all."""
    limiter = pytest.importorskip("fastapi_prodkit.rate_limit.slowapi").Limiter()

    def dynamic():
        return "9/minute"

    app = made(rate_limit={"default": "100/minute"})
    app.post("/a")(limiter.limit("5/minute")(limiter.limit("1/hour", methods=["GET"])(partial_of(answer))))
    app.get("/b")(limiter.limit("5/minute", override_defaults=True)(partial_of(answer)))
    app.get("/c")(limiter.exempt(limiter.limit("5/minute")(partial_of(answer))))
    app.get("/d")(limiter.limit(dynamic)(partial_of(answer)))

    limits = {route: row.limit for route, row in rows(app).items() if not row.by_settings}

    assert limits == {
        "POST /a": "default; 5/minute",
        "GET /b": "5/minute",
        "GET /c": "exempt",
        "GET /d": "default; dynamic()",
    }


def partial_of(endpoint):
    """Return a new function, because decorators mark it."""

    def new():
        return endpoint()

    return new


def test_the_file_does_not_depend_on_the_environment():
    """An environment without the default limit has the same lines, those of exempt routes included."""
    lines = []
    for default in ("100/minute", None):
        app = made(rate_limit={"default": default})
        app.get("/a")(answer)
        app.mount("/files", public(StaticFiles(directory=Path(__file__).parent)))
        lines.append(texts(app))

    assert lines[0] == lines[1] == ["GET /a  any user", "ANY /files/*  public  limit exempt  is app StaticFiles"]


def test_deadlines_are_the_default_one_or_that_of_the_route():
    """The innermost layer replaces those further out, and exempt paths have none."""
    app = made()
    app.get("/a")(answer)
    app.get("/b", dependencies=[Depends(Timeout(1)), Depends(Timeout(2.5))])(answer)
    app.get("/c", dependencies=[Depends(Timeout(None))])(answer)
    inner, unlimited = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    for each in (inner, unlimited):
        each.api_route("/a", methods=["GET", "POST"])(answer)
    inner.add_middleware(DeadlineMiddleware, request_timeout=7, exempt={"/a"})
    unlimited.add_middleware(DeadlineMiddleware, request_timeout=None)
    app.mount("/inner", inner)
    app.mount("/unlimited", unlimited)

    deadlines = {route: row.deadline for route, row in rows(app).items() if not row.by_settings}

    assert deadlines == {
        "GET /a": "default",
        "GET /b": "2.5 s",
        "GET /c": "none",
        "GET /inner/a": "none",
        "POST /inner/a": "7 s",
        "GET /unlimited/a": "none",
        "POST /unlimited/a": "none",
    }
    assert rows(app)["GET /health"].deadline == "none"


def test_bodies_are_the_default_one_or_that_of_the_route():
    """An argument of FastAPI replaces ours, and the smaller one of ours counts."""
    app = made()
    app.post("/a")(answer)
    app.post("/b", max_body_size=10 * 2**20)(answer)
    app.post("/c", max_body_size=1000)(answer)
    smaller, larger = FastAPI(openapi_url=None, max_body_size=2**11), FastAPI(openapi_url=None)
    smaller.post("/a")(answer)
    larger.post("/a")(answer)
    larger.add_middleware(BodyLimitMiddleware, max_body_size=2**30)
    app.mount("/smaller", smaller)
    app.mount("/larger", larger)

    bodies = {route: row.body for route, row in rows(app).items() if not row.by_settings}

    assert bodies == {
        "POST /a": "default",
        "POST /b": "10 MiB",
        "POST /c": "1000 B",
        "POST /larger/a": "default",
        "POST /smaller/a": "2 KiB",
    }


def test_app_without_layers_has_no_default():
    """Layers that were added to the app are the default of it; what is no class is left out."""
    app, limited = FastAPI(openapi_url=None), FastAPI(openapi_url=None, max_body_size=100)
    app.add_middleware(lambda app: app)
    limited.add_middleware(RateLimitMiddleware, default="3/minute")
    limited.add_middleware(BodyLimitMiddleware, max_body_size=None)
    for each in (app, limited):
        each.post("/a", dependencies=[Depends(Timeout(5))])(answer)

    assert defaults_of(app) == "rate limit none, deadline none, body none"
    assert defaults_of(limited) == "rate limit 3/minute, deadline none, body none"
    assert texts(app) == ["POST /a  unguarded"]
    assert rows(limited)["POST /a"].limit == "default"


# --- where


def test_source_is_below_the_current_directory(monkeypatch, tmp_path):
    """As git and editors name it; the module, for what is elsewhere."""
    app = FastAPI()
    app.get("/a")(partial(partial(answer)))
    app.mount("/b", StaticFiles(directory=tmp_path))
    app.frontend("/c", directory=tmp_path)

    monkeypatch.chdir(Path(__file__).parent)
    below = rows(app)
    monkeypatch.chdir(tmp_path)
    elsewhere = rows(app)

    assert below["GET /a"].source == f"test_route_list.py:{answer.__code__.co_firstlineno}"
    assert elsewhere["GET /a"].source == __name__
    assert below["GET /openapi.json"].source == "fastapi.applications"
    assert below["ANY /b/*"].source == "starlette.staticfiles"
    assert below["GET /c/*"].source == ""


# --- the file


def test_file_is_read_as_it_was_written(tmp_path):
    """With the command that writes it in its first line; other comments and empty lines are left out."""
    file, lines = tmp_path / "routes.lock", [Line("GET /a  public"), Line("GET /b  any user  limit 5/minute  hidden")]
    unknown = command_in(file)

    write_lines(file, lines, "fastapi-prodkit routes main:app --write")
    written = file.read_text()
    file.write_text(f"{written}\n# a comment\n")

    assert written.splitlines()[0] == "# Written by: fastapi-prodkit routes main:app --write"
    assert [each.text for each in read_lines(file)] == [each.text for each in lines]
    assert command_in(file) == "fastapi-prodkit routes main:app --write"
    assert unknown == f"fastapi-prodkit routes MODULE:APP --write --lock {file}"


CHANGES = [
    ("", "GET /a  public", "new route: public"),
    ("", "GET /a  role b  limit exempt  hidden", "new route: role b, limit exempt, hidden"),
    ("GET /a  public", "", "removed"),
    ("GET /a  role editor", "GET /a  public", "now public (was role editor)"),
    ("GET /a  any user  limit 5/minute", "GET /a  any user", "rate limit now default (was 5/minute)"),
    ("GET /a  any user", "GET /a  any user  limit exempt", "rate limit removed (was default)"),
    ("GET /a  any user", "GET /a  any user  deadline none", "deadline removed (was default)"),
    ("GET /a  any user  body 2 MiB", "GET /a  any user  body 9 GiB", "body limit now 9 GiB (was 2 MiB)"),
    ("GET /a  any user  hidden", "GET /a  any user", "now in the schema"),
    ("GET /a  any user", "GET /a  any user  hidden", "no longer in the schema"),
    ("GET /a  any user", "GET /a  any user  is frontend", "now frontend (was an ordinary route)"),
    ("GET /a  role a", "GET /a  role b  hidden", "now role b (was role a), no longer in the schema"),
    ("GET /a  public  hidden  body 1 B", "GET /a  public  body 1 B  hidden", "the line is written in another way"),
    ("GET /a  public\nGET /a  role b", "GET /a  public\nGET /a  any user", "now any user (was role b)"),
]


@pytest.mark.parametrize(("before", "after", "text"), CHANGES)
def test_changes_are_said_in_words(before, after, text):
    """One for each route, whatever has changed about it."""
    found = changes(map(Line, before.splitlines()), map(Line, after.splitlines()))

    assert [(each.route, each.text) for each in found] == [("GET /a", text)]


@pytest.mark.parametrize(
    ("before", "after", "opens"),
    [
        ("role a", "public", True),
        ("any user", "optional", True),
        ("any user", "unguarded", True),
        ("role a; scope b", "role a", True),
        ("roles a and b", "roles a or b", True),
        ("role a", "any user", True),
        ("any user", "role a", False),
        ("role a", "role a; role b", False),
        ("public", "any user", False),
        ("optional", "public", False),
        ("public", "public  limit exempt", True),
        ("public", "public  body 1 GiB", False),
    ],
)
def test_what_opens_comes_first(before, after, opens):
    """Before what closes, whatever the path."""
    found = changes(
        [Line("GET /a  public"), Line(f"GET /b  {before}")], [Line("GET /a  any user"), Line(f"GET /b  {after}")]
    )

    assert [each.route for each in found] == (["GET /b", "GET /a"] if opens else ["GET /a", "GET /b"])


def test_missing_file_is_a_difference(tmp_path):
    """With the command that writes it."""
    failure = differences([], tmp_path / "routes.lock")

    assert str(failure).startswith(f"{tmp_path}/routes.lock does not exist.\nWrite it, and commit it: fastapi-prodkit ")


def test_equal_routes_are_no_difference(tmp_path):
    """Also in another order, as after a move in the code."""
    apps = []
    for paths in ("abc", "cab"):
        app = guarded()
        for path in paths:
            app.get(f"/{path}")(answer)
        apps.append(app)
    write_lines(tmp_path / "routes.lock", lines_of(list_routes(apps[0])), "write")

    assert differences(list_routes(apps[1]), tmp_path / "routes.lock") is None


@pytest.mark.system
def test_file_is_equal_in_every_process(tmp_path):
    """Although sets have another order in each of them."""
    code = (
        "from fastapi import Depends; from fastapi_prodkit import *; from fastapi_prodkit.auth import *\n"
        "from fastapi_prodkit._route_list.listing import list_routes\n"
        "from fastapi_prodkit._route_list.lock import lines_of\n"
        "app = create_app(Settings(environment='test', auth={'secret': 'x' * 40}))\n"
        "names = [f'r{number}' for number in range(20)]\n"
        "app.api_route('/a', methods=['PUT', 'POST', 'DELETE'], dependencies=[Depends(require_roles(*names))])(print)\n"
        "print([each.text for each in lines_of(list_routes(app))])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]

    assert runs[0] == runs[1]
    assert "roles r0 and r1 and r10" in runs[0]


# --- the list and the guard


class Foreign(APIRoute):
    def matches(self, scope):
        return super().matches(scope)


class Through:
    """Middleware of a mount."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


KINDS = ["api", "api", "plain", "socket", "app", "starlette", "wrapped", "host", "router", "foreign"]
MARKS = ["", "", "public", "role", "optional", "caller"]
ENTRIES = st.recursive(
    st.tuples(st.sampled_from(["api", "plain", "socket", "foreign"]), st.sampled_from(MARKS), st.just(())),
    lambda inner: st.tuples(st.sampled_from(KINDS), st.sampled_from(MARKS), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=8,
)


DEPENDENCIES = {"role": require_roles("admin"), "optional": optional_user, "caller": current_user}


def fill(router, entries, names, auth):
    """Add routes to a router; each has a path of its own, without parameters."""
    for kind, mark, inside in entries:
        path = f"/{next(names)}"
        marked = public if mark == "public" else lambda target: target
        marked = public if mark == "optional" else marked
        required = [Depends(DEPENDENCIES[mark])] if mark in DEPENDENCIES else []
        if kind in {"api", "foreign"}:
            options = {"route_class_override": Foreign} if kind == "foreign" else {}
            router.add_api_route(path, marked(partial_of(answer)), dependencies=required, **options)
        elif kind == "plain":
            router.routes.append(Route(path, marked(plain())))
        elif kind == "socket":
            router.add_api_websocket_route(path, marked(socket()), dependencies=required)
        elif kind == "router":
            included = marked(APIRouter())
            fill(included, inside, names, auth)
            router.include_router(included, prefix=path, dependencies=required)
        else:
            router.routes.append(mount(path, kind, marked, filled(inside, names, auth)))


def mount(path, kind, marked, app):
    mounted = marked(Router(routes=[Route("/a", plain())]) if kind == "starlette" else app)
    middleware = [Middleware(Through)] if kind == "wrapped" else []
    return Host(f"h{path[1:]}.test", mounted) if kind == "host" else Mount(path, app=mounted, middleware=middleware)


def filled(entries, names, auth):
    """Return an app with these routes, whose dependencies know callers."""
    app = FastAPI(openapi_url=None)
    app.state.auth = auth
    add_problem_handlers(app)
    fill(app.router, entries, names, auth)
    return app


def plain():
    async def endpoint(request):
        return PlainTextResponse("plain")

    return endpoint


def socket():
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    return endpoint


# By the rule: without credentials, with those of a caller, and with wrong ones.
SERVED = {
    "public": [True, True, True],
    "unguarded": [True, True, True],
    "optional": [True, True, False],
    "any user": [False, True, False],
}


def is_served(answer):
    """Return whether an answer is that of an endpoint."""
    return answer.status == 200 or any(message["type"] == "websocket.accept" for message in answer.messages)


@settings(
    max_examples=int(os.environ.get("ROUTING_EXAMPLES", "20")),
    derandomize="ROUTING_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(ENTRIES, min_size=1, max_size=6), st.sampled_from([None, "optional", "required"]))
def test_the_list_says_what_a_client_meets(entries, default):
    """Who is served without credentials, with those of a caller without roles, and with wrong ones."""
    auth = Auth(AUTH, default=default)
    app = filled(entries, map(str, range(1000)), auth)
    if default:
        guard_routes(app, auth)

    caller, forged = ([(b"x-api-key", key.encode())] for key in (KEY, "prodkit_forged"))

    async def compare():
        for row in list_routes(app):
            if row.path.count("//") > 1:  # a host inside of another one: no request has both
                continue
            if row.note == "app Through":  # which answers nothing by itself
                continue
            host, path = row.path[2:].split("/", 1) if row.path.startswith("//") else ("api.test", row.path[1:])
            method = "WS" if row.method == "WEBSOCKET" else row.method.replace("ANY", "GET")
            answers = [await ask(app, method, f"/{path}", host=host, headers=each) for each in ([], caller, forged)]
            assert [is_served(each) for each in answers] == SERVED.get(row.rule, [False] * 3), (row, answers)

    asyncio.run(compare())
