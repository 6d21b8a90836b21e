"""Management routes: the edge serves probes, and `app.routes` has the app's own routes only."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match, Mount, Route
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit.app import Edge
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.health import health_router
from fastapi_prodkit.sections import LimitsSettings

TOKEN = "a-token-of-operators"
PASS = {"status": "pass"}


def settings_of(**sections):
    return Settings(environment="prod", hosts={"allowed": ["testserver"]}, **sections)


def made(way, **sections):
    if way == "create_app":
        return create_app(settings_of(**sections))
    app = FastAPI()
    install(app, settings_of(**sections))
    return app


ways = pytest.mark.parametrize("way", ["create_app", "install"])


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def overridden(lines):
    return [line["event"] for line in lines if "in place of the management route" in line["event"]]


def logged(lines):
    return [(line["http_method"], line["http_path"]) for line in lines if line["event"] == "request"]


async def own():
    return "own"


async def plain(scope, receive, send):
    await PlainTextResponse("mounted")(scope, receive, send)


@ways
def test_app_routes_have_no_probes(way):
    """`app.routes` contains only the routes of the user, so code that iterates over them sees no probe."""
    app = made(way)
    app.add_api_route("/items", own)

    assert [route.path for route in app.routes] == ["/items"]
    assert TestClient(app).get("/health").json() == PASS


def test_docs_are_routes_of_the_app():
    """The app's authentication can guard them, unlike probes."""

    class Guard:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            refused = scope["type"] == "http" and scope["path"] in ("/docs", "/openapi.json", "/health")
            await (PlainTextResponse("who are you?", 401) if refused else self.app)(scope, receive, send)

    app = create_app(Settings(environment="dev"), middleware=[Middleware(Guard)])
    client = TestClient(app)

    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/health")] == [401, 401, 200]
    assert {"/docs", "/openapi.json"} <= {route.path for route in app.routes}
    assert all(isinstance(route, Route) for route in app.routes)
    assert app.url_path_for("openapi") == "/openapi.json"


@ways
@pytest.mark.parametrize("included", [False, True])
def test_route_of_the_app_wins(way, included, capsys):
    """It is logged and limited, and a line at start-up names both."""
    router = APIRouter()
    router.add_api_route("/ready", own, methods=["GET"])
    app = made(way, rate_limit={"default": "4/minute"})
    if included:
        app.include_router(router)
    else:
        app.add_api_route("/ready", own, methods=["GET"])
    capsys.readouterr()

    with TestClient(app) as client:
        started = overridden(lines_of(capsys))
        answers = [client.request(*each) for each in (("GET", "/ready"), ("GET", "/ready/"), ("HEAD", "/ready"))]
        refused, health = client.get("/ready"), client.get("/health")

    lines = lines_of(capsys)
    assert started == ["GET, HEAD /ready: the app's own route 'own' answers in place of the management route 'ready'"]
    assert [answer.status_code for answer in answers] == [200, 200, 405]
    assert [answer.json() for answer in answers[:2]] == ["own", "own"]
    assert refused.status_code == 429
    assert health.json() == PASS
    assert [path for _, path in logged(lines)] == ["/ready", "/ready/", "/ready", "/ready", "/ready"]
    assert overridden(lines) == []


def test_install_keeps_the_readiness_route_of_the_app(capsys):
    """Without a lifespan the line is logged at the first request."""
    app = FastAPI()

    @app.get("/ready")
    async def ready():
        raise HTTPException(503, "the database is down")

    install(app, settings_of())
    capsys.readouterr()
    client = TestClient(app)

    assert [client.get("/ready").status_code for _ in range(2)] == [503, 503]
    assert len(overridden(lines_of(capsys))) == 1


def test_listing_does_not_read_the_routes_ahead(capsys):
    """A list before start-up logs nothing, and a route that the app adds after it still wins."""
    app = made("create_app")
    capsys.readouterr()

    before = [(route.path, methods) for route, methods in Edge.of(app).management.list_served()]
    app.add_api_route("/ready", own, methods=["GET"])
    after = {route.path: methods for route, methods in Edge.of(app).management.list_served()}

    assert [path for path, _ in before] == ["/health", "/ready", "/startup", "/metrics"]
    assert all(methods == {"GET", "HEAD"} for _, methods in before)
    assert after["/ready"] == set()
    assert overridden(lines_of(capsys)) == []
    with TestClient(app) as client:
        assert client.get("/ready").json() == "own"


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_route_of_another_method_does_not_win(method, capsys):
    """A HEAD or POST route of the app on the path of a probe does not replace the GET probe."""
    app = create_app(settings_of())
    app.add_api_route("/health", own, methods=[method])
    client = TestClient(app)

    assert client.request(method, "/health").status_code == 200
    assert client.get("/health").json() == PASS
    assert client.delete("/health").status_code == 405
    assert logged(lines_of(capsys)) == [(method, "/health"), ("DELETE", "/health")]


def test_catch_all_and_mount_at_the_root_do_not_win():
    """They get other methods."""
    app = create_app(settings_of())
    app.add_api_route("/{path:path}", lambda path: path, methods=["GET", "POST"])
    mounted = create_app(settings_of())
    mounted.mount("/", plain)

    for served, other in ((app, '"health"'), (mounted, "mounted")):
        with TestClient(served) as client:
            assert client.get("/health").json() == PASS
            assert client.get("/health/").json() == PASS
            assert client.head("/ready").status_code == 200
            assert client.post("/health").text == other


def test_mount_at_exactly_the_path_wins(capsys):
    """Such as prometheus_client's app at `/metrics`."""
    app = create_app(settings_of())
    app.mount("/metrics", plain)

    with TestClient(app) as client:
        assert client.get("/metrics").text == "mounted"
    assert overridden(lines_of(capsys))[0].startswith("GET, HEAD /metrics: the app's own route 'Mount' answers")


def test_route_of_an_app_mounted_at_the_root_wins(capsys):
    """A `/ready` route in an app that is mounted at `/` replaces the built-in probe and is logged."""
    app, inner = create_app(settings_of()), create_app(settings_of())
    inner.add_api_route("/ready", own)
    app.mount("/other", FastAPI(routes=[Route("/health", plain)]))
    app.mount("/", inner)

    with TestClient(app) as client:
        assert client.get("/ready").text == '"own"'
        assert client.get("/health").json() == PASS
    assert overridden(lines_of(capsys))[0].startswith("GET, HEAD /ready: the app's own route 'own' answers")


def test_mounted_app_of_another_framework_is_ignored():
    """Its attribute `routes` may be anything."""

    class Foreign:
        routes = None

        async def __call__(self, scope, receive, send):
            await plain(scope, receive, send)

    app = create_app(settings_of())
    app.mount("/", Foreign())

    with TestClient(app) as client:
        assert client.get("/health").json() == PASS
        assert client.get("/other").text == "mounted"


def test_endpoint_class_wins():
    """It has all methods."""

    class Endpoint(HTTPEndpoint):
        async def get(self, request):
            return PlainTextResponse("own")

    app = create_app(settings_of())
    app.add_route("/health", Endpoint)

    assert TestClient(app).get("/health").text == "own"


def test_websocket_at_the_path_of_a_probe_does_not_win():
    """It is served."""
    app, inner = create_app(settings_of()), create_app(settings_of())
    app.mount("/inner", inner)

    @app.websocket("/health")
    @inner.websocket("/health")
    async def talk(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    client = TestClient(app)
    for prefix in ("", "/inner"):
        with client.websocket_connect(f"{prefix}/health") as session:
            assert session.receive_text() == "hello"
        assert client.get(f"{prefix}/health").json() == PASS


def test_route_without_path_or_endpoint_is_ignored():
    """A custom route without a path or an endpoint does not replace the probes, even if it matches any path."""

    class Anything(BaseRoute):
        def matches(self, scope):
            return Match.FULL, {}

        async def handle(self, scope, receive, send):
            await plain(scope, receive, send)

    app = create_app(settings_of())
    app.router.routes.append(Anything())
    client = TestClient(app)

    assert client.get("/health").json() == PASS
    assert client.get("/other").text == "mounted"


@pytest.mark.parametrize("outer", [FastAPI, lambda: create_app(settings_of())])
def test_mounted_app_serves_its_own_probes(outer):
    """With or without an edge around the outer app."""
    asked = []

    async def check():
        asked.append(True)

    inner, app = create_app(settings_of(), checks={"cache": check}), outer()
    inner.add_api_route("/startup", own)
    app.mount("/inner", inner)
    client = TestClient(app)

    assert client.get("/inner/ready").json() == PASS
    assert client.post("/inner/ready").status_code == 405
    assert client.get("/inner/startup").json() == "own"
    assert client.get("/inner/nowhere").status_code == 404
    assert asked == [True]


def test_dependencies_and_handlers_of_the_app_do_not_apply():
    """Dependencies and exception handlers of the app do not apply to management routes or their problems."""
    called = []

    async def note(*args):
        called.append(args)
        return PlainTextResponse("the user's own")

    app = create_app(
        settings_of(),
        dependencies=[Depends(lambda: called.append("dependency"))],
        exception_handlers={404: note, 405: note, HTTPException: note},
        redirect_slashes=False,
    )
    client = TestClient(app)

    assert client.get("/health").json() == PASS
    for response in (client.get("/metrics"), client.get("/metrics/"), client.post("/health")):
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-request-id"] == response.json()["request_id"]
    assert called == []
    assert client.get("/nowhere").text == "the user's own"


def test_exception_of_a_management_route_is_a_500_problem(capsys, monkeypatch):
    """An exception in a management route is logged once and answered with a 500 problem."""

    def fail(accept):
        raise RuntimeError("nothing to show")

    monkeypatch.setattr("prometheus_client.exposition.choose_encoder", fail)
    app = create_app(settings_of(metrics={"public": True}))

    response = TestClient(app).get("/metrics")

    assert response.status_code == response.json()["status"] == 500
    assert len([line for line in lines_of(capsys) if "nothing to show" in line.get("exception", "")]) == 1


def test_package_that_replaces_the_routes_keeps_the_probes():
    """Clearing or replacing the list of routes of the app leaves the probes and `/metrics` in place."""
    app = create_app(settings_of(metrics={"public": True}))
    app.add_api_route("/items", own)
    app.router.routes.clear()
    app.router.routes = [Mount("/v1", app=plain)]

    with TestClient(app) as client:
        answers = [client.get(path).status_code for path in ("/health", "/ready", "/metrics", "/items", "/v1/")]
    assert answers == [200, 200, 200, 404, 200]


@pytest.mark.parametrize("mounted", [False, True])
@ways
def test_routes_are_not_read_before_startup_is_complete(way, mounted):
    """FastAPI caches the first result."""
    router, events = APIRouter(), []

    @asynccontextmanager
    async def amend(app):
        for route in router.routes[:1]:
            route.status_code = 202
        yield

    @asynccontextmanager
    async def start(app):
        events.append("started")
        yield

    router.add_api_route("/items", own)
    router.mount("/below", FastAPI(lifespan=start))
    app = FastAPI(lifespan=amend)
    install(app, settings_of())
    if way == "create_app":
        app = create_app(settings_of(), lifespan=amend)
    app.include_router(router)
    served = app
    if mounted:
        served = create_app(settings_of())
        served.mount("/inner", app)

    with TestClient(served) as client:
        response = client.get("/inner/items" if mounted else "/items")

    assert response.status_code == 202
    assert events == ["started"]


def test_stalled_body_of_a_management_route_is_a_408(capsys):
    """LIMITS_BODY_TIMEOUT applies to `/log-level`, and its timer keeps working for later requests."""
    app = create_app(settings_of(log={"level_token": TOKEN}, limits={"body_timeout": 0.05}))

    @app.post("/items")
    async def read(item: dict):
        return item

    with serving(app) as port:
        answers = []
        for path in ("/log-level", "/items", "/log-level"):
            with connection(port) as client:
                headers = [f"Authorization: Bearer {TOKEN}", "Content-Length: 10", "Content-Type: application/json"]
                client.sendall(request("POST", path, *headers))
                answers.append(read_response(client).split()[1])

    assert answers == [b"408", b"408", b"408"]
    assert not [line for line in lines_of(capsys) if "exception" in line]


async def test_management_route_has_a_deadline():
    """Unless it is exempt."""
    cancelled = []

    async def wait(request):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    layers = [DeadlineMiddleware(None, LimitsSettings(request_timeout=0.05))]
    edge = Edge(layers, management=Starlette(routes=[Route("/wait", wait)])).around(plain)

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(edge), base_url="http://testserver") as client:
        response = await client.get("/wait")

    assert response.status_code == 504
    assert cancelled == [True]


async def test_edge_around_a_plain_asgi_app_serves_management_routes():
    """An edge around an ASGI app without routes answers management paths and passes other paths to the app."""
    management = Starlette(routes=[*health_router().routes, Mount("/mounted", plain)])
    client = TestClient(Edge([BodyLimitMiddleware(None)], management=management).around(plain))

    assert client.get("/health").json() == PASS
    assert client.post("/health").status_code == 405
    assert client.get("/other").text == "mounted"
