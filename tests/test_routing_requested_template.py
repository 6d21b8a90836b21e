"""The template of the route that a refused request was for, with and without an index of the routes."""

import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import PlainTextResponse
from starlette.routing import Host

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import UNMATCHED
from fastapi_prodkit._routing import requested_template as module
from fastapi_prodkit._routing.requested_template import requested_template
from fastapi_prodkit.routing import index_routes


async def hello():
    return {}


def plain(request):
    return PlainTextResponse("ok")


def requested(app, path, *, method="GET", root_path="", **scope):
    """Return the template for a request that is refused before routing."""
    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": [], "app": app, **scope}

    return requested_template(scope, "")


@pytest.fixture(params=["router", "index"])
def nested(request):
    """An app with routes of every kind, with and without an index of them."""
    inner, router, app = FastAPI(), APIRouter(), FastAPI()
    inner.get("/items/{item_id}")(hello)
    router.get("/items/{item_id}")(hello)
    router.post("/items/{item_id}")(hello)
    router.post("/items/{other_name}/parts")(hello)
    router.mount("/inner", inner)
    app.include_router(router, prefix="/v1")
    app.mount("/tenants/{tenant}", inner)
    app.mount("/static", PlainTextResponse("file"))
    app.mount("/inner", inner)
    app.router.add_route("/plain/{name}", plain)
    app.websocket("/rooms/{room}")(hello)
    app.router.routes.append(Host("{customer}.example.com", app=inner))
    if request.param == "index":
        index_routes(app)
    return app


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/items/1", "/v1/items/{item_id}"),
        ("/v1/inner/items/1", "/v1/inner/items/{item_id}"),
        ("/inner/items/1", "/inner/items/{item_id}"),
        ("/plain/a", "/plain/{name}"),
        *((path, UNMATCHED) for path in ("/tenants/a/items/1", "/static/a", "/nowhere", "/v1/nowhere", "/rooms/7")),
    ],
)
def test_requested_template_equals_the_template_of_a_served_request(nested, path, expected):
    """A request refused before routing gets the template that it would have had if it had been served."""
    assert requested(nested, path) == expected


def test_requested_template_of_a_preflight_is_that_of_the_first_route(nested):
    """A preflight gets the template of the first route that matches its path, whatever the route's method."""
    assert requested(nested, "/v1/items/1", method="OPTIONS") == "/v1/items/{item_id}"
    assert requested(nested, "/v1/items/1/parts", method="OPTIONS") == "/v1/items/{other_name}/parts"


def test_requested_template_of_a_websocket_and_of_a_host_route(nested):
    """A WebSocket handshake gets the template of a WebSocket route, and a Host route adds no host name."""
    assert requested(nested, "/rooms/7", type="websocket") == "/rooms/{room}"
    assert requested(nested, "/items/1", headers=[(b"host", b"a.example.com")]) == "/items/{item_id}"


def test_requested_template_in_a_mounted_app(nested):
    """It has the paths of the mounts, unless they have parameters."""
    inner = next(route.app for route in nested.routes if getattr(route, "path", "") == "/inner")
    mounted = {"router": nested.router, "path": "/inner/items/1", "root_path": "/inner"}
    tenant = {"router": nested.router, "path": "/tenants/a/items/1", "root_path": "/tenants/a"}

    assert requested(inner, **mounted) == "/inner/items/{item_id}"
    assert requested(inner, **tenant) == UNMATCHED


@pytest.mark.parametrize("nested", ["router"], indirect=True)
def test_requested_template_is_cached(nested, monkeypatch):
    """The cache is bounded, and a route added later is found."""
    looked_for = []
    monkeypatch.setattr(module, "iter_route_contexts", lambda routes: looked_for.append(routes) or [])

    for number in [*range(1000), *[999] * 1000]:
        requested(nested, f"/nowhere/{number}")
    requested(nested, "/nowhere/" + "x" * 5000)

    assert len(looked_for) == 1000
    assert len(vars(nested)[_scope.APP_TEMPLATES]) <= 256
    monkeypatch.undo()
    nested.get("/nowhere/{number}")(hello)
    assert requested(nested, "/nowhere/999") == "/nowhere/{number}"


@pytest.mark.parametrize("nested", ["index"], indirect=True)
def test_requested_template_with_an_index_searches_no_routes(nested, monkeypatch):
    """Not even for an unknown path; nothing is cached."""
    monkeypatch.setattr(module, "iter_route_contexts", None)

    assert requested(nested, "/nowhere/1") == UNMATCHED
    assert requested(nested, "/v1/items/1") == "/v1/items/{item_id}"
    assert _scope.APP_TEMPLATES not in vars(nested)


def test_requested_template_without_an_app_is_unmatched(nested):
    """A refused request gets the constant label if the scope contains no Starlette app."""
    assert requested(None, "/v1/items/1") == UNMATCHED
