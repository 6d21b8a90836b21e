"""The body limit: what is too large is refused as a problem, announced or not; what an app says itself stays."""

import asyncio
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
from wire import connection, read_all, read_response, request, serving

from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.body_limit import BodyLimitMiddleware, largest_limit
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ProblemError
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


PATIENCE = 0.05  # seconds
HALF = {"type": "http.request", "body": b"[1", "more_body": True}


def paced(**options) -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, LimitsSettings(body_timeout=PATIENCE, **options))

    @app.post("/")
    async def read(numbers: list[int]):
        return numbers

    @app.post("/raw")
    async def raw(request: Request):
        return len(await request.body())

    return app


async def stall(app, *, version="1.1", path="/", messages=(HALF,), headers=((b"content-length", b"3"),)):
    """Call an app as a server does whose client sends these messages and then nothing."""
    sent, coming = [], list(messages)

    async def receive():
        if not coming:
            await asyncio.sleep(30)
        return coming.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": version, "method": "POST", "path": path, "query_string": b""}
    await app(scope | {"headers": [(b"content-type", b"application/json"), *headers]}, receive, send)
    return sent


def is_stalled(sent, *, closed=True):
    """Say whether the one response is the problem, and the connection is closed after it."""
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == json.loads(sent[1]["body"])["status"] == 408
    assert headers[b"content-type"] == PROBLEM.encode()
    assert (headers.get(b"connection") == b"close") == closed
    assert ["status" in message for message in sent].count(True) == 1
    return True


@pytest.mark.parametrize("handlers", [True, False])
@pytest.mark.parametrize("path", ["/", "/raw"])
@pytest.mark.parametrize("headers", [((b"content-length", b"3"),), ((b"transfer-encoding", b"chunked"),)])
async def test_stalled_body(handlers, path, headers):
    """A body that stops coming is a 408 problem, announced or chunked, with the problem handlers and without."""
    app = paced()
    if handlers:
        add_problem_handlers(app)

    assert is_stalled(await stall(app, path=path, headers=headers))
    assert is_stalled(await stall(app, path=path, headers=headers, messages=()))
    assert asyncio.current_task().cancelling() == 0


async def test_a_stalled_body_says_why(caplog):
    """The line of the log names the setting."""
    await stall(AccessLogMiddleware(paced()))

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert (record.levelname, record.http_status) == ("WARNING", 408)
    assert record.reason == "no part of the body for LIMITS_BODY_TIMEOUT=0.05 seconds"


async def test_stalled_body_of_a_plain_app():
    """An app that knows no exceptions of HTTP gets the same answer; HTTP/2 closes no connection that way."""

    async def app(scope, receive, send):
        while True:
            await receive()

    limited = BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))

    assert is_stalled(await stall(limited))
    assert is_stalled(await stall(limited, version="2", headers=()), closed=False)


async def test_stalled_body_below_task_groups():
    """A middleware that runs the app in another task changes nothing."""
    app = paced()
    inner = app.middleware("http")

    @inner
    async def pass_on(request, call_next):
        return await call_next(request)

    outer = BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))

    assert is_stalled(await stall(outer))
    assert is_stalled(await stall(app))


async def test_a_handler_that_waits_for_a_stalled_body_is_cancelled():
    """What it still says comes too late."""
    cancelled = []

    async def app(scope, receive, send):
        try:
            await receive()
        except asyncio.CancelledError as error:
            cancelled.append(error)
            await PlainTextResponse("enough")(scope, receive, send)

    sent = await stall(BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE)), messages=())

    assert [message.get("status") for message in sent] == [408, None]
    assert len(cancelled) == 1


async def test_body_that_stalls_after_the_response_has_started():
    """Once the response has started, a client that sends no more counts as gone."""
    seen = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        seen.extend([await receive(), await receive()])

    await stall(BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE)))

    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_a_problem_of_the_app_is_its_own():
    """A problem that the app raises while its body comes is raised on."""

    async def app(scope, receive, send):
        raise ProblemError(418)

    with pytest.raises(ProblemError, match="418"):
        await stall(BodyLimitMiddleware(app))


async def test_waiting_for_the_client_to_leave_takes_as_long_as_it_takes():
    """When the body is complete, an app may wait for the disconnect without end."""
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": b"[1]"}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def app(scope, receive, send):
        await receive()
        asyncio.get_running_loop().call_later(3 * PATIENCE, gone.set)
        assert (await receive())["type"] == "http.disconnect"

    scope = {"type": "http", "http_version": "2", "method": "POST", "path": "/", "headers": []}
    await BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))(scope, receive, None)

    assert gone.is_set()


@pytest.mark.parametrize("late", [True, False])
async def test_a_request_that_is_cancelled_while_its_body_comes(late):
    """A request that the server cancels stays cancelled, even in the moment in which the time is over."""

    async def receive():
        try:
            await asyncio.sleep(30 if late else 0)
        finally:
            asyncio.current_task().cancel()
            await asyncio.sleep(0)

    async def send(message): ...

    async def app(scope, receive, send):
        await receive()

    limited = BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))
    scope = {"type": "http", "http_version": "2", "method": "POST", "path": "/", "headers": []}
    task = asyncio.create_task(limited(scope, receive, send))
    await asyncio.wait([task], timeout=10)

    assert task.cancelled()


async def test_no_time_for_bodies():
    """With `none` nothing is watched."""

    async def app(scope, receive, send):
        seen.append(receive)

    async def receive(): ...

    seen = []
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/"}
    limited = BodyLimitMiddleware(app, LimitsSettings(body_timeout=None), largest=0)
    for length in (b"0", b"1"):
        await limited(scope | {"headers": [(b"content-length", length)]}, receive, None)

    assert [each.__qualname__ for each in seen] == ["Exchange.receive"] * 2


def test_stalled_body_on_the_wire():
    """Under a real server a client that sends half of its body hears so, and its connection is closed."""
    half = request("POST", "/", "Content-Type: application/json", body=b"[1, 2, 3]")[:-4]

    with serving(paced()) as port:
        with connection(port) as slow:
            slow.sendall(half)
            answer = read_all(slow)
        with connection(port) as fast:
            for part in (half, b", 3]"):
                fast.sendall(part)
            served = read_response(fast)

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"408"
    assert b"connection: close" in head.lower()
    assert json.loads(body)["detail"] == "The body of the request did not arrive in time."
    assert served.endswith(b"[1,2,3]")


async def test_two_that_wait_for_one_body():
    """A second task that asks for messages while the first waits gets what comes after that."""
    messages = asyncio.Queue()

    async def app(scope, receive, send):
        waiting = [asyncio.create_task(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        messages.put_nowait({"type": "http.request", "body": b"x"})
        messages.put_nowait({"type": "http.disconnect"})
        seen.extend([await task for task in waiting])

    seen = []
    scope = {"type": "http", "http_version": "2", "method": "POST", "path": "/", "headers": []}
    await BodyLimitMiddleware(app)(scope, messages.get, None)

    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
