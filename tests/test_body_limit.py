"""The body limit: a body that is too large or too slow is refused with a problem."""

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
def test_announced_oversized_body_is_refused(path, handlers):
    """Whether or not the route reads the body."""
    response = TestClient(service(handlers=handlers)).post(path, json={"name": "more than twenty bytes"})

    assert is_problem(response)


@pytest.mark.parametrize("handlers", [True, False])
@pytest.mark.parametrize("path", ["/", "/raw"])
def test_chunked_oversized_body_is_refused(path, handlers):
    """A chunked body without Content-Length gets a 413 problem if it exceeds the limit."""
    response = TestClient(service(handlers=handlers)).post(
        path, content=chunks(21), headers={"Content-Type": "application/json"}
    )

    assert is_problem(response)


async def test_refused_body_is_not_read():
    """A chunked body is read up to the limit."""
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
def test_allowed_body_passes_unchanged(content, size):
    """A body of at most the maximum size reaches the app completely, with or without Content-Length."""
    response = TestClient(service()).post("/raw", content=content)

    assert response.json() == size


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_request_without_a_body_passes_uncounted(method):
    """A request without a body passes through the body limit to the app."""
    assert TestClient(service()).request(method, "/raw").status_code == 405


def test_none_leaves_the_limit_to_the_app():
    """Around the app its plain refusal becomes a problem."""
    app = FastAPI(max_body_size=30)

    @app.post("/raw")
    async def raw(request: Request):
        return len(await request.body())

    client = TestClient(BodyLimitMiddleware(app, LimitsSettings(max_body_size=None)))

    assert client.post("/raw", content=b"x" * 30).json() == 30
    assert is_problem(client.post("/raw", content=b"x" * 31))


def test_limit_of_a_route_wins():
    """A route's own `max_body_size` replaces the general limit, even if it is larger."""
    client = TestClient(service(20))

    assert client.post("/larger", content=b"x" * 40).json() == 40
    assert is_problem(client.post("/larger", content=b"x" * 41))


@pytest.mark.parametrize(("path", "text"), [("/own", "No."), ("/own-json", '{"limit":7}')])
@pytest.mark.parametrize("content", [b"", b"x"])
def test_413_of_the_app_stays(path, text, content):
    """A 413 response that the app creates keeps its body and is not replaced by our problem."""
    response = TestClient(service()).post(path, content=content)

    assert (response.status_code, response.text) == (413, text)


async def test_413_without_headers_stays():
    """ASGI makes the headers of a response optional."""
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
async def test_body_without_headers_is_counted_in_http_2(version):
    """HTTP/2 and HTTP/3 need no header to announce a body."""
    sent, messages = [], [{"type": "http.request", "body": b"x" * 21}]

    async def receive():
        return messages.pop()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": version, "method": "POST", "path": "/raw", "headers": []}
    await service()(scope | {"query_string": b""}, receive, send)

    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["instance"] == "/raw"


def test_plain_starlette_app_has_the_limit():
    """The body limit works in a plain Starlette app, which has no problem handlers."""

    async def endpoint(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(BodyLimitMiddleware, LimitsSettings(max_body_size=20))
    client = TestClient(app)

    assert client.post("/", content=b"x" * 20).text == "20"
    assert is_problem(client.post("/", content=b"x" * 21))
    assert is_problem(client.post("/", content=chunks(21)))


def test_default_is_one_mebibyte():
    """Without arguments, the middleware accepts a body of 1,048,576 bytes and refuses one byte more."""

    async def endpoint(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(BodyLimitMiddleware)
    client = TestClient(app)

    assert client.post("/", content=b"x" * 1_048_576).text == "1048576"
    assert is_problem(client.post("/", content=b"x" * 1_048_577))


def test_websockets_and_lifespan_pass_unchanged():
    """The body limit applies to neither WebSocket messages nor lifespan messages."""
    app = service()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text("x" * 50)
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/ws") as session:
        assert session.receive_text() == "x" * 50


def test_two_apps_have_separate_limits():
    """Two apps in one process each apply their own body limit."""
    small, large = TestClient(service(10)), TestClient(service(30))

    statuses = [client.post("/raw", content=b"x" * 20).status_code for client in (small, large)]

    assert statuses == [413, 200]


@pytest.mark.parametrize(
    ("path", "announced", "status"),
    # Between the general limit and the largest, Starlette refuses a body that is not read when the response starts.
    [("/unread", 20, 200), ("/unread", 21, 413), ("/unread", 41, 413), ("/larger", 40, 200), ("/larger", 41, 413)],
)
def test_body_beyond_the_largest_limit_is_refused_before_routing(path, announced, status):
    """A smaller body is left to the route."""
    inner = service(size=None)
    app = BodyLimitMiddleware(inner, LimitsSettings(max_body_size=20), largest=largest_limit(inner.routes))

    response = TestClient(app).post(path, content=b"x" * announced)

    assert response.status_code == status


async def test_small_announced_body_is_not_counted():
    """If no route has a limit of its own; chunked bodies are counted."""
    seen = []

    async def app(scope, receive, send):
        seen.append("starlette.max_body_size" in scope)

    limited = BodyLimitMiddleware(app, LimitsSettings(max_body_size=20), largest=0)
    for headers in ([(b"content-length", b"20")], [(b"content-length", b"20"), (b"transfer-encoding", b"chunked")]):
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/", "headers": headers}
        await limited(scope, None, None)

    assert seen == [False, True]


def test_largest_limit_includes_routers_and_mounts():
    """The largest limit is the maximum over included routers, mounted apps and apps mounted in those."""
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
    """Call an app like a server whose client sends these messages, and then nothing."""
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
    """Return whether the response is the 408 problem and closes the connection."""
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == json.loads(sent[1]["body"])["status"] == 408
    assert headers[b"content-type"] == PROBLEM.encode()
    assert (headers.get(b"connection") == b"close") == closed
    assert ["status" in message for message in sent].count(True) == 1
    return True


@pytest.mark.parametrize("handlers", [True, False])
@pytest.mark.parametrize("path", ["/", "/raw"])
@pytest.mark.parametrize("headers", [((b"content-length", b"3"),), ((b"transfer-encoding", b"chunked"),)])
async def test_stalled_body_is_a_408_problem(handlers, path, headers):
    """Announced or chunked, with and without problem handlers."""
    app = paced()
    if handlers:
        add_problem_handlers(app)

    assert is_stalled(await stall(app, path=path, headers=headers))
    assert is_stalled(await stall(app, path=path, headers=headers, messages=()))
    assert asyncio.current_task().cancelling() == 0


async def test_stalled_body_is_logged_with_the_setting(caplog):
    """The access line of a body time-out is a WARNING with status 408 that names LIMITS_BODY_TIMEOUT."""
    await stall(AccessLogMiddleware(paced()))

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert (record.levelname, record.http_status) == ("WARNING", 408)
    assert record.reason == "no part of the body for LIMITS_BODY_TIMEOUT=0.05 seconds"


async def test_stalled_body_of_a_plain_asgi_app_is_a_408_problem():
    """HTTP/2 has no `Connection: close`."""

    async def app(scope, receive, send):
        while True:
            await receive()

    limited = BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))

    assert is_stalled(await stall(limited))
    assert is_stalled(await stall(limited, version="2", headers=()), closed=False)


async def test_stalled_body_below_a_task_group_is_a_408_problem():
    """A body time-out is a 408 problem even if a middleware runs the app in another task."""
    app = paced()
    inner = app.middleware("http")

    @inner
    async def pass_on(request, call_next):
        return await call_next(request)

    outer = BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE))

    assert is_stalled(await stall(outer))
    assert is_stalled(await stall(app))


async def test_stalled_body_cancels_the_handler():
    """What the handler sends afterwards is dropped."""
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


async def test_stalled_body_after_the_response_start_is_a_disconnect():
    """If the body stalls after the response has started, the app receives a disconnect message."""
    seen = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        seen.extend([await receive(), await receive()])

    await stall(BodyLimitMiddleware(app, LimitsSettings(body_timeout=PATIENCE)))

    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_problem_raised_during_the_body_is_reraised():
    """A ProblemError that the app raises while the body is incomplete passes through the middleware."""

    async def app(scope, receive, send):
        raise ProblemError(418)

    with pytest.raises(ProblemError, match="418"):
        await stall(BodyLimitMiddleware(app))


async def test_wait_for_a_disconnect_has_no_time_out():
    """After a complete body, an app may wait for the disconnect longer than the body time-out."""
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
async def test_cancelled_request_stays_cancelled_during_its_body(late):
    """Even if the time-out expires at the same moment."""

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


async def test_none_sets_no_body_timeout():
    """With `body_timeout=None`, the middleware does not wrap `receive` with a time-out."""

    async def app(scope, receive, send):
        seen.append(receive)

    async def receive(): ...

    seen = []
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/"}
    limited = BodyLimitMiddleware(app, LimitsSettings(body_timeout=None), largest=0)
    for length in (b"0", b"1"):
        await limited(scope | {"headers": [(b"content-length", length)]}, receive, None)

    assert [each.__qualname__ for each in seen] == ["Exchange.receive"] * 2


def test_stalled_body_on_a_real_server_closes_the_connection():
    """A real server answers 408 to an incomplete body and closes the connection."""
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


async def test_second_task_receives_the_message_after_the_first():
    """If two tasks wait in `receive`, each gets one message, in the order in which the messages arrive."""
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
