"""Lifespans: ours, the user's and those of mounted apps, started in order and ended in reverse."""

from contextlib import asynccontextmanager

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit._assembly.lifespans import compose
from fastapi_prodkit.exceptions import ConfigurationError


def recording(events, name, state=None):
    @asynccontextmanager
    async def lifespan(app):
        events.append(f"+{name}")
        try:
            yield state
        finally:
            events.append(f"-{name}")

    return lifespan


class Passing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


def test_lifespans_start_in_order_and_end_in_reverse():
    """Ours, then the app's own, then those of mounted apps."""
    events = []
    app = FastAPI(lifespan=recording(events, "own"))
    app.mount("/sub", FastAPI(lifespan=recording(events, "sub")))
    compose(app, [recording(events, "ours")])

    with TestClient(app):
        running = list(events)

    assert running == ["+ours", "+own", "+sub"]
    assert events[3:] == ["-sub", "-own", "-ours"]


def test_lifespan_of_every_kind_of_mount_is_started():
    """Below included routers, in nested mounts, hosts, and middleware of a mount."""
    events = []
    inner = Starlette(lifespan=recording(events, "inner"))
    wrapped = Starlette(lifespan=recording(events, "wrapped"))
    hosted = Starlette(lifespan=recording(events, "hosted"))
    included = Starlette(routes=[Mount("/inner", inner)], lifespan=recording(events, "included"))
    router = APIRouter()
    router.mount("/included", included)
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.router.routes.append(Mount("/wrapped", wrapped, middleware=[Middleware(Passing)]))
    app.router.routes.append(Host("other.example.com", hosted))
    app.mount("/plain", PlainTextResponse("not an app with a lifespan"))
    compose(app, [])

    with TestClient(app):
        pass

    assert events[:4] == ["+included", "+inner", "+wrapped", "+hosted"]


def test_lifespan_below_a_plain_router_is_started():
    """A mount may hold routes or a router instead of an app."""
    events = []
    app = FastAPI()
    app.router.routes += [
        Mount("/group", routes=[Mount("/a", FastAPI(lifespan=recording(events, "a")))]),
        Mount("/router", Router(routes=[Mount("/b", FastAPI(lifespan=recording(events, "b")))])),
        Mount("/own", Router(lifespan=recording(events, "router"))),
    ]
    compose(app, [])

    with TestClient(app):
        pass

    assert events[:3] == ["+a", "+b", "+router"]


def test_app_mounted_twice_is_started_once():
    """An app that is mounted at two paths has its lifespan run only once."""
    events = []
    sub = FastAPI(lifespan=recording(events, "sub"))
    app = FastAPI()
    app.mount("/a", sub)
    app.mount("/b", sub)
    compose(app, [])

    with TestClient(app):
        pass

    assert events == ["+sub", "-sub"]


@pytest.mark.parametrize("way", ["inside", "shared"])
def test_lifespan_that_the_user_runs_is_not_run_again(way):
    """By entering the sub-app's lifespan, or by passing it as the app's own."""
    events = []
    sub = FastAPI(lifespan=recording(events, "sub"))

    @asynccontextmanager
    async def own(app):
        async with sub.router.lifespan_context(sub):
            yield

    app = FastAPI(lifespan=own if way == "inside" else sub.router.lifespan_context)
    app.mount("/sub", sub)
    compose(app, [])

    for _ in range(2):  # the watch leaves nothing behind
        with TestClient(app):
            pass

    assert events == ["+sub", "-sub"] * 2


class Once:
    """An object that can be started once, such as the session manager of an MCP server."""

    def __init__(self):
        self.runs = 0

    @asynccontextmanager
    async def run(self, app=None):
        if self.runs:
            raise RuntimeError("run() can only be called once")
        self.runs += 1
        yield {"run": self.runs}


def started_by_hand(way, path, once, **options):
    """Return an app whose own lifespan starts the same object as the lifespan of a mounted app."""

    @asynccontextmanager
    async def own(app):
        async with once.run():
            yield

    settings = Settings(environment="test")
    if way == "create_app":
        app = create_app(settings, lifespan=own, **options)
    else:
        app = FastAPI(lifespan=own)
        install(app, settings, **options)
    sub = Starlette(routes=[Route("/tools", lambda request: PlainTextResponse("tools"))], lifespan=once.run)
    app.mount(path, sub)
    return app


@pytest.mark.parametrize("way", ["create_app", "install"])
def test_mounted_lifespans_can_be_switched_off(way):
    """With `mounted_lifespans=False`, only the outer app's lifespan runs, and the mounted app answers."""
    once = Once()

    with TestClient(started_by_hand(way, "/", once, mounted_lifespans=False)) as client:
        answer = client.get("/tools")

    assert answer.text == "tools"
    assert once.runs == 1


@pytest.mark.parametrize("way", ["create_app", "install"])
@pytest.mark.parametrize("path", ["/", "/sub"])
def test_object_started_twice_is_an_error(way, path):
    """It names the mount, the argument and the reason."""
    app = started_by_hand(way, path, Once())
    told = f"mounted at {path} cannot start: run.. can only be called once .*mounted_lifespans=False"

    with pytest.raises(ConfigurationError, match=told) as caught, TestClient(app):
        pass

    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("route", "place"),
    [
        (lambda sub: Mount("/outer", Starlette(routes=[Mount("/inner", sub)])), "/outer/inner"),
        (lambda sub: Mount("/outer", routes=[Mount("/", sub)]), "/outer"),
        (lambda sub: Host("mcp.example.com", sub), "mcp.example.com"),
    ],
)
def test_error_names_the_path_of_a_nested_mount(route, place):
    """The error contains the complete path of a nested mount, or the host name of a Host route."""
    once = Once()
    app = FastAPI(lifespan=once.run)
    app.router.routes.append(route(Starlette(lifespan=lambda app: once.run())))
    compose(app, [])

    with pytest.raises(ConfigurationError, match=f"mounted at {place} cannot"), TestClient(app):
        pass


def test_other_errors_of_a_mounted_lifespan_are_raised():
    """An exception in the lifespan of a mounted app is raised unchanged and ends the start."""

    @asynccontextmanager
    async def failing(app):
        raise OSError("no server")
        yield

    app = FastAPI()
    app.mount("/sub", FastAPI(lifespan=failing))
    compose(app, [])

    with pytest.raises(OSError, match="no server"), TestClient(app):
        pass


def test_mounted_composed_app_starts_its_own_mounts():
    """A mounted app that starts its own mounted apps has each of these lifespans run once."""
    events = []
    sub = FastAPI(lifespan=recording(events, "sub"))
    sub.mount("/leaf", FastAPI(lifespan=recording(events, "leaf")))
    compose(sub, [recording(events, "sub's ours")])
    app = FastAPI()
    app.mount("/sub", sub)
    compose(app, [])

    with TestClient(app):
        pass

    assert events[:3] == ["+sub's ours", "+sub", "+leaf"]
    assert len(events) == 6


def test_states_are_merged():
    """The app's own state wins over that of a mounted app."""
    events = []
    app = FastAPI(lifespan=recording(events, "own", {"who": "own"}))
    app.mount("/sub", FastAPI(lifespan=recording(events, "sub", {"who": "sub", "only": "sub"})))

    @app.get("/")
    async def read(request: Request):
        return [request.state.who, request.state.only]

    compose(app, [])

    with TestClient(app) as client:
        assert client.get("/").json() == ["own", "sub"]


def test_failed_start_ends_the_started_lifespans():
    """The error of the user's lifespan is raised."""
    events = []

    @asynccontextmanager
    async def failing(app):
        raise RuntimeError("no start")
        yield

    app = FastAPI(lifespan=failing)
    compose(app, [recording(events, "ours")])

    with pytest.raises(RuntimeError, match="no start"), TestClient(app):
        pass

    assert events == ["+ours", "-ours"]


def test_lifespan_of_a_router_included_later_is_started():
    """A router that is included after `compose` has its lifespan started with the app."""
    events = []
    app = FastAPI(lifespan=recording(events, "own"))
    compose(app, [recording(events, "ours")])
    app.include_router(APIRouter(lifespan=recording(events, "router")))

    with TestClient(app):
        pass

    assert sorted(events[:3]) == ["+ours", "+own", "+router"]
    assert len(events) == 6


def test_app_inside_of_itself_starts_once():
    """As a dashboard that gets the app around it, below middleware or not."""
    events = []
    app = FastAPI(lifespan=recording(events, "own"))
    sub = FastAPI(lifespan=recording(events, "sub"))
    sub.mount("/up", app)
    for path, mounted in (("/self", app), ("/dashboard", Passing(app)), ("/sub", sub)):
        app.mount(path, mounted)
    compose(app, [])

    with TestClient(app):
        pass

    assert events == ["+own", "+sub", "-sub", "-own"]


def test_object_that_leads_back_to_itself_has_no_lifespan():
    """Its attribute `app` need not be an app that it serves."""
    events = []
    alone, one, two = Passing(None), Passing(None), Passing(None)
    alone.app, one.app, two.app = alone, two, one
    app = FastAPI(lifespan=recording(events, "own"))
    for mounted in (alone, one, two):
        app.mount("/sub", mounted)
    compose(app, [])

    with TestClient(app):
        pass

    assert events == ["+own", "-own"]
