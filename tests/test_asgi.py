"""What is read from the scope: the path relative to the app, and the template of the matched route."""

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from starlette.testclient import TestClient

from fastapi_prodkit import Settings, _asgi, create_app
from fastapi_prodkit._asgi import (
    UNMATCHED,
    LabelledRoute,
    header,
    route_path,
    route_template,
    walk_routes,
)


class Spy:
    """Record what `route_template` returns after each call."""

    def __init__(self, app):
        self.app = app
        self.templates = []

    async def __call__(self, scope, receive, send):
        root_path = scope.get("root_path", "")
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] != "lifespan":
                self.templates.append(route_template(scope, root_path))


def template(app, path, *, method="GET", root_path="", host="testserver"):
    """Return the template for one request, as a layer around the app reads it."""
    spy = Spy(app)
    client = TestClient(spy, root_path=root_path, base_url=f"http://{host}", raise_server_exceptions=False)

    client.request(method, path, follow_redirects=False)

    return spy.templates[0]


async def hello():
    return {}


def plain(request):
    return PlainTextResponse("ok")


def test_header_returns_the_first_value_or_none():
    """The function `header` returns the first value of a repeated header, and None if it is missing."""
    headers = [(b"host", b"a"), (b"x-id", b"1"), (b"x-id", b"2")]

    assert header(headers, b"x-id") == b"1"
    assert header(headers, b"x-other") is None


@pytest.mark.parametrize(
    ("root_path", "path", "expected"),
    [
        ("", "/health", "/health"),
        ("", "/health/", "/health"),
        ("", "/", "/"),
        ("", "", "/"),
        ("/api", "/api/health", "/health"),
        ("/api", "/api/health/", "/health"),
        ("/api", "/api", "/"),
        ("/api", "/api/", "/"),
        ("/api", "/apihealth", "/apihealth"),
        ("/api", "/health", "/health"),
    ],
)
def test_route_path_is_relative_without_a_trailing_slash(root_path, path, expected):
    """A root_path counts only if it ends at a segment of the path."""
    assert route_path({"path": path, "root_path": root_path}) == expected


def test_route_path_works_without_root_path():
    """ASGI makes root_path optional."""
    assert route_path({"path": "/health"}) == "/health"


def test_template_of_a_route():
    """Also for a method that the route does not have."""
    fastapi, starlette = FastAPI(), Starlette(routes=[Route("/items/{item_id}", plain, methods=["GET"])])
    fastapi.get("/items/{item_id}")(hello)

    for app in (fastapi, starlette):
        assert template(app, "/items/1") == "/items/{item_id}"
        assert template(app, "/items/1", method="DELETE") == "/items/{item_id}"


def test_template_of_a_plain_starlette_route_is_unmatched():
    """FastAPI does not store which Starlette route matched, its docs pages included."""
    app, router = FastAPI(), APIRouter()
    app.add_route("/plain/{name}", plain)
    router.add_route("/plain/{name}", plain)
    app.include_router(router, prefix="/v1")

    assert template(app, "/plain/secret") == UNMATCHED
    assert template(app, "/v1/plain/secret") == UNMATCHED
    assert template(app, "/openapi.json") == UNMATCHED


@pytest.mark.parametrize("path", ["/nothing", "/items/", "/items/1/2", "//items/1"])
def test_template_without_a_route_is_unmatched(path):
    """Redirects to a trailing slash too."""
    app = FastAPI()
    app.get("/items")(hello)

    assert template(app, path) == UNMATCHED


def test_template_has_the_prefixes_of_nested_routers():
    """The template of a route in nested routers begins with the prefixes of all of them."""
    inner, outer = APIRouter(), APIRouter()
    inner.get("/{item_id}")(hello)
    outer.include_router(inner, prefix="/items")
    app = FastAPI()
    app.include_router(outer, prefix="/v1")

    assert template(app, "/v1/items/1") == "/v1/items/{item_id}"
    assert template(app, "/v1/items/1", method="PUT") == "/v1/items/{item_id}"
    assert template(app, "/v1/nothing/1") == UNMATCHED


def test_template_of_a_router_included_twice():
    """A router that is included under two prefixes has a separate template under each prefix."""
    router = APIRouter()
    router.get("/items/{item_id}")(hello)
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")

    assert template(app, "/v1/items/1") == "/v1/items/{item_id}"
    assert template(app, "/v2/items/1") == "/v2/items/{item_id}"


def test_template_of_a_websocket_has_the_prefix():
    """The template of a WebSocket route begins with the prefix of its router."""
    router = APIRouter()

    @router.websocket("/rooms/{room}")
    async def join(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    spy = Spy(app)

    with TestClient(spy).websocket_connect("/v1/rooms/7"):
        pass

    assert spy.templates == ["/v1/rooms/{room}"]


def test_template_has_the_paths_of_mounts():
    """The template of a route in a mounted app begins with the paths of all mounts above the route."""
    inner, outer, app = FastAPI(), Starlette(), FastAPI()
    inner.get("/items/{item_id}")(hello)
    outer.router.add_route("/items/{item_id}", plain)
    outer.mount("/inner", inner)
    app.mount("/outer", outer)

    assert template(app, "/outer/items/1") == "/outer/items/{item_id}"
    assert template(app, "/outer/inner/items/1") == "/outer/inner/items/{item_id}"
    assert template(app, "/outer/inner/nothing") == UNMATCHED
    assert template(app, "/outer/nothing") == UNMATCHED


def test_template_of_a_mount_in_an_included_router():
    """The entry that FastAPI has stored for the mount does not count."""
    inner, router, app = FastAPI(), APIRouter(), FastAPI()
    inner.get("/items/{item_id}")(hello)
    router.mount("/inner", inner)
    app.include_router(router, prefix="/v1")

    assert template(app, "/v1/inner/items/1") == "/v1/inner/items/{item_id}"


def test_template_of_a_mount_with_parameters_is_unmatched():
    """Their values would be part of the label."""
    inner, app = FastAPI(), FastAPI()
    inner.get("/items")(hello)
    app.mount("/tenants/{tenant}", inner)

    assert template(app, "/tenants/acme/items") == UNMATCHED


def test_template_of_a_mount_added_after_a_request():
    """A route's template is found even if its app is mounted after the first request to a sibling."""
    app, first, second = FastAPI(), FastAPI(), FastAPI()
    first.get("/items")(hello)
    second.get("/items")(hello)
    app.mount("/first", first)

    before = template(app, "/first/items"), template(app, "/second/items")
    app.mount("/second", second)

    assert before == ("/first/items", UNMATCHED)
    assert template(app, "/second/items") == "/second/items"


def test_template_of_a_mount_without_routes_is_unmatched():
    """Such as static files."""
    app = Starlette(routes=[Mount("/static", app=PlainTextResponse("file"))])

    assert template(app, "/static/../../etc/passwd") == UNMATCHED


def test_template_of_a_mount_at_the_root():
    """A mount at the root adds nothing to the template of a route below."""
    app = Starlette(routes=[Mount("/", routes=[Route("/items/{item_id}", plain)])])

    assert template(app, "/items/1") == "/items/{item_id}"


def test_template_of_a_host_route_omits_the_host():
    """The template of a route below a Host route contains no host name, so hosts add no labels."""
    app = Starlette(routes=[Host("{customer}.example.com", app=Router([Route("/items/{item_id}", plain)]))])

    assert template(app, "/items/1", host="acme.example.com") == "/items/{item_id}"


@pytest.mark.parametrize("path", ["/api/items/1", "/items/1"])
def test_template_omits_the_root_path(path):
    """Whether or not the path repeats it."""
    app = FastAPI()
    app.get("/items/{item_id}")(hello)

    assert template(app, path, root_path="/api") == "/items/{item_id}"


def test_template_has_only_the_part_of_root_path_that_a_mount_added():
    """The template includes the path of the mount, but not the root_path that a proxy has set."""
    app, inner = FastAPI(), FastAPI()
    inner.get("/items/{item_id}")(hello)
    app.mount("/inner", inner)

    assert template(app, "/api/inner/items/1", root_path="/api") == "/inner/items/{item_id}"


def test_template_of_a_route_of_another_framework_is_unmatched():
    """A route object without a path template gets the constant label for unmatched requests."""
    scope = {"route": object(), "path": "/secret"}

    assert route_template(scope, "") == UNMATCHED


def test_mounts_are_searched_once_per_set_of_routes(monkeypatch):
    """Mounts are searched once for each set of routes and then cached, not searched for each request."""
    app, inner = FastAPI(), FastAPI()
    inner.get("/items")(hello)
    app.mount("/inner", inner)
    walked, walks = list(walk_routes(app.routes)), []
    monkeypatch.setattr(_asgi, "walk_routes", lambda routes: walks.append(routes) or iter(walked))

    found = {template(app, "/inner/items") for _ in range(3)}

    assert found == {"/inner/items"}
    assert len(walks) == 1


def test_labelled_route_stores_itself_in_the_scope():
    """In a mounted app and for another method too."""
    app, inner = FastAPI(), FastAPI()
    for each in (app, inner):
        each.router.routes.append(LabelledRoute("/docs/{name}", plain, methods=["GET"]))
    app.mount("/inner", inner)

    assert template(app, "/docs/page") == "/docs/{name}"
    assert template(app, "/docs/page", method="DELETE") == "/docs/{name}"
    assert template(app, "/inner/docs/page") == "/inner/docs/{name}"
    assert template(app, "/docs") == UNMATCHED


@pytest.mark.parametrize("root_path", ["", "/v1"])
@pytest.mark.parametrize(
    "path", ["/", "/docs", "/docs/", "/docs/a", "/docs/a/b", "/docsa", "/a/docs", "/do", "/docs\n"]
)
@pytest.mark.parametrize("own", ["/", "/docs", "/docs/{name}", "/docs/{name}/b", "/{name:path}"])
def test_labelled_route_matches_like_a_plain_route(own, path, root_path):
    """Comparing the start of the path first changes no result."""
    scope = {"type": "http", "method": "GET", "path": f"{root_path}{path}", "root_path": root_path}
    route = LabelledRoute(own, plain)

    match, found = route.matches(scope)

    plain_match, plain_found = Route(own, plain).matches(scope)
    assert match is plain_match
    assert found == (plain_found | {"route": route} if plain_found else {})


@pytest.mark.parametrize("routes", [5, {"/a": "b"}, list, ["a route"]])
def test_routes_of_another_framework_are_ignored(routes):
    """Its attribute `routes` may be anything."""

    async def foreign(scope, receive, send):
        await PlainTextResponse("foreign")(scope, receive, send)

    foreign.routes = routes
    app = create_app(Settings(environment="test", rate_limit={"default": "9/hour"}))
    app.mount("/foreign", foreign)

    with TestClient(app) as client:
        answers = [client.get("/foreign/x"), client.post("/foreign/x", content=b"body"), client.get("/health")]
        answers += [client.get("/foreign/x") for _ in range(8)]

    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert [path for path, _ in walk_routes(app.routes)][-1] == "/foreign"
