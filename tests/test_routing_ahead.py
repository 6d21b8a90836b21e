"""What will serve a request, before routing: the same with and without an index, which is asked once for a request."""

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from routed import ask, echo
from starlette.responses import PlainTextResponse

from fastapi_prodkit._routing.ahead import endpoint_of, find_route, is_routed
from fastapi_prodkit.routing import index_routes


async def hello():
    return {}


@pytest.fixture
def asked(monkeypatch):
    """Return the list of the paths of all routes that are asked whether they match."""
    asked = []
    matches = APIRoute.matches

    def note(route, scope):
        asked.append(route.path)
        return matches(route, scope)

    monkeypatch.setattr(APIRoute, "matches", note)
    return asked


def ask_ahead(app, change=lambda scope: None):
    """Return an app that asks for the route, then changes the scope, and then calls the app."""

    async def around(scope, receive, send):
        scope["app"] = app
        find_route(scope)
        change(scope)
        await app(scope, receive, send)

    return around


@pytest.fixture
def app():
    """An app in which the path, the method and the host of a request decide."""
    app, sub, elsewhere = FastAPI(openapi_url=None), FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    for each in (app, sub, elsewhere):
        index_routes(each)
    app.get("/items")(echo("items"))
    app.put("/items")(echo("put items"))
    app.get("/other/{id}")(echo("other"))
    sub.get("/items")(echo("items in sub"))
    elsewhere.get("/items")(echo("items elsewhere"))
    app.mount("/sub", sub)
    app.router.routes.insert(0, app.router.routes.pop())
    app.host("elsewhere.test", elsewhere)
    app.router.routes.insert(0, app.router.routes.pop())
    return app


class TestAskedOnce:
    async def test_the_router_does_not_search_again(self, app, asked):
        """A route is asked once, by the layer that asks first."""
        answer = await ask(ask_ahead(app), "GET", "/other/1")

        assert '"name":"other"' in answer.body
        assert asked == ["/other/{id}"]

    async def test_what_was_not_found_is_not_searched_again(self, app, asked):
        """The same holds if no route matches."""
        twice = ask_ahead(ask_ahead(app), lambda scope: find_route(scope | {"app": app}))

        assert (await ask(twice, "GET", "/nowhere")).status == 404
        assert asked == []

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda scope: scope.update(path="/items"), "items"),
            (lambda scope: scope.update(method="PUT", path="/items"), "put items"),
            (lambda scope: scope.update(root_path="/other", path="/other/items"), "items"),
            (lambda scope: scope.update(path="/sub/items"), "items in sub"),
            (lambda scope: scope["headers"].insert(0, (b"host", b"elsewhere.test")) or scope.update(path="/items"),
             "items elsewhere"),
        ],
    )  # fmt: skip
    async def test_a_request_that_is_changed_meanwhile(self, app, change, expected):
        """What was found for one request serves no other."""
        answer = await ask(ask_ahead(app, change), "GET", "/other/1")

        assert f'"name":"{expected}"' in answer.body

    async def test_a_host_that_is_changed_in_place(self, app):
        """Nor if only the list of headers has changed."""
        answer = await ask(
            ask_ahead(app, lambda scope: scope["headers"].insert(0, (b"host", b"elsewhere.test"))), "GET", "/items"
        )

        assert '"name":"items elsewhere"' in answer.body

    async def test_parameters_that_are_added_meanwhile(self, app):
        """The parameters that the scope has already are kept, as without the index."""

        def add(scope):
            scope["path_params"] = {"tenant": "acme"}

        answer = await ask(ask_ahead(app, add), "GET", "/other/1")

        assert answer.scope["path_params"] == {"tenant": "acme", "id": "1"}

    async def test_a_route_that_is_added_meanwhile(self, app):
        """Routes that are added while the request waits are seen."""
        answer = await ask(ask_ahead(app, lambda _scope: app.get("/new")(echo("new"))), "GET", "/new")

        assert '"name":"new"' in answer.body

    async def test_a_mounted_app(self, app):
        """What the outer app has found is no answer for the app that it mounts."""
        answer = await ask(ask_ahead(app), "GET", "/sub/items")

        assert '"name":"items in sub"' in answer.body


@pytest.fixture(params=["router", "index"])
def nested(request):
    """An app with routes of every kind, with and without an index of them."""

    class Foreign(APIRoute):
        def matches(self, scope):
            return super().matches(scope)

    inner, router, app = FastAPI(openapi_url=None), APIRouter(), FastAPI(openapi_url=None)
    inner.get("/{id}")(hello)
    router.get("/items/{id}")(hello)
    router.mount("/sub", inner)
    app.include_router(router, prefix="/v1")
    app.mount("/plain", PLAIN)
    app.router.add_api_route("/foreign", hello, route_class_override=Foreign)
    if request.param == "index":
        index_routes(app)
    return app


PLAIN = PlainTextResponse("plain")

each_request = pytest.mark.parametrize(
    ("method", "path", "endpoint", "routed"),
    [
        ("GET", "/v1/items/1", hello, True),
        ("PUT", "/v1/items/1", None, False),
        ("GET", "/v1/sub/1", hello, True),
        ("GET", "/v1/sub/1/2", None, True),
        ("GET", "/plain/1", PLAIN, True),
        ("GET", "/foreign", hello, True),
        ("GET", "/nowhere", None, False),
        ("GET", "/v1/items/1/", None, False),
    ],
)


def scope_of(method, path):
    return {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}


@each_request
def test_endpoint_of(nested, method, path, endpoint, routed):
    """It is the endpoint of the first route that matches, also in a mounted app."""
    assert endpoint_of(nested, scope_of(method, path)) == endpoint


@each_request
def test_is_routed(nested, method, path, endpoint, routed):
    """A mount matches everything below its path; a route of another method does not match."""
    assert is_routed(nested, scope_of(method, path)) == routed


@pytest.mark.parametrize("nested", ["index"], indirect=True)
def test_an_index_is_asked_in_place_of_the_routes(nested, monkeypatch):
    """The routes of an app that has an index are not walked, unless a route is unknown to it."""
    scope = scope_of("GET", "/v1/items/1")
    monkeypatch.setattr(type(nested), "routes", None)

    assert endpoint_of(nested, scope) is hello
    assert is_routed(nested, scope)
