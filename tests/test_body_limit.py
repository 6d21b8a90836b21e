"""The body limit: what is too large is refused as a problem, announced or not; what an app says itself stays."""

import json
from http import HTTPStatus

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_prodkit.body_limit import BodyLimitMiddleware, largest_limit
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.sections import LimitsSettings

PROBLEM = "application/problem+json"


class Item(BaseModel):
    name: str


def service(size=20, *, handlers=True) -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, LimitsSettings(max_body_size=size))
    if handlers:
        add_problem_handlers(app)

    @app.post("/")
    async def read(item: Item):
        return item

    @app.post("/unread")
    async def unread():
        return {}

    @app.post("/raw")
    async def raw(request: Request):
        return len(await request.body())

    @app.post("/larger", max_body_size=40)
    async def larger(request: Request):
        return len(await request.body())

    @app.post("/own")
    async def own():
        return PlainTextResponse("No.", 413)

    @app.post("/own-json")
    async def own_json():
        return JSONResponse({"limit": 7}, 413)

    return app


def chunks(size):
    for _ in range(size):
        yield b"x"


def is_problem(response):
    assert response.status_code == 413
    assert response.headers.get_list("content-type") == [PROBLEM]
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["cache-control"] == "no-store"
    assert response.json()["status"] == 413
    assert response.json()["title"] == HTTPStatus(413).phrase
    return True


@pytest.mark.parametrize("handlers", [True, False])
@pytest.mark.parametrize("path", ["/", "/unread", "/raw"])
def test_announced_over_size(path, handlers):
    """A body that says it is too large is refused with the problem, whether or not the route reads it."""
    response = TestClient(service(handlers=handlers)).post(path, json={"name": "more than twenty bytes"})

    assert is_problem(response)


@pytest.mark.parametrize("handlers", [True, False])
@pytest.mark.parametrize("path", ["/", "/raw"])
def test_chunked_over_size(path, handlers):
    """A body that grows too large without having said so is the same problem."""
    response = TestClient(service(handlers=handlers)).post(
        path, content=chunks(21), headers={"Content-Type": "application/json"}
    )

    assert is_problem(response)


async def test_an_announced_over_size_is_not_read():
    """A refusal costs no upload, and a chunked body is read no further than to the limit."""
    sent, received = [], []

    async def receive():
        received.append(b"x" * 8)
        return {"type": "http.request", "body": received[-1], "more_body": True}

    async def send(message):
        sent.append(message)

    def scope(*headers):
        return {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/raw",
            "query_string": b"",
            "headers": headers,
        }

    app = service()
    await app(scope((b"content-length", b"21")), receive, send)
    after_announced = len(received)
    await app(scope((b"transfer-encoding", b"chunked")), receive, send)

    assert [message["status"] for message in sent if "status" in message] == [413, 413]
    assert (after_announced, len(received)) == (0, 3)


@pytest.mark.parametrize(("content", "size"), [(b"x" * 20, 20), (b"", 0), (chunks(20), 20)])
def test_allowed_size(content, size):
    """A body that is not too large passes untouched."""
    response = TestClient(service()).post("/raw", content=content)

    assert response.json() == size


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_requests_without_a_body(method):
    """A request that has no body costs no counting, and passes."""
    assert TestClient(service()).request(method, "/raw").status_code == 405


def test_no_limit():
    """With `none` the app's own limit holds; around the app its plain refusal becomes the problem, too."""
    app = FastAPI(max_body_size=30)

    @app.post("/raw")
    async def raw(request: Request):
        return len(await request.body())

    client = TestClient(BodyLimitMiddleware(app, LimitsSettings(max_body_size=None)))

    assert client.post("/raw", content=b"x" * 30).json() == 30
    assert is_problem(client.post("/raw", content=b"x" * 31))


def test_limit_of_a_route():
    """A route's own limit wins over the general one."""
    client = TestClient(service(20))

    assert client.post("/larger", content=b"x" * 40).json() == 40
    assert is_problem(client.post("/larger", content=b"x" * 41))


@pytest.mark.parametrize(("path", "text"), [("/own", "No."), ("/own-json", '{"limit":7}')])
@pytest.mark.parametrize("content", [b"", b"x"])
def test_a_413_of_the_app_itself(path, text, content):
    """A 413 that the app made is left as it is."""
    response = TestClient(service()).post(path, content=content)

    assert (response.status_code, response.text) == (413, text)


async def test_a_413_without_headers():
    """An ASGI app may leave out the headers of its response."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 413})
        await send({"type": "http.response.body", "body": b"own"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": "2", "method": "POST", "path": "/", "headers": []}
    await BodyLimitMiddleware(app)(scope, None, send)

    assert [message.get("body") for message in sent] == [None, b"own"]


@pytest.mark.parametrize("version", ["2", "3"])
async def test_http_2(version):
    """A body needs no header to announce it in HTTP/2 and HTTP/3; it is counted there."""
    sent, messages = [], [{"type": "http.request", "body": b"x" * 21}]

    async def receive():
        return messages.pop()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": version, "method": "POST", "path": "/raw", "headers": []}
    await service()(scope | {"query_string": b""}, receive, send)

    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["instance"] == "/raw"


def test_plain_starlette():
    """An app without FastAPI has the same limit."""

    async def endpoint(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(BodyLimitMiddleware, LimitsSettings(max_body_size=20))
    client = TestClient(app)

    assert client.post("/", content=b"x" * 20).text == "20"
    assert is_problem(client.post("/", content=b"x" * 21))
    assert is_problem(client.post("/", content=chunks(21)))


def test_default():
    """Without arguments the limit is a mebibyte."""

    async def endpoint(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(BodyLimitMiddleware)
    client = TestClient(app)

    assert client.post("/", content=b"x" * 1_048_576).text == "1048576"
    assert is_problem(client.post("/", content=b"x" * 1_048_577))


def test_other_scopes():
    """WebSockets and lifespan messages pass untouched."""
    app = service()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text("x" * 50)
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/ws") as session:
        assert session.receive_text() == "x" * 50


def test_two_apps_in_one_process():
    """Two apps with different limits do not know of each other."""
    small, large = TestClient(service(10)), TestClient(service(30))

    statuses = [client.post("/raw", content=b"x" * 20).status_code for client in (small, large)]

    assert statuses == [413, 200]


@pytest.mark.parametrize(
    ("path", "announced", "status"),
    # Between the general limit and the largest, Starlette refuses a body that is not read when the response starts.
    [("/unread", 20, 200), ("/unread", 21, 413), ("/unread", 41, 413), ("/larger", 40, 200), ("/larger", 41, 413)],
)
def test_with_the_largest_limit_known(path, announced, status):
    """What no route takes is refused before any runs; up to a route's own limit it is the route's to decide."""
    inner = service(size=None)
    app = BodyLimitMiddleware(inner, LimitsSettings(max_body_size=20), largest=largest_limit(inner.routes))

    response = TestClient(app).post(path, content=b"x" * announced)

    assert response.status_code == status


async def test_a_small_announced_body_is_not_looked_at():
    """Where no route has a limit of its own, an announced size within the limit says it all; chunks are counted."""
    seen = []

    async def app(scope, receive, send):
        seen.append("starlette.max_body_size" in scope)

    limited = BodyLimitMiddleware(app, LimitsSettings(max_body_size=20), largest=0)
    for headers in ([(b"content-length", b"20")], [(b"content-length", b"20"), (b"transfer-encoding", b"chunked")]):
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/", "headers": headers}
        await limited(scope, None, None)

    assert seen == [False, True]


def test_the_largest_limit_of_routes_and_mounts():
    """Routes, included routers, mounted apps and what is mounted in them."""
    leaf = FastAPI(max_body_size=300)
    sub = FastAPI()
    sub.mount("/leaf", leaf)
    app = service()
    router = APIRouter(max_body_size=100)
    router.add_api_route("/x", lambda: None, methods=["POST"])
    app.include_router(router)

    assert largest_limit(app.routes) == 100
    app.mount("/sub", sub)
    assert largest_limit(app.routes) == 300
    assert largest_limit([]) == 0
