"""Deadlines: one answer in time, whatever the handler does; what has started and what was cancelled by others stays."""

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
    """Call an app as a server does, and return what it has sent."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app({**SCOPE, **scope}, receive, send)
    return sent


def with_deadline(app, seconds=SHORT):
    return DeadlineMiddleware(app, LimitsSettings(request_timeout=seconds))


async def test_the_deadline():
    """A handler that takes too long is cancelled, and the client gets the problem; one that does not is not."""
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


async def test_the_request_goes_on_uncancelled():
    """What surrounds the middleware sees an ordinary return: its task counts no cancellation, and can wait on."""
    app = with_deadline(lambda scope, receive, send: asyncio.sleep(LONG))

    sent = await drive(app)
    await asyncio.sleep(0)

    assert [message.get("status") for message in sent] == [504, None]
    assert asyncio.current_task().cancelling() == 0


async def test_what_comes_after_the_answer_is_dropped():
    """There is one response: a handler that will not be cancelled talks to nobody, and stops nobody."""
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


async def test_the_answer_does_not_wait_for_the_handler():
    """A handler that takes its time to end keeps the answer from nobody; the request is over when it has ended."""
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


async def test_an_error_while_it_is_cancelled():
    """An exception of the handler's end is raised on after the answer, and no cancellation is left."""

    async def failing(scope, receive, send):
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            raise RuntimeError("cannot tidy up") from None

    with pytest.raises(RuntimeError, match="tidy up"):
        await drive(with_deadline(failing))

    assert asyncio.current_task().cancelling() == 0


@pytest.mark.parametrize("late", [False, True])
async def test_the_cancellation_of_others(late):
    """A request that the server cancels stays cancelled, even in the moment of the deadline."""
    task = asyncio.create_task(drive(with_deadline(lambda *_: cancel_too(), SHORT if late else LONG)))

    async def cancel_too():
        try:
            await asyncio.sleep(LONG if late else 0)
        finally:
            task.cancel()
            await asyncio.sleep(0)

    await asyncio.wait([task], timeout=10)

    assert task.cancelled()


async def test_a_cancellation_from_before_does_not_count():
    """In a task that was cancelled before and went on, the deadline is a 504 all the same."""

    async def survivor():
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        return await drive(with_deadline(lambda *_: asyncio.sleep(LONG)))

    sent = await asyncio.create_task(survivor())

    assert sent[0]["status"] == 504


@pytest.mark.parametrize("handler", ["async", "sync"])
async def test_below_task_groups(handler):
    """Below a BaseHTTPMiddleware, which runs the app in a task of its own, the deadline is the same."""
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


def test_sync_handlers():
    """The client of a sync handler gets its answer at the deadline; the thread works on to its end."""
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


def test_handlers_that_block():
    """Time in which nothing else could run counts: who waits after it is late. Who never waits has answered by then."""
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


def test_what_has_started_is_left_alone():
    """A response that has started may take as long as it likes."""
    app = service()

    @app.get("/stream")
    async def stream():
        async def lines():
            yield "a"
            await asyncio.sleep(3 * SHORT)
            yield "b"

        return StreamingResponse(lines())

    assert TestClient(app).get("/stream").text == "ab"


def test_websockets_are_left_alone():
    """A WebSocket lives as long as it likes, a time-out of its router notwithstanding."""
    app = service()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, _: None = Depends(Timeout(SHORT))):
        await websocket.accept()
        await asyncio.sleep(3 * SHORT)
        await websocket.send_text("still here")

    with TestClient(app).websocket_connect("/ws") as session:
        assert session.receive_text() == "still here"


def test_exempt_paths():
    """An exempt path has no deadline, and a time-out of its own does nothing."""
    app = service(exempt={"/health"})

    @app.get("/health", dependencies=[Depends(Timeout(SHORT))])
    async def health():
        await asyncio.sleep(3 * SHORT)

    assert TestClient(app).get("/health").status_code == 200


@pytest.mark.parametrize("general", [SHORT, 10.0, None])
@pytest.mark.parametrize("nested", [False, True])
def test_time_of_a_route(general, nested):
    """A route's own time wins over the general one, whether longer, shorter or none."""
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
async def test_time_of_a_route_while_its_body_comes(own, status):
    """A route's own time holds from the beginning, although its dependencies wait for the body."""
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


async def test_a_time_that_comes_too_late():
    """After the answer another time changes nothing: there is one answer, and one cancellation."""
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
def test_a_time_that_makes_no_sense(seconds):
    """A time-out that cannot be kept is an error where it is written."""
    with pytest.raises(ConfigurationError, match="positive"):
        Timeout(seconds)


def test_a_time_without_a_middleware():
    """A time-out that nobody would enforce is an error; where the operator has switched limits off, it is not."""
    router = APIRouter(dependencies=[Depends(Timeout(1))])
    router.add_api_route("/", lambda: "ok")
    bare, off = FastAPI(), create_app(Settings(environment="test", limits=None))
    for app in (bare, off):
        app.include_router(router)

    with pytest.raises(ConfigurationError, match="DeadlineMiddleware"):
        TestClient(bare).get("/")
    assert TestClient(off).get("/").json() == "ok"


def test_the_schema():
    """A route with a time-out of its own shows the 504."""
    app = service()
    app.add_api_route("/own", lambda: None, dependencies=[Depends(Timeout(1))])
    add_problem_schemas(app)

    assert "504" in app.openapi()["paths"]["/own"]["get"]["responses"]


async def test_requests_end_in_their_order():
    """Each request ends at its own time; what is over leaves nothing behind, and the timer rests."""
    ended, loop = [], asyncio.get_running_loop()
    timer = SharedTimer(SHORT, ended.append)

    timings = {name: timer.start(name, time.perf_counter(), loop) for name in ("first", "second")}
    await asyncio.sleep(SHORT / 2)
    timings |= {name: timer.start(name, time.perf_counter(), loop) for name in ("third", "fourth")}
    queue = timer._queue
    dues = list(queue.timings.values())
    timings["second"].cancel()
    deadline = time.monotonic() + 10
    while len(ended) < 3 and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    timings["first"].cancel()

    assert dues == sorted(dues)
    assert ended == ["first", "third", "fourth"]
    assert (len(queue.timings), queue.armed) == (0, False)


async def test_an_error_at_the_end_of_one_wait():
    """A wait that cannot be ended is told to the event loop, and the others end, with no help from a new one."""
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


def test_event_loops_have_timers_of_their_own():
    """One app may be served by several event loops, one after the other or at once."""
    app = service()

    statuses = [TestClient(app).get(path).status_code for path in ("/slow", "/fast", "/slow")]

    assert statuses == [504, 200, 504]


async def test_many_at_once():
    """A thousand requests with one deadline all get their 504, none twice, and other requests are served meanwhile."""
    transport = httpx2.ASGITransport(service(0.3))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        slow = asyncio.gather(*(client.get("/slow") for _ in range(1000)))
        fast = await client.get("/fast")
        late = await slow

    assert fast.status_code == 200
    assert {response.status_code for response in late} == {504}


def test_on_the_wire(capsys):
    """Under a real server the connection stays usable, and the access line, the headers and the metric say 504."""
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
