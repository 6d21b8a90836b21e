"""Deadlines: one answer in time, whatever the handler does."""

import asyncio
import contextlib
import json
import threading
import time

import anyio
import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit._pipeline.timers import SharedTimer
from fastapi_prodkit.deadline import DeadlineMiddleware, Timeout
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.openapi import add_problem_schemas
from fastapi_prodkit.sections import LimitsSettings

SHORT = 0.05  # seconds; long enough for an answer that does not wait
LONG = 30.0
SCOPE = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/", "headers": [], "query_string": b""}


def service(seconds=SHORT, **options) -> FastAPI:
    app = FastAPI()
    add_problem_handlers(app)
    app.add_middleware(DeadlineMiddleware, request_timeout=seconds, **options)

    @app.get("/fast")
    async def fast():
        return "fast"

    @app.get("/slow")
    async def slow():
        await asyncio.sleep(LONG)

    return app


def is_timeout(response):
    assert response.status_code == 504
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["title"] == "Gateway Timeout"
    return True


async def drive(app, **scope):
    """Call an app as a server does, and return the sent messages."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app({**SCOPE, **scope}, receive, send)
    return sent


def with_deadline(app, seconds=SHORT):
    return DeadlineMiddleware(app, LimitsSettings(request_timeout=seconds))


async def test_deadline_cancels_a_slow_handler_with_a_504_problem():
    """A handler that exceeds the deadline is cancelled and answered with a 504; a fast handler is not."""
    app, cancelled = service(), []

    @app.get("/watched")
    async def watched():
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    client = TestClient(app)

    assert client.get("/fast").json() == "fast"
    assert is_timeout(client.get("/slow"))
    assert is_timeout(client.get("/watched"))
    assert cancelled == [True]


async def test_task_of_an_interrupted_request_is_not_cancelled():
    """Outer middleware can await."""
    app = with_deadline(lambda scope, receive, send: asyncio.sleep(LONG))

    sent = await drive(app)
    await asyncio.sleep(0)

    assert [message.get("status") for message in sent] == [504, None]
    assert asyncio.current_task().cancelling() == 0


async def test_messages_of_a_cancelled_handler_are_dropped():
    """They do not block the event loop."""
    turns = []

    async def stubborn(scope, receive, send):
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            await PlainTextResponse("too late")(scope, receive, send)
            other = asyncio.create_task(asyncio.sleep(0))
            while not other.done():
                turns.append(await send({"type": "http.response.body", "body": b"more", "more_body": True}))

    sent = await drive(with_deadline(stubborn))

    assert [message.get("status") for message in sent] == [504, None]
    assert turns


async def test_504_does_not_wait_for_the_handler():
    """The request ends after the handler has ended."""
    sent, answered = [], asyncio.Event()

    async def tidy(scope, receive, send):
        try:
            await asyncio.sleep(LONG)
        finally:
            await answered.wait()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            answered.set()

    await asyncio.wait_for(with_deadline(tidy)({**SCOPE}, None, send), 10)

    assert json.loads(sent[1]["body"])["status"] == 504


async def test_exception_of_a_cancelled_handler_is_reraised():
    """After the 504; no cancellation is left."""

    async def failing(scope, receive, send):
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            raise RuntimeError("cannot tidy up") from None

    with pytest.raises(RuntimeError, match="tidy up"):
        await drive(with_deadline(failing))

    assert asyncio.current_task().cancelling() == 0


@pytest.mark.parametrize("late", [False, True])
async def test_request_cancelled_by_the_server_stays_cancelled(late):
    """Even at the moment of the deadline."""
    task = asyncio.create_task(drive(with_deadline(lambda *_: cancel_too(), SHORT if late else LONG)))

    async def cancel_too():
        try:
            await asyncio.sleep(LONG if late else 0)
        finally:
            task.cancel()
            await asyncio.sleep(0)

    await asyncio.wait([task], timeout=10)

    assert task.cancelled()


async def test_earlier_cancellation_of_the_task_does_not_count():
    """The deadline still sends a 504 in a task that has survived an earlier cancellation."""

    async def survivor():
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        return await drive(with_deadline(lambda *_: asyncio.sleep(LONG)))

    sent = await asyncio.create_task(survivor())

    assert sent[0]["status"] == 504


@pytest.mark.parametrize("handler", ["async", "sync"])
async def test_deadline_below_a_task_group(handler):
    """BaseHTTPMiddleware runs the app in another task."""
    app, free, done = FastAPI(), threading.Event(), []

    @app.get("/async")
    async def waits():
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, LONG)
        finally:
            done.append("async")

    @app.get("/sync")
    def blocks():
        free.wait(LONG)
        done.append("sync")

    async def pass_on(request, call_next):
        return await call_next(request)

    sent, answered = [], asyncio.Event()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            answered.set()

    async def receive():
        await asyncio.sleep(LONG)

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(DeadlineMiddleware, LimitsSettings(request_timeout=SHORT))
    task = asyncio.create_task(app({**SCOPE, "path": f"/{handler}"}, receive, send))
    await asyncio.wait_for(answered.wait(), 10)
    before = list(done)
    free.set()
    await asyncio.wait_for(task, 10)

    assert sent[0]["status"] == 504
    assert len(sent) == 2
    assert handler == "async" or before == []  # the answer came while the thread was still working
    assert done == [handler]


def test_deadline_answers_while_a_thread_runs_on():
    """The client of a sync handler gets the 504 at the deadline, while the thread runs to its end."""
    app, free, ended = service(), threading.Event(), threading.Event()

    @app.get("/sync")
    def blocks():
        free.wait(LONG)
        ended.set()
        return "never seen"

    with TestClient(app) as client:
        response = client.get("/sync")
        worked_on = not ended.is_set()
        free.set()

        assert is_timeout(response)
        assert worked_on
        assert ended.wait(10)
        assert client.get("/fast").json() == "fast"


def test_deadline_counts_time_of_a_blocked_event_loop():
    """A handler that never awaits completes."""
    app = service()

    @app.get("/blocks")
    async def block(wait: float = 0):
        time.sleep(2 * SHORT)
        if wait:
            await asyncio.sleep(wait)
        return "done"

    client = TestClient(app)
    start = time.monotonic()

    assert client.get("/blocks").json() == "done"
    assert is_timeout(client.get(f"/blocks?wait={LONG}"))
    assert time.monotonic() - start < LONG


def test_deadline_ignores_a_started_response():
    """The deadline does not cancel a handler whose streaming response has already started."""
    app = service()

    @app.get("/stream")
    async def stream():
        async def lines():
            yield "a"
            await asyncio.sleep(3 * SHORT)
            yield "b"

        return StreamingResponse(lines())

    assert TestClient(app).get("/stream").text == "ab"


def test_deadline_ignores_websockets():
    """Even with a time-out of the router."""
    app = service()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, _: None = Depends(Timeout(SHORT))):
        await websocket.accept()
        await asyncio.sleep(3 * SHORT)
        await websocket.send_text("still here")

    with TestClient(app).websocket_connect("/ws") as session:
        assert session.receive_text() == "still here"


def test_exempt_path_has_no_deadline():
    """A time-out of its route has no effect."""
    app = service(exempt={"/health"})

    @app.get("/health", dependencies=[Depends(Timeout(SHORT))])
    async def health():
        await asyncio.sleep(3 * SHORT)

    assert TestClient(app).get("/health").status_code == 200


@pytest.mark.parametrize("general", [SHORT, 10.0, None])
@pytest.mark.parametrize("nested", [False, True])
def test_timeout_of_a_route_replaces_the_deadline(general, nested):
    """Longer, shorter or none."""
    app = service(general)
    router = APIRouter(dependencies=[Depends(Timeout(SHORT))])

    @router.get("/longer", dependencies=[Depends(Timeout(10))])
    @router.get("/without", dependencies=[Depends(Timeout(None))])
    async def longer():
        await asyncio.sleep(3 * SHORT)

    @router.get("/shorter")
    async def shorter():
        await asyncio.sleep(LONG)

    outer = APIRouter()
    outer.include_router(router)
    app.include_router(outer if nested else router)
    client = TestClient(app)

    assert client.get("/longer").status_code == 200
    assert client.get("/without").status_code == 200
    assert is_timeout(client.get("/shorter"))
    assert client.get("/fast").status_code == 200


@pytest.mark.parametrize(("own", "status"), [(10, 200), (None, 200), (2 * SHORT, 504)])
async def test_timeout_of_a_route_applies_while_the_body_is_read(own, status):
    """Although FastAPI has not called the dependency yet."""
    app = service()
    parts = [b"[", b"1", b"]"]

    @app.post("/upload", dependencies=[Depends(Timeout(own))])
    async def upload(numbers: list[int]):
        return numbers

    async def receive():
        await asyncio.sleep(SHORT)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"3")]
    await app({**SCOPE, "method": "POST", "path": "/upload", "headers": headers}, receive, send)

    assert sent[0]["status"] == status


async def test_timeout_after_the_504_has_no_effect():
    """A Timeout called after the 504 causes neither a second answer nor a second cancellation."""
    ended = []

    async def stubborn(scope, receive, send):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(LONG)
        await Timeout(SHORT / 10)(HTTPConnection(scope))
        await asyncio.sleep(SHORT)
        ended.append(True)

    sent = await drive(with_deadline(stubborn))

    assert [message.get("status") for message in sent] == [504, None]
    assert ended == [True]


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_timeout_that_is_not_positive_is_refused(seconds):
    """Timeout raises a ConfigurationError for zero, negative, infinite or NaN seconds."""
    with pytest.raises(ConfigurationError, match="positive"):
        Timeout(seconds)


def test_timeout_without_middleware_is_an_error():
    """Unless the settings have switched limits off."""
    router = APIRouter(dependencies=[Depends(Timeout(1))])
    router.add_api_route("/", lambda: "ok")
    bare, off = FastAPI(), create_app(Settings(environment="test", limits=None))
    for app in (bare, off):
        app.include_router(router)

    with pytest.raises(ConfigurationError, match="DeadlineMiddleware"):
        TestClient(bare).get("/")
    assert TestClient(off).get("/").json() == "ok"


def test_schema_shows_504_for_a_timeout():
    """The OpenAPI schema of a route with a Timeout dependency documents the 504 response."""
    app = service()
    app.add_api_route("/own", lambda: None, dependencies=[Depends(Timeout(1))])
    add_problem_schemas(app)

    assert "504" in app.openapi()["paths"]["/own"]["get"]["responses"]


async def test_deadlines_expire_in_order():
    """Afterwards the timer is not armed."""
    ended, loop = [], asyncio.get_running_loop()
    timer = SharedTimer(SHORT, ended.append)

    for name in ("first", "second"):
        timer.start(name, time.perf_counter(), loop)
    await asyncio.sleep(SHORT / 2)
    for name in ("third", "fourth"):
        queue = timer.start(name, time.perf_counter(), loop)
    dues = list(queue.due.values())
    queue.cancel("second")
    deadline = time.monotonic() + 10
    while len(ended) < 3 and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    queue.cancel("first")

    assert dues == sorted(dues)
    assert ended == ["first", "third", "fourth"]
    assert (len(queue.due), queue.armed) == (0, False)


async def test_error_of_one_expiry_does_not_stop_the_others():
    """The event loop's exception handler gets it."""
    ended, told, loop = [], [], asyncio.get_running_loop()
    error = RuntimeError("broken")

    def expire(wait):
        if wait is error:
            raise error
        ended.append(wait)

    async def until_has(count, found):
        deadline = time.monotonic() + 10
        while len(found) < count and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    timer = SharedTimer(SHORT, expire)
    for wait in (error, "waiting"):
        timer.start(wait, time.perf_counter(), loop)
    await until_has(1, ended)
    timer.start("later", time.perf_counter(), loop)
    await until_has(2, ended)

    assert told == [error]
    assert ended == ["waiting", "later"]


def test_event_loops_have_separate_timers():
    """The deadline works in each event loop that serves the app, because timers are kept per loop."""
    app = service()

    statuses = [TestClient(app).get(path).status_code for path in ("/slow", "/fast", "/slow")]

    assert statuses == [504, 200, 504]


async def test_thousand_requests_expire_once_each():
    """Other requests are served meanwhile."""
    transport = httpx2.ASGITransport(service(0.3))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        slow = asyncio.gather(*(client.get("/slow") for _ in range(1000)))
        fast = await client.get("/fast")
        late = await slow

    assert fast.status_code == 200
    assert {response.status_code for response in late} == {504}


def test_deadline_on_a_real_server_keeps_the_connection(capsys):
    """Access line, headers and metric have the 504."""
    app = create_app(Settings(environment="prod", hosts={"allowed": "testserver"}, limits={"request_timeout": SHORT}))

    @app.get("/slow")
    async def slow(request: Request):
        await asyncio.sleep(LONG)

    @app.get("/fast")
    async def fast():
        return "fast"

    with serving(app) as port, connection(port) as client:
        answers = []
        for path in ("/slow", "/slow", "/fast"):
            client.sendall(request("GET", path, "X-Request-ID: abcdefgh"))
            answers.append(read_response(client))

    head, _, body = answers[0].partition(b"\r\n\r\n")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.split()[1] for answer in answers] == [b"504", b"504", b"200"]
    assert b"x-request-id: abcdefgh" in head.lower()
    assert b"connection: close" not in head.lower()
    assert json.loads(body)["request_id"] == "abcdefgh"
    assert [(line["http_route"], line["http_status"]) for line in lines if line["event"] == "request"] == [
        ("/slow", 504),
        ("/slow", 504),
        ("/fast", 200),
    ]
    assert not [line for line in lines if line["level"] == "error"]
