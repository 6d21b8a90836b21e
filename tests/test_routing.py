"""The index of routes: every answer is the one of FastAPI's own router, and only routes that can match are asked."""

import asyncio
import json
import re
import threading
from contextlib import asynccontextmanager

import pytest
from fastapi import APIRouter, Depends, FastAPI, Form, Request
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from routed import BothWays, ask, echo, talk
from starlette.convertors import CONVERTOR_TYPES, Convertor, register_url_convertor
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match

from fastapi_prodkit import Settings, _scope, create_app, install
from fastapi_prodkit._asgi import chosen_route
from fastapi_prodkit._routing import trial
from fastapi_prodkit.routing import find_route, index_routes


def name_of(answer):
    """Return the name of the endpoint that has answered."""
    return json.loads(answer.body)["name"] if answer.status == 200 else answer.status


def app_of(*paths, **options):
    """Return an app with a route for each path, named by it."""
    app = FastAPI(openapi_url=None, **options)
    for path in paths:
        app.get(path)(echo(path))
    return app


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


@pytest.fixture
def word():
    """Register a convertor whose values may contain slashes, which no regular expression of ours knows."""

    class Words(Convertor):
        regex = "[a-z]+(/[a-z]+)*"

        def convert(self, value):
            return value.split("/")

        def to_string(self, value):
            return "/".join(value)

    register_url_convertor("words", Words())
    yield
    del CONVERTOR_TYPES["words"]


class TestOrder:
    @pytest.mark.parametrize(
        ("paths", "expected"),
        [
            (["/items/new", "/items/{id}"], "/items/new"),
            (["/items/{id}", "/items/new"], "/items/{id}"),
            (["/{a}/new", "/items/{b}", "/items/new"], "/{a}/new"),
            (["/{rest:path}", "/items/new"], "/{rest:path}"),
            (["/items/{rest:path}", "/items/new", "/{a}/{b}"], "/items/{rest:path}"),
            (["/items/{id:int}", "/{a}/{b}", "/items/new"], "/{a}/{b}"),
        ],
    )
    async def test_the_first_route_that_matches_serves(self, paths, expected):
        """Overlapping routes are tried in the order in which they were declared, whatever their kinds."""
        both = BothWays(app_of(*paths))

        answer = await both.ask_index("GET", "/items/new")

        assert name_of(answer) == expected

    async def test_only_routes_that_can_match_are_asked(self, asked):
        """The number of other routes does not matter."""
        app = app_of("/a", "/a/{b}", "/a/{b}/c", "/b/{c}", "/a/x", "/{a}/b")
        index_routes(app)

        answer = await ask(app, "GET", "/a/x")

        assert name_of(answer) == "/a/{b}"
        assert asked == ["/a/{b}"]

    async def test_an_unknown_path_asks_no_route(self, asked):
        """A scanner costs no more in a large service than in a small one."""
        app = app_of("/a", "/a/{b}", "/b")
        index_routes(app)

        answer = await ask(app, "GET", "/wp-login.php")

        assert answer.status == 404
        assert asked == []


class TestPaths:
    @pytest.mark.parametrize("path", ["/int/7", "/int/x", "/float/1.5", "/float/1.", "/float/1", "/words/a/b", "/w/1"])
    @pytest.mark.usefixtures("word")
    async def test_convertors(self, path):
        """A parameter is compared and converted by its own convertor, a custom one included."""
        both = BothWays(app_of("/int/{n:int}", "/float/{x:float}", "/words/{w:words}", "/words/{w:words}/end"))

        answer = await both.ask_index("GET", path)

        assert answer.status in {200, 404}

    async def test_uuids(self):
        """So is a UUID."""
        both = BothWays(app_of("/{id:uuid}", "/{other}"))

        known = await both.ask_index("GET", "/6f1c8ab8-7a55-4d0f-9b5a-0a2f6b9a5a11")
        other = await both.ask_index("GET", "/6f1c8ab8")

        assert [name_of(known), name_of(other)] == ["/{id:uuid}", "/{other}"]

    async def test_the_error_of_a_convertor(self):
        """A value that the convertor cannot convert is the same error."""
        both = BothWays(app_of("/{n:int}", "/{m}/x/", "/{n:int}/x/"))

        answer = await both.ask("GET", "/" + "9" * 5000)
        redirected = await both.ask("PUT", "/" + "9" * 5000 + "/x")

        assert answer.error.startswith("ValueError")
        assert redirected.status == 307

    @pytest.mark.parametrize(
        "path", ["/files/a.txt", "/files/a.b.txt", "/files/a", "/files/a.txt/raw", "/files/.", "/v1"]
    )
    async def test_parts_of_segments(self, path):
        """A parameter may be a part of a segment."""
        both = BothWays(
            app_of("/files/{name}.{ext}", "/files/{name}.{ext}/raw", "/v{version:int}", "/files{rest:path}")
        )

        answer = await both.ask_index("GET", path)

        assert answer.status == 200

    @pytest.mark.parametrize(
        "path", ["/a/{b-c}", "/a/{", "/a/%7B", "/A/x", "/a/é", "/a/%C3%A9", "/a/ ", "/a//b", "//a", "/a/b;c=d"]
    )
    async def test_odd_characters(self, path):
        """Braces that are no parameter are text, cases differ, and a server has decoded the path already."""
        both = BothWays(app_of("/a/{b-c}", "/a/{", "/a/é", "/a/ ", "/a//b", "//a", "/a/{b}"))

        answer = await both.ask("GET", path)

        assert answer.status in {200, 404}

    async def test_a_line_break(self):
        """A regular expression also matches in front of a last line break: only the router knows what that means."""
        both = BothWays(app_of("/items", "/items/{id}"))

        answer = await both.ask_router("GET", "/items\n")

        assert name_of(answer) == "/items"

    @pytest.mark.parametrize("path", ["/api/items", "/items", "/api", "/api/", "/apis/items", "/api/items/"])
    async def test_root_path(self, path):
        """Routes match what follows the root_path, and the whole path if it has another beginning."""
        both = BothWays(app_of("/items", "/"))

        answer = await both.ask("GET", path, root_path="/api")

        assert answer.status in {200, 404, 307}

    async def test_a_path_without_a_slash(self):
        """`*` of OPTIONS, and a route whose path does not begin with a slash, are strange and safe."""
        both = BothWays(app_of("items", "/items"))

        answers = [await both.ask("OPTIONS", path) for path in ("*", "items", "")]

        assert [answer.status for answer in answers] == [404, 405, 404]

    async def test_a_changed_regular_expression(self):
        """A route that compares paths in another way than its own path says is asked about every path."""
        app = app_of("/items", "/other")
        app.routes[0].path_regex = re.compile(app.routes[0].path_regex.pattern, re.IGNORECASE)

        answer = await BothWays(app).ask_index("GET", "/ITEMS")

        assert name_of(answer) == "/items"


class TestMethods:
    @pytest.fixture
    def both(self):
        app = FastAPI(openapi_url=None)
        router = APIRouter()
        for method in ("GET", "PUT"):
            app.api_route("/items/{id}", methods=[method])(echo(f"{method} item"))
            router.api_route("/others/{id}", methods=[method])(echo(f"{method} other"))
        app.include_router(router)
        app.api_route("/others/{id}", methods=["PATCH"])(echo("PATCH other"))
        app.add_route("/plain", PlainTextResponse("plain"), methods=["GET"])
        return BothWays(app)

    @pytest.mark.parametrize("path", ["/items/1", "/others/1", "/plain"])
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
    async def test_every_method(self, both, method, path):
        """The method decides between routes of one path; a 405 names the methods of the first."""
        answer = await both.ask_index(method, path)

        assert answer.status in {200, 405}
        assert answer.status == 200 or answer.headers["allow"]

    async def test_a_later_route_with_the_method_wins(self, both):
        """A route that lacks the method is no answer while another one has it, even behind an included router."""
        assert name_of(await both.ask_index("PATCH", "/others/1")) == "PATCH other"


class TestRedirects:
    @pytest.mark.parametrize("path", ["/items/", "/users", "/users/1/", "/items//", "/", "/none/"])
    async def test_slashes(self, path):
        """A path that matches with one slash more or less is redirected, with its query."""
        app = app_of("/items", "/users/", "/users/{id}")
        both = BothWays(app)

        answer = await both.ask("GET", path, query=b"a=1")

        assert answer.status in {307, 404}
        assert answer.status == 404 or answer.headers["location"].endswith("?a=1")

    async def test_no_redirects(self):
        """`redirect_slashes=False` is respected, and asks no second time."""
        both = BothWays(app_of("/items", redirect_slashes=False))

        answer = await both.ask_index("GET", "/items/")

        assert answer.status == 404

    async def test_a_default_of_its_own(self):
        """What the app has put in place of the 404 serves what no route matches."""
        app = app_of("/items")

        async def default(scope, receive, send):
            await PlainTextResponse("nobody")(scope, receive, send)

        app.router.default = default

        answer = await BothWays(app).ask_index("GET", "/nowhere")

        assert answer.body == "nobody"


class TestIncludedRouters:
    @pytest.fixture
    def both(self):
        def mark(name):
            async def dependency(connection: HTTPConnection):
                connection.scope.setdefault("marks", []).append(name)

            return Depends(dependency)

        def marks(scope):
            return scope.get("marks")

        app = FastAPI(openapi_url=None, dependencies=[mark("app")])
        inner, middle, plain = APIRouter(prefix="/inner", dependencies=[mark("inner")]), APIRouter(), APIRouter()
        inner.get("/{id}")(echo("inner", marks))
        inner.add_api_websocket_route("/ws/{id}", talk("inner"))
        inner.add_route("/starlette/{id}", PlainTextResponse("starlette"))
        inner.mount("/mounted", app_of("/{id}"))
        inner.host("other.test", app_of("/{id}"))
        middle.get("/{tenant}/inner/{id}")(echo("middle", marks))
        middle.include_router(inner, prefix="/{tenant}", dependencies=[mark("include")])
        plain.get("/plain/{id}")(echo("plain", marks))
        app.include_router(middle, prefix="/v1")
        app.include_router(plain)
        app.include_router(plain, prefix="/again", dependencies=[mark("again")])
        app.get("/v1/{a}/{b}/{c}")(echo("last", marks))
        return BothWays(app)

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/v1/acme/inner/7", "middle"),
            ("/plain/1", "plain"),
            ("/again/plain/1", "plain"),
            ("/v1/a/b/c", "last"),
            ("/v1/acme/inner", 404),
            ("/v1/acme/mounted/7", "/{id}"),
        ],
    )
    async def test_prefixes_and_dependencies(self, both, path, expected):
        """A route that is included at any depth has the prefixes and dependencies of the routers on the way."""
        answer = await both.ask_index("GET", path)

        assert name_of(answer) == expected

    async def test_the_dependencies_of_every_level(self, both):
        """They run from the outermost to the innermost, as without the index."""
        answer = await both.ask_index("GET", "/again/plain/1")

        assert json.loads(answer.body)["marks"] == [["app", "again"]]

    async def test_other_kinds_of_routes(self, both):
        """So do Starlette's routes, WebSockets, and hosts, for which FastAPI makes routes with the whole path."""
        plain = await both.ask_index("GET", "/v1/acme/starlette/1")
        socket = await both.ask_index("WS", "/v1/acme/inner/ws/1")
        host = await both.ask_index("GET", "/v1/acme/9", headers=[(b"host", b"other.test")])

        assert plain.body == "starlette"
        assert socket.messages[1]["text"].startswith("inner {'tenant': 'acme', 'id': '1'}")
        assert host.status == 404  # the first header line counts, which names another host

    async def test_limits_of_bodies(self):
        """The innermost limit on the way to the route counts, for Starlette's routes as well."""
        app = FastAPI(openapi_url=None)
        outer, inner = APIRouter(max_body_size=2), APIRouter(max_body_size=4)
        for router in (outer, inner):
            router.add_route("/plain", read, methods=["POST"])
            router.post("/json")(echo("json"))
        outer.include_router(inner, prefix="/inner")
        app.include_router(outer, max_body_size=1)
        both = BothWays(app)

        answers = {
            path: [(await both.ask_index("POST", path, body=b"x" * size)).status for size in (2, 3, 4, 5)]
            for path in ("/plain", "/inner/plain")
        }

        assert answers == {"/plain": [200, 413, 413, 413], "/inner/plain": [200, 200, 200, 413]}

    @pytest.mark.skipif(not hasattr(APIRouter(), "form_limits"), reason="FastAPI 0.164 has no limits of forms")
    async def test_limits_of_forms(self):
        """Limits of all routers on the way are merged, and the innermost counts."""
        pytest.importorskip("python_multipart", reason="forms need python-multipart, of the extra `standard`")
        app = FastAPI(openapi_url=None, form_limits={"max_fields": 3})
        outer, inner = APIRouter(form_limits={"max_fields": 1}), APIRouter()

        async def fields(a: str = Form("")):
            return a

        inner.post("/form")(fields)
        outer.include_router(inner)
        app.include_router(outer, prefix="/one")
        app.include_router(inner, prefix="/two", form_limits={"max_fields": 2})
        app.post("/three/form")(fields)
        inner.add_api_websocket_route("/talk", talk("socket"))
        both = BothWays(app)
        form = [(b"content-type", b"application/x-www-form-urlencoded")]

        answers = {
            path: [
                (await both.ask_index("POST", f"/{path}/form", headers=form, body=body)).status
                for body in (b"a=1", b"a=1&b=2", b"a=1&b=2&c=3", b"a=1&b=2&c=3&d=4")
            ]
            for path in ("one", "two", "three")
        }

        assert answers == {"one": [200, 400, 400, 400], "two": [200, 200, 400, 400], "three": [200, 200, 200, 400]}
        assert len((await both.ask_index("WS", "/two/talk")).messages) == 3

    async def test_a_router_of_a_class_that_matches_in_its_own_way(self):
        """Its routes are left to the router, in the right place of the order."""

        class Own(APIRouter):
            def matches(self, scope):
                return super().matches(scope)

        app, own, around = FastAPI(openapi_url=None), Own(), APIRouter()
        app.get("/first")(echo("first"))
        own.get("/own")(echo("own"))
        around.include_router(own)
        app.include_router(around)
        app.get("/last")(echo("last"))
        both = BothWays(app)

        assert name_of(await both.ask_index("GET", "/first")) == "first"
        assert name_of(await both.ask_router("GET", "/own")) == "own"
        assert name_of(await both.ask_router("GET", "/last")) == "last"

    async def test_a_router_whose_routes_cannot_be_read(self):
        """The error is raised for the requests that reach the router, and for no others."""
        app, router = app_of("/first"), APIRouter()
        router.get("/{name}")(echo("twice"))
        app.include_router(router, prefix="/{name}")
        both = BothWays(app)

        first, broken = await both.ask_index("GET", "/first"), await both.ask_router("GET", "/a/b")

        assert first.status == 200
        assert broken.error.startswith("ValueError('Duplicated param name")


async def read(request):
    return PlainTextResponse(await request.body())


class Shouting(BaseRoute):
    """A route of a kind that nobody knows: it matches paths in upper case."""

    def matches(self, scope):
        upper = scope["type"] == "http" and scope["path"].isupper()
        return (Match.FULL if upper else Match.NONE), {}

    async def handle(self, scope, receive, send):
        await PlainTextResponse("LOUD")(scope, receive, send)


class TestOtherRoutes:
    async def test_mounts(self):
        """A mount takes what is below its path, unless an earlier route matches, and changes root_path for its app."""
        app = app_of("/sub/first")
        app.mount("/sub", app_of("/{id}", "/sub/first"))
        app.get("/sub/last")(echo("last"))
        app.mount("/{tenant}/sub", app_of("/{id}"))
        app.mount("", app_of("/root"))
        both = BothWays(app)

        paths = ["/sub/first", "/sub/1", "/sub/last", "/sub", "/sub/", "/acme/sub/1", "/root", "/sub/a/b"]
        answers = [await both.ask("GET", path) for path in paths]

        assert [name_of(answer) for answer in answers] == [
            "/sub/first", "/{id}", "/{id}", 404, 404, "/{id}", "/root", 404,
        ]  # fmt: skip

    async def test_a_mounted_app_with_an_index(self):
        """Both apps may have one."""
        app, sub, router = app_of("/a"), FastAPI(openapi_url=None), APIRouter()
        router.get("/{id}")(echo("sub"))
        sub.include_router(router, prefix="/inner")
        index_routes(sub)
        app.mount("/sub", sub)

        answer = await BothWays(app).ask_index("GET", "/sub/inner/1")

        assert name_of(answer) == "sub"
        assert answer.scope["root_path"] == "/sub"

    async def test_hosts(self):
        """A host takes every path of its name, in its place of the order."""
        app = app_of("/first")
        app.host("{name}.test", app_of("/{id}"))
        app.get("/last")(echo("last"))
        both = BothWays(app)

        answers = [await both.ask_index("GET", path) for path in ("/first", "/last", "/other")]
        elsewhere = await both.ask_index("GET", "/last", headers=[])

        assert [name_of(answer) for answer in answers] == ["/first", "/{id}", "/{id}"]
        assert elsewhere.scope["path_params"] == {"id": "last", "name": "api"}

    async def test_websockets(self):
        """A WebSocket and a request of the same path have a route each."""
        app = app_of("/talk/{id}")
        app.add_api_websocket_route("/talk/{id}", talk("socket"))
        app.router.add_websocket_route("/starlette/{id}", talk("starlette"))
        both = BothWays(app)

        sockets = [await both.ask_index("WS", path) for path in ("/talk/1", "/starlette/1", "/nowhere", "/talk/1/")]
        request = await both.ask_index("GET", "/talk/1")

        assert [len(answer.messages) for answer in sockets] == [3, 3, 1, 1]
        assert name_of(request) == "/talk/{id}"

    async def test_frontends(self, tmp_path):
        """Files of a front end are served where no route matches, and only the router knows them."""
        (tmp_path / "index.html").write_text("<html>")
        app, router = app_of("/items", "/items/{id}"), APIRouter()
        router.frontend("/", directory=tmp_path)
        app.include_router(router)
        both = BothWays(app)

        page, item = await both.ask_router("GET", "/"), await both.ask_index("GET", "/items")
        redirect = await both.ask_router("GET", "/items/")

        assert page.body == "<html>"
        assert name_of(item) == "/items"
        assert redirect.status == 307

    async def test_routes_of_an_unknown_kind(self):
        """They are left to the router from their place in the order on, and routes before them are not."""
        app = app_of("/first", "/FIRST")
        app.routes.append(Shouting())
        app.get("/last")(echo("last"))
        both = BothWays(app)

        indexed = [await both.ask_index("GET", path) for path in ("/first", "/FIRST")]
        routed = [await both.ask_router("GET", path) for path in ("/LOUD", "/last", "/nowhere")]

        assert [name_of(answer) for answer in indexed] == ["/first", "/FIRST"]
        assert [answer.status for answer in routed] == [200, 200, 404]

    @pytest.mark.parametrize("included", [False, True])
    async def test_routes_that_match_in_their_own_way(self, included):
        """The same holds for FastAPI's route with another `matches`, in its class or on the object."""

        class Picky(APIRoute):
            def matches(self, scope):
                return (Match.NONE, {}) if b"x-picky" in dict(scope["headers"]) else super().matches(scope)

        app = FastAPI(openapi_url=None)
        router = APIRouter() if included else app.router
        router.add_api_route("/picky", echo("picky"), route_class_override=Picky)
        router.add_api_route("/picky", echo("fallback"))
        if included:
            app.include_router(router)
        both = BothWays(app)

        answers = [await both.ask_router("GET", "/picky", headers=[(name, b"1")]) for name in (b"x-picky", b"x-other")]

        assert [name_of(answer) for answer in answers] == ["fallback", "picky"]

    async def test_route_classes_with_a_handler_of_their_own(self):
        """A class that wraps the handler, as FastAPI's documentation has it, is known and wraps it."""

        class Wrapping(APIRoute):
            def get_route_handler(self):
                handler = super().get_route_handler()

                async def wrapped(request: Request):
                    response = await handler(request)
                    response.headers["x-wrapped"] = "yes"
                    return response

                return wrapped

        app, router = FastAPI(openapi_url=None), APIRouter(route_class=Wrapping)
        router.get("/items/{id}")(echo("item"))
        app.include_router(router, prefix="/v1")

        answer = await BothWays(app).ask_index("GET", "/v1/items/1")

        assert answer.headers["x-wrapped"] == "yes"


class TestChanges:
    async def test_routes_added_after_the_first_request(self):
        """A route of the app or of a router at any depth, a router, a mount: each is seen at the next request."""
        app, outer, inner, late = app_of("/first"), APIRouter(), APIRouter(), APIRouter()
        inner.get("/inner/first")(echo("inner"))
        outer.include_router(inner)
        app.include_router(outer)
        both = BothWays(app)
        assert (await both.ask_index("GET", "/new")).status == 404

        app.get("/new")(echo("new"))
        assert name_of(await both.ask_index("GET", "/new")) == "new"
        inner.get("/inner/new")(echo("inner new"))
        assert name_of(await both.ask_index("GET", "/inner/new")) == "inner new"
        late.get("/late")(echo("late"))
        outer.include_router(late)
        assert name_of(await both.ask_index("GET", "/late")) == "late"
        late.get("/later")(echo("later"))
        assert name_of(await both.ask_index("GET", "/later")) == "later"
        app.mount("/mounted", app_of("/{id}"))
        assert name_of(await both.ask_index("GET", "/mounted/1")) == "/{id}"

    async def test_changes_of_the_list_by_hand(self):
        """Routes that are inserted, replaced or removed are noticed, although nothing counts these changes."""
        app, router, inner = app_of("/{a}", "/items"), APIRouter(), APIRouter()
        inner.get("/inner")(echo("inner"))
        router.include_router(inner)
        app.include_router(router)
        both = BothWays(app)
        assert name_of(await both.ask_index("GET", "/items")) == "/{a}"

        app.routes.insert(0, APIRoute("/items", echo("inserted")))
        assert name_of(await both.ask_index("GET", "/items")) == "inserted"
        del app.routes[:2]
        assert name_of(await both.ask_index("GET", "/items")) == "/items"
        app.routes[0] = APIRoute("/items", echo("replaced"))
        assert name_of(await both.ask_index("GET", "/items")) == "replaced"
        router.routes.clear()
        assert (await both.ask_index("GET", "/inner")).status == 404

    def test_routes_added_in_a_lifespan(self):
        """No route is read before start-up is over, so that it may change them."""
        seen = []

        @asynccontextmanager
        async def lifespan(running):
            router.get("/new")(echo("new"))
            seen.extend(each for each in running.routes if getattr(each, "_effective_candidates", None))
            yield

        router = APIRouter()
        app = FastAPI(lifespan=lifespan)
        app.include_router(router)
        index_routes(app)

        with TestClient(app) as client:
            answer = client.get("/new")

        assert answer.json()["name"] == "new"
        assert seen == []

    def test_routes_added_by_another_thread(self):
        """Whatever is added while the routes are read is served once the call that adds it has returned."""
        app, router = FastAPI(openapi_url=None), APIRouter()
        app.include_router(router)
        index_routes(app)
        client = TestClient(app)
        over = threading.Event()

        def ask_all_the_time():
            while not over.is_set():
                client.get("/nowhere")

        thread = threading.Thread(target=ask_all_the_time)
        thread.start()
        try:
            missed = []
            for number in range(10):
                router.get(f"/{number}")(echo(str(number)))
                missed += [number] if client.get(f"/{number}").status_code != 200 else []
        finally:
            over.set()
            thread.join()

        assert missed == []


class TestStandingAside:
    @pytest.fixture(autouse=True)
    def _tried_again(self):
        trial.fastapi_is_known.cache_clear()
        yield
        trial.fastapi_is_known.cache_clear()

    def test_an_unknown_fastapi(self, monkeypatch, caplog):
        """If FastAPI has parts that are not known, everything stays as it was, and one line says so."""
        monkeypatch.setattr("fastapi_prodkit._routing.fastapi_routes._IncludedRouter", None)
        app = app_of("/items")
        before = app.router.middleware_stack

        index_routes(app)

        assert app.router.middleware_stack == before
        assert TestClient(app).get("/items").status_code == 200
        assert [record.message for record in caplog.records] == [
            "routes are not indexed: this version of FastAPI or this router is not known"
        ]

    def test_another_effect_on_the_scope(self, monkeypatch):
        """The trial compares what the router and the index leave behind."""
        assert trial.fastapi_is_known()
        trial.fastapi_is_known.cache_clear()

        monkeypatch.setattr("fastapi_prodkit._routing.fastapi_routes._ROUTERS_KEY", "another")

        assert not trial.fastapi_is_known()

    def test_requests_that_are_left_to_the_router(self, monkeypatch):
        """An index that leaves everything to the router is of no use."""
        monkeypatch.setattr("fastapi_prodkit._routing.index.RouteIndex.find", lambda _index, _scope: None)

        assert not trial.fastapi_is_known()

    def test_a_router_that_waits(self, monkeypatch):
        """A router that waits for something is none that the trial can compare."""

        async def wait(route, scope, receive, send):
            await asyncio.sleep(0)

        monkeypatch.setattr("fastapi_prodkit._routing.trial._Route.handle", wait)

        assert not trial.fastapi_is_known()

    def test_a_router_with_an_app_of_its_own(self, caplog):
        """A router whose class or object serves requests in another way keeps doing so."""

        class Own(APIRouter):
            async def app(self, scope, receive, send):
                await super().app(scope, receive, send)

        app = FastAPI()
        app.router = Own()

        index_routes(app)

        assert len(caplog.records) == 1
        assert _scope.ROUTER_INDEX not in vars(app.router)

    def test_something_unknown_around_the_router(self, caplog):
        """A router that is called by something else than its own limits is left alone."""
        app = app_of("/items")

        async def around(scope, receive, send):
            await app.router.app(scope, receive, send)

        app.router.middleware_stack = around

        index_routes(app)

        assert len(caplog.records) == 1
        assert TestClient(app).get("/items").status_code == 200

    async def test_the_body_limit_of_the_app(self):
        """The index is inside of the limit that FastAPI puts around its router."""
        app = FastAPI(openapi_url=None, max_body_size=4)
        app.add_route("/plain", read, methods=["POST"])
        both = BothWays(app)

        answers = [(await both.ask_index("POST", "/plain", body=body)).status for body in (b"1234", b"12345")]

        assert answers == [200, 413]

    def test_a_second_call(self):
        """It does nothing."""
        app = app_of("/items")
        index_routes(app)
        index = vars(app.router)[_scope.ROUTER_INDEX]

        index_routes(app)

        assert app.router.middleware_stack is index


class TestFindRoute:
    async def found(self, app, method, path):
        """Return what is found before routing, and the route that has served, as a layer around the app sees them."""
        found = []

        async def around(scope, receive, send):
            scope["app"] = app
            found.append(find_route(scope))
            await app(scope, receive, send)

        answer = await ask(around, method, path)
        return found[0], chosen_route(answer.scope)

    @pytest.mark.parametrize(
        ("method", "path", "template"),
        [
            ("GET", "/items/1", "/items/{id}"),
            ("PUT", "/items/1", "/items/{id}"),
            ("GET", "/v1/inner/1", "/v1/inner/{id}"),
            ("GET", "/nowhere", None),
            ("GET", "/items/1\n", None),
        ],
    )
    async def test_the_route_before_routing(self, method, path, template):
        """A layer learns which route will serve, with its whole path and dependencies; None if it is not known."""
        app, router = app_of("/items/{id}"), APIRouter()
        router.get("/inner/{id}")(echo("inner"))
        app.include_router(router, prefix="/v1")
        index_routes(app)

        found, served = await self.found(app, method, path)

        assert getattr(found, "path_format", None) == template
        assert found is None or found is served

    async def test_without_an_index(self):
        """It is not known, either."""
        found, _ = await self.found(app_of("/items"), "GET", "/items")

        assert found is None
        assert find_route({"type": "http", "path": "/items"}) is None


class TestAssembly:
    @pytest.mark.parametrize("index", [True, False])
    def test_create_app_and_install(self, index):
        """Both index the routes unless ROUTING_INDEX is false, and the routes of the app stay as they are."""
        settings = Settings(environment="test", log=None, routing={"index": index})
        created, installed = create_app(settings), FastAPI(openapi_url=None)
        install(installed, settings)
        apps = [created, installed, create_app(Settings(environment="test", log=None, routing=None))]

        indexed = [_scope.ROUTER_INDEX in vars(app.router) for app in apps]

        assert indexed == [index, index, False]
        assert installed.routes == []

    def test_the_docs_are_not_asked(self, asked):
        """The documentation, which comes first in the table, costs other routes nothing, and is served."""
        app = create_app(Settings(environment="test", log=None))
        app.get("/items")(echo("items"))
        client = TestClient(app)

        statuses = [client.get(path).status_code for path in ("/docs", "/openapi.json", "/items", "/health")]

        assert statuses == [200, 200, 200, 200]
        assert asked == ["/items"]

    @pytest.mark.parametrize("index", [True, False])
    @pytest.mark.parametrize("path", ["/v1/items/1", "/v1/items/x", "/sub/1", "/nowhere", "/items/1/"])
    def test_the_template_in_the_log(self, path, index, caplog):
        """The access line has the same template with and without the index."""
        app, router = create_app(Settings(environment="test", log=None, routing={"index": index})), APIRouter()

        @router.get("/items/{item_id}")
        async def item(item_id: int): ...

        app.include_router(router, prefix="/v1")
        app.include_router(router)
        app.mount("/sub", app_of("/{id}"))
        caplog.set_level("INFO")

        TestClient(app, follow_redirects=False).get(path)

        templates = {"/v1/items/1": "/v1/items/{item_id}", "/v1/items/x": "/v1/items/{item_id}", "/sub/1": "/sub/{id}"}
        line = next(record for record in caplog.records if record.name == "fastapi_prodkit.access")
        assert line.http_route == templates.get(path, "_unmatched")
