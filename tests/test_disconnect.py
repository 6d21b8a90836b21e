"""Clients that disconnect: their handlers are cancelled if the setting or the route says so."""

import asyncio
import json
import socket
import threading
import time

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from garbage import none_left
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.disconnect import DisconnectMiddleware, cancel_on_disconnect, ignore_disconnect
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import LimitsSettings

ENABLED = LimitsSettings(cancel_on_disconnect=True)
WITHIN = 10.0  # seconds; on an idle machine it takes a moment
SCOPE = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/", "headers": [], "query_string": b""}
CHUNKED = [(b"transfer-encoding", b"chunked")]


def part(body=b"", *, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


class Client:
    """A client of an app whose server gives each message to one caller only."""

    def __init__(self, app, *messages, **scope):
        self.sent = []
        self._messages = asyncio.Queue()
        for message in messages or (part(),):
            self.send_to_app(message)
        self.task = asyncio.create_task(app({**SCOPE, **scope}, self._messages.get, self._take))

    def send_to_app(self, message):
        self._messages.put_nowait(message)

    def disconnect(self):
        self.send_to_app({"type": "http.disconnect"})

    async def end(self):
        """Wait until the app has ended, and return the sent status and body, or None."""
        await asyncio.wait_for(self.task, WITHIN)
        return self.sent

    async def _take(self, message):
        self.sent += [message["status"]] if message["type"] == "http.response.start" else [message["body"]]


class Handler:
    """An endpoint that waits until the test ends it, and records how it ended."""

    def __init__(self):
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.outcome = None

    async def __call__(self):
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise
        self.outcome = "done"
        return self.outcome

    async def left_by(self, client):
        """Let the client disconnect, and return how the handler has ended."""
        await asyncio.wait_for(self.begun.wait(), WITHIN)
        client.disconnect()
        for _ in range(10):
            await asyncio.sleep(0)
        self.go.set()
        await client.end()
        return self.outcome


@pytest.fixture
def handler():
    return Handler()


def service(handler, settings=ENABLED, **options) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DisconnectMiddleware, settings, **options)
    app.add_api_route("/", handler, methods=["GET", "POST"])
    return app


async def test_disconnect_cancels_the_handler(handler):
    """Nothing is sent, and the task of the request is not cancelled."""
    client = Client(service(handler))

    outcome = await handler.left_by(client)

    assert outcome == "cancelled"
    assert client.sent == []
    assert client.task.cancelling() == 0


async def test_disconnect_without_the_setting_cancels_nothing(handler):
    """Without cancel_on_disconnect a handler runs to its end after the client has disconnected."""
    assert await handler.left_by(Client(service(handler, None))) == "done"


def test_app_without_the_setting_has_no_layer():
    """create_app adds DisconnectMiddleware only if LIMITS_CANCEL_ON_DISCONNECT is set."""

    def layers(**limits):
        app = create_app(Settings(environment="test", limits=limits))
        TestClient(app).get("/")
        return [type(layer).__name__ for layer in app.middleware_stack.layers]

    assert "DisconnectMiddleware" not in layers()
    assert "DisconnectMiddleware" in layers(cancel_on_disconnect=True)


async def test_exempt_path_is_not_cancelled(handler):
    """A client disconnect does not cancel the handler of a path in the exempt set."""
    app = service(handler, exempt={"/"})

    assert await handler.left_by(Client(app)) == "done"


@pytest.mark.parametrize("outer", [ENABLED, None])
@pytest.mark.parametrize("inner", [ENABLED, None])
async def test_layer_inside_of_another_cancels_once(handler, outer, inner):
    """If either of them is switched on."""
    app = service(handler, inner)
    app.add_middleware(DisconnectMiddleware, outer)
    client = Client(app)

    outcome = await handler.left_by(client)

    assert outcome == ("done" if outer is inner is None else "cancelled")
    assert client.task.cancelling() == 0


# Routes that decide for themselves

CANCEL, IGNORE = Depends(cancel_on_disconnect), Depends(ignore_disconnect)


@pytest.mark.parametrize("settings", [ENABLED, None])
@pytest.mark.parametrize(
    ("router", "route", "outcome"),
    [
        ([], [CANCEL], "cancelled"),
        ([CANCEL], [], "cancelled"),
        ([IGNORE], [CANCEL], "cancelled"),
        ([], [IGNORE], "done"),
        ([IGNORE], [], "done"),
        ([CANCEL], [IGNORE], "done"),
        ([CANCEL], [CANCEL], "cancelled"),
    ],
)
async def test_dependency_of_a_route_wins_over_the_setting(handler, settings, router, route, outcome):
    """Of several the last one counts."""
    app = FastAPI()
    app.add_middleware(DisconnectMiddleware, settings)
    routes = APIRouter(dependencies=router)
    routes.add_api_route("/own", handler, dependencies=route)
    outer = APIRouter()
    outer.include_router(routes)
    app.include_router(outer)

    assert await handler.left_by(Client(app, path="/own")) == outcome


@pytest.mark.parametrize("mounted", [False, True])
async def test_dependency_works_without_the_setting(handler, mounted):
    """In a mounted app too."""
    app = create_app(Settings(environment="test", hosts=None))
    inner = FastAPI() if mounted else app
    inner.add_api_route("/own", handler, dependencies=[CANCEL])
    if mounted:
        app.mount("/sub", inner)

    assert await handler.left_by(Client(app, path="/sub/own" if mounted else "/own")) == "cancelled"


async def test_dependency_works_with_any_cancelling_layer(handler):
    """A route's cancel_on_disconnect dependency works if DeadlineMiddleware is the only cancelling layer."""
    app = FastAPI()
    app.add_middleware(DeadlineMiddleware)
    app.add_api_route("/", handler, dependencies=[CANCEL])

    assert await handler.left_by(Client(app)) == "cancelled"


@pytest.mark.parametrize("outside", [DisconnectMiddleware, BodyLimitMiddleware])
async def test_dependency_beside_several_layers_leaves_no_cancellation(handler, outside):
    """In any order."""
    app = FastAPI()
    for layer in {DisconnectMiddleware, BodyLimitMiddleware} - {outside}, {outside}:
        app.add_middleware(*layer, ENABLED)
    app.add_api_route("/", handler, dependencies=[CANCEL])
    client = Client(app)

    assert await handler.left_by(client) == "cancelled"
    assert client.task.cancelling() == 0


async def test_dependency_of_a_route_with_a_body(handler):
    """FastAPI reads the body first."""
    app = FastAPI()
    app.add_middleware(DeadlineMiddleware)

    @app.post("/", dependencies=[CANCEL])
    async def endpoint(numbers: list[int]):
        await handler()

    headers = [(b"content-type", b"application/json"), (b"content-length", b"3")]
    client = Client(app, part(b"[", more=True), part(b"1]"), method="POST", headers=headers)

    assert await handler.left_by(client) == "cancelled"


def test_dependency_without_middleware_is_an_error():
    """Unless the settings have switched limits off."""
    router = APIRouter(dependencies=[CANCEL])
    router.add_api_route("/", lambda: "ok")
    bare, off = FastAPI(), create_app(Settings(environment="test", limits=None))
    for app in (bare, off):
        app.include_router(router)

    with pytest.raises(ConfigurationError, match="add DisconnectMiddleware"):
        TestClient(bare).get("/")
    assert TestClient(off).get("/").json() == "ok"


# Bodies


async def test_body_read_late_is_complete(handler):
    """A handler that reads its body late gets every part, and a later disconnect cancels the handler."""
    app, begun, more = service(handler), asyncio.Event(), asyncio.Event()

    @app.post("/late")
    async def late(request: Request):
        begun.set()
        await more.wait()
        read.append(await request.body())
        await handler()

    read = []
    client = Client(app, part(b"a", more=True), part(b"b", more=True), path="/late", method="POST", headers=CHUNKED)
    await begun.wait()
    client.send_to_app(part(b"c"))
    more.set()

    assert await handler.left_by(client) == "cancelled"
    assert read == [b"abc"]


async def test_announced_body_is_not_received_early(handler):
    """A client may wait for `100 Continue`."""
    client = Client(service(handler), part(b"a"), method="POST", headers=[(b"content-length", b"1")])

    outcome = await handler.left_by(client)

    assert outcome == "done"
    assert client._messages.qsize() == 2


@pytest.mark.parametrize("parts", [[part()], [part(b"a", more=True), part(b"b")]])
async def test_first_part_of_an_unannounced_body_is_kept(handler, parts):
    """HTTP/2 need not announce a body."""
    app, read = service(handler), []

    @app.post("/late")
    async def late(request: Request):
        for _ in range(3):
            await asyncio.sleep(0)
        read.append(await request.body())
        await handler()

    client = Client(app, *parts, path="/late", method="POST", http_version="2")

    assert await handler.left_by(client) == "cancelled"
    assert read == [b"".join(each["body"] for each in parts)]


async def test_app_may_receive_before_the_server_has_the_message(handler):
    """A handler that awaits an empty body receives the message and is still cancelled on disconnect."""
    app, read = service(handler), []

    @app.get("/early")
    async def early(request: Request):
        read.append(await request.body())
        await handler()

    assert await handler.left_by(Client(app, path="/early")) == "cancelled"
    assert read == [b""]


async def test_body_timeout_still_applies(handler):
    """body_timeout answers a stalled body with a 408, and no longer applies once the body is complete."""
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, LimitsSettings(body_timeout=0.1))
    app.add_middleware(DeadlineMiddleware)

    @app.post("/", dependencies=[CANCEL])
    async def endpoint(request: Request):
        assert await request.body() == b"ab"
        await asyncio.sleep(0.3)
        await handler()

    client = Client(app, part(b"a", more=True), part(b"b"), method="POST", headers=CHUNKED)
    slow = Client(app, part(b"a", more=True), method="POST", headers=CHUNKED)

    assert (await slow.end())[0] == 408
    assert await handler.left_by(client) == "cancelled"


async def test_disconnect_during_the_body_reaches_the_app():
    """A disconnect in the middle of the body reaches the app as an http.disconnect message."""
    app, seen = FastAPI(), []
    app.add_middleware(DisconnectMiddleware, cancel_on_disconnect=True)

    @app.post("/")
    async def endpoint(request: Request):
        seen.append(await request.receive())
        seen.append(await request.receive())

    client = Client(app, part(b"a", more=True), method="POST", headers=CHUNKED)
    client.disconnect()
    await client.end()

    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_request_from_the_queue_is_cancelled(handler):
    """Its messages were received while it waited."""
    first, app = Handler(), FastAPI()
    app.add_middleware(DisconnectMiddleware, ENABLED)
    app.add_middleware(ConcurrencyLimitMiddleware, LimitsSettings(max_concurrent=1, queue_timeout=WITHIN))
    app.add_api_route("/first", first)
    app.add_api_route("/", handler)
    before = Client(app, path="/first")
    await first.begun.wait()
    client = Client(app)
    await asyncio.sleep(0.01)
    first.go.set()

    assert await handler.left_by(client) == "cancelled"
    assert (await before.end())[0] == 200


async def test_repeated_request_message_is_no_disconnect(handler):
    """Some test clients send it again and again."""
    client = Client(service(handler), part(), part())

    assert await handler.left_by(client) == "done"


# Requests that are not cancelled


async def test_is_disconnected_works(handler):
    """For a second caller too."""
    app, answers = service(handler, None), []

    @app.get("/asks", dependencies=[CANCEL, IGNORE])
    async def asks(request: Request):
        answers.append(await request.is_disconnected())
        await handler()
        answers.append(await request.is_disconnected())
        answers.append((await request.receive())["type"])

    assert await handler.left_by(Client(app, path="/asks")) == "done"
    assert answers == [False, True, "http.disconnect"]


async def test_started_response_is_not_cancelled(handler):
    """Its background tasks run."""
    app, after = service(handler), []

    @app.get("/stream")
    async def stream(tasks: BackgroundTasks):
        async def lines():
            yield "begun"
            await handler()

        tasks.add_task(after.append, "background")
        return StreamingResponse(lines())

    client = Client(app, path="/stream")

    assert await handler.left_by(client) == "cancelled"
    assert client.sent == [200, b"begun"]
    assert after == ["background"]


async def test_background_task_is_not_cancelled(handler):
    """Servers send `http.disconnect` after a complete response."""
    app = service(handler)

    @app.get("/later")
    async def later(tasks: BackgroundTasks):
        tasks.add_task(handler)

    assert await handler.left_by(Client(app, path="/later")) == "done"


async def test_disconnect_during_a_504_changes_nothing(handler):
    """A disconnect while a time-out is answered with a 504 does not cancel the handler a second time."""
    app = FastAPI()
    app.add_middleware(DeadlineMiddleware, LimitsSettings(request_timeout=0.01))
    cancelled, go = [], asyncio.Event()

    @app.get("/", dependencies=[CANCEL])
    async def endpoint():
        try:
            await asyncio.sleep(WITHIN)
        finally:
            cancelled.append(True)
            client.disconnect()
            await asyncio.sleep(0.01)
            go.set()

    client = Client(app)
    await client.end()

    assert client.sent[0] == 504
    assert cancelled == [True]
    assert go.is_set()


def test_websocket_is_not_cancelled():
    """Even with the dependency on its router."""
    app = FastAPI()
    app.add_middleware(DisconnectMiddleware, ENABLED)

    @app.websocket("/ws", dependencies=[CANCEL])
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    with TestClient(app).websocket_connect("/ws") as session:
        session.send_text("still here")
        assert session.receive_text() == "still here"


async def test_disconnect_below_a_task_group_cancels_the_handler(handler):
    """Below BaseHTTPMiddleware, which runs the app in another task, a disconnect cancels the handler."""
    app = FastAPI()
    app.add_api_route("/", handler)

    async def pass_on(request, call_next):
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(DisconnectMiddleware, ENABLED)

    assert await handler.left_by(Client(app)) == "cancelled"


async def test_handler_that_catches_its_cancellation_runs_on(handler):
    """Its messages are dropped."""
    app = service(handler)

    @app.get("/stubborn")
    async def stubborn():
        try:
            await handler()
        except asyncio.CancelledError:
            return PlainTextResponse("to nobody")

    client = Client(app, path="/stubborn")

    assert await handler.left_by(client) == "cancelled"
    assert client.sent == []


async def test_finished_request_leaves_no_reference_cycle():
    """A finished request leaves no reference cycle and no listener task, so its memory is freed at once."""
    app = DisconnectMiddleware(PlainTextResponse("ok"), ENABLED)

    async def call():
        await Client(app).end()
        await asyncio.sleep(0)

    await call()  # the first request creates cached objects
    with none_left():
        await call()
    assert len(asyncio.all_tasks()) == 1


# Under a server


def lines_of(output):
    """Return path and status of each access line."""
    lines = [json.loads(text) for text in output.splitlines()]
    return [(line["http_path"], line["http_status"]) for line in lines if line["event"] == "request"]


def whole(**sections) -> FastAPI:
    return create_app(Settings(environment="test", limits={"cancel_on_disconnect": True}, **sections))


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_disconnect_on_a_real_server_is_status_499(http, capsys):
    """On uvicorn a client disconnect cancels the handler and is logged as 499; the server keeps serving."""
    app, begun, cancelled = whole(), threading.Event(), threading.Event()

    @app.post("/hangs")
    async def hangs(numbers: list[int]):
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    @app.get("/fast")
    async def fast():
        return "fast"

    with serving(app, http=http) as port:
        with connection(port) as client:
            client.sendall(request("POST", "/hangs", "Content-Type: application/json", body=b"[1]"))
            assert begun.wait(WITHIN)
        assert cancelled.wait(WITHIN)
        with connection(port) as client:
            client.sendall(request("GET", "/fast"))
            answer = read_response(client)

    assert answer.endswith(b'"fast"')
    assert lines_of(capsys.readouterr().out) == [("/hangs", 499), ("/fast", 200)]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_pipelined_request_is_no_disconnect(http, capsys):
    """Requests sent before the first answer do not count as a disconnect, and each is answered."""
    app, begun, go = whole(), threading.Event(), asyncio.Event()

    @app.get("/{name}")
    async def wait(name: str):
        loops.append(asyncio.get_running_loop())
        begun.set()
        await go.wait()
        return name

    loops = []
    with serving(app, http=http) as port, connection(port) as client:
        client.sendall(request("GET", "/first") + request("GET", "/second"))
        assert begun.wait(WITHIN)
        client.sendall(request("GET", "/third"))
        loops[0].call_soon_threadsafe(go.set)
        bodies = [read_one(client) for _ in range(3)]

    assert bodies == [b'"first"', b'"second"', b'"third"']
    assert [status for _, status in lines_of(capsys.readouterr().out)] == [200] * 3


def read_one(client: socket.socket) -> bytes:
    """Read the body of one of several responses, and no byte of the next."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    length = next(int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length"))
    return client.recv(length, socket.MSG_WAITALL)


def test_disconnect_of_a_sync_handler_is_status_499(capsys):
    """The thread runs on."""
    app, begun, free, ended = whole(), threading.Event(), threading.Event(), threading.Event()

    @app.get("/sync")
    def blocks():
        begun.set()
        free.wait(WITHIN)
        ended.set()

    with serving(app) as port:
        with connection(port) as client:
            client.sendall(request("GET", "/sync"))
            assert begun.wait(WITHIN)
        lines, deadline = [], time.monotonic() + WITHIN
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
            lines = lines_of(capsys.readouterr().out)
        worked_on = not ended.is_set()
        free.set()
        assert ended.wait(WITHIN)

    assert worked_on
    assert lines == [("/sync", 499)]
