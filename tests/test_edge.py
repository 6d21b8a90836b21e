"""The edge around an app: errors end as without an edge."""

import asyncio
import contextlib
import copy
import json
import logging
import time

import httpx2
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, WebSocket, WebSocketException
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from garbage import none_left
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import Mount
from starlette.websockets import WebSocketDisconnect
from wire import connection, read_all, read_response, request, serving

from fastapi_prodkit import Settings, _context, create_app, install
from fastapi_prodkit._pipeline.edge import Edge
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware, add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.logging import configure_logging
from fastapi_prodkit.sections import LimitsSettings


class HandledError(Exception):
    """An exception for which the app has a handler."""


class ThreadError(Exception):
    """An exception for which the app has a handler that is not async."""


class MishandledError(Exception):
    """An exception for which the app has a handler that fails."""


def app_of(**options) -> FastAPI:
    app = FastAPI(**options)

    @app.exception_handler(HandledError)
    async def handle(request: Request, error: HandledError):
        return PlainTextResponse("handled", status_code=418)

    @app.exception_handler(ThreadError)
    def handle_in_a_thread(request: Request, error: ThreadError):
        return PlainTextResponse("handled in a thread", status_code=418)

    @app.exception_handler(MishandledError)
    async def mishandle(request: Request, error: MishandledError):
        raise RuntimeError("the handler has failed")

    @app.exception_handler(409)
    async def conflict(request: Request, error: HTTPException):
        return PlainTextResponse(f"conflict: {error.detail}", status_code=409)

    add_routes(app)
    return app


def add_routes(app: FastAPI) -> None:
    errors = {
        "handled": HandledError(),
        "in-a-thread": ThreadError(),
        "mishandled": MishandledError(),
        "conflict": HTTPException(409, "twice"),
        "unhandled": ValueError("nobody handles it"),
    }

    @app.get("/raise/{name}")
    async def fail(name: str):
        raise errors[name]

    @app.get("/later/{name}")
    async def fail_later(name: str, tasks: BackgroundTasks):
        tasks.add_task(fail, name)

    @app.get("/midway/{name}")
    async def fail_midway(name: str):
        async def parts():
            yield b"begun"
            raise errors[name]

        return StreamingResponse(parts())

    @app.post("/items")
    async def read(item: dict[str, int]):
        return item

    @app.websocket("/socket/{name}")
    async def talk(websocket: WebSocket, name: str, accept: bool = False):
        if accept:
            await websocket.accept()
        raise {**errors, "policy": WebSocketException(1008)}[name]

    # Outside of FastAPI's routes, which handle exceptions by themselves.
    async def plain(scope, receive, send):
        if scope["query_string"] == b"started":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise errors[scope["path"].rpartition("/")[2]]

    app.mount("/plain", plain)
    inner = FastAPI(max_body_size=10)
    inner.add_api_route("/items", read, methods=["POST"])
    app.mount("/inner", inner)


def without_edge(app: FastAPI):
    return Served(app, app.build_middleware_stack())


def with_edge(app: FastAPI, *pieces):
    return Served(app, Edge(pieces).around(app.build_middleware_stack()))


async def nothing(*message):
    """Receive or send nothing."""


class Served:
    """An app with these layers around it."""

    def __init__(self, app, layers):
        self.app = app
        self.layers = layers

    async def __call__(self, scope, receive, send):
        scope["app"] = self.app
        await self.layers(scope, receive, send)


def outcome(app, method, path, **options):
    """Return what the client and the server get."""
    seen = []
    for raises in (False, True):
        try:
            response = TestClient(app, raise_server_exceptions=raises).request(method, path, **options)
            text, traceback, _ = response.text.partition("Traceback")
            if traceback:  # the debug page; its frames may differ
                response.headers.pop("content-length")
            seen += [response.status_code, response.headers, text]
        except Exception as error:
            seen += [type(error), str(error)]
    return seen


NAMES = ("handled", "in-a-thread", "mishandled", "conflict", "unhandled")
REQUESTS = [
    ("GET", "/nowhere"),
    ("DELETE", "/items"),
    ("POST", "/items"),
    *(("GET", f"/{way}/{name}") for way in ("raise", "later", "midway", "plain") for name in NAMES),
    *(("GET", f"/plain/{name}?started") for name in NAMES),
]


@pytest.mark.parametrize("options", [{}, {"debug": True}, {"max_body_size": 1000}], ids="".join)
@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_errors_end_as_without_the_edge(method, path, options):
    """Client and server get the same, before and after the start of the response."""
    app = app_of(**options)

    assert outcome(with_edge(app), method, path) == outcome(without_edge(app), method, path)


@pytest.mark.parametrize("path", ["/items", "/inner/items"])
@pytest.mark.parametrize("body", [b"{}", b'{"a": 1, "and": "so on"}', b"{" + b" " * 2000])
def test_bodies_end_as_without_the_edge(path, body):
    """A body that is too large for the app or a mounted app."""
    app = app_of(max_body_size=1000)

    def parts():
        yield body

    for content in (body, parts):
        calls = [
            outcome(each(app), "POST", path, content=content() if callable(content) else content)
            for each in (with_edge, without_edge)
        ]
        assert calls[0] == calls[1]


def test_handler_for_exception_answers():
    """The exception is re-raised."""
    app = app_of()

    @app.exception_handler(Exception)
    def answer(request: Request, error: Exception):
        return PlainTextResponse(f"sorry for the {type(error).__name__}", status_code=500)

    for path in ("/raise/unhandled", "/plain/mishandled"):
        assert outcome(with_edge(app), "GET", path) == outcome(without_edge(app), "GET", path)
    assert outcome(with_edge(app), "GET", "/raise/unhandled")[2] == "sorry for the ValueError"


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "policy"])
def test_websockets_end_as_without_the_edge(name, accept):
    """A failing WebSocket is refused or closed with an edge in the way it is without an edge."""
    app, seen = app_of(), []

    for each in (with_edge(app), without_edge(app)):
        try:
            with TestClient(each).websocket_connect(f"/socket/{name}?accept={accept}") as websocket:
                websocket.receive_text()
        except (WebSocketDisconnect, Exception) as error:
            seen.append((type(error), str(error)))

    assert len(seen) == 2
    assert seen[0] == seen[1]


LIMITS = LimitsSettings(max_body_size=1000, max_concurrent=1, queue_timeout=None)
LIMITED = [BodyLimitMiddleware(None, LIMITS, largest=0), BodyLimitMiddleware(None, LIMITS)]


@pytest.mark.parametrize("limit", LIMITED)
@pytest.mark.parametrize("kind", ["body", "json"])
@pytest.mark.parametrize(
    "middleware", [(), (Middleware(BaseHTTPMiddleware, dispatch=lambda request, go_on: go_on(request)),)]
)
def test_chunked_oversized_body_below_middleware_is_refused(middleware, kind, limit):
    """Whether a task group or a handler reads it."""
    app = app_of(middleware=middleware)

    async def read(request: Request):
        return len(await getattr(request, kind)())

    async def read_instead(request: Request, error: HTTPException):
        return PlainTextResponse(f"{len(await request.body())} bytes", status_code=404)

    app.add_api_route("/read", read, methods=["POST"])
    app.add_exception_handler(404, read_instead)
    client = TestClient(with_edge(app, limit), raise_server_exceptions=False)

    for path in ("/read", "/nowhere"):
        assert client.post(path, content=iter([b"x" * 600] * 2)).status_code == 413
    assert client.post("/nowhere", content=iter([b"x" * 400] * 2)).text == "800 bytes"


async def test_slot_is_held_until_the_exception_handler_ends():
    """A request keeps its concurrency slot while an exception handler runs, so further requests get a 503."""
    app, inside, most = app_of(), [], []

    @app.exception_handler(404)
    async def wait(request: Request, error: HTTPException):
        inside.append(None)
        most.append(len(inside))
        await asyncio.sleep(0.01)
        inside.pop()
        return PlainTextResponse("nothing there", status_code=404)

    served = with_edge(app, ConcurrencyLimitMiddleware(None, LIMITS, registry=CollectorRegistry()))
    transport = httpx2.ASGITransport(app=served)
    async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as client:
        answers = await asyncio.gather(*[client.get("/nowhere") for _ in range(3)])

    assert most == [1]
    assert sorted(answer.status_code for answer in answers) == [404, 503, 503]


def test_answer_of_an_exception_handler_after_the_deadline_is_dropped():
    """The client has the 504."""
    app, handled = app_of(), []

    @app.exception_handler(HandledError)
    async def handle(request: Request, error: HandledError):
        handled.append(error)
        return PlainTextResponse("handled")

    async def turn(scope, receive, send):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise HandledError from None

    app.mount("/turns", turn)
    served = with_edge(app, DeadlineMiddleware(None, LimitsSettings(request_timeout=0.05)))

    assert TestClient(served).get("/turns").status_code == 504
    assert len(handled) == 1


def test_middleware_of_the_app_sees_handled_exceptions():
    """Its own exceptions are a 500."""

    class Watch:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def watch(message):
                if message["type"] == "http.response.start":
                    message["headers"].append((b"x-watched", str(message["status"]).encode()))
                await send(message)

            if scope["query_string"]:
                raise RuntimeError("the middleware has failed")
            await self.app(scope, receive, watch)

    app = app_of(middleware=[Middleware(Watch)])

    for path in ("/nowhere", "/plain/handled", "/plain/unhandled", "/nowhere?fail"):
        assert outcome(with_edge(app), "GET", path) == outcome(without_edge(app), "GET", path)
    assert TestClient(with_edge(app)).get("/plain/handled").headers["x-watched"] == "418"


def test_other_layers_around_the_app_see_every_request():
    """Such as a tracer."""

    class Tracer(ServerErrorMiddleware):
        async def __call__(self, scope, receive, send):
            paths.append(scope["path"])
            await super().__call__(scope, receive, send)

    app, paths = app_of(), []
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: Tracer(build())

    assert outcome(with_edge(app), "GET", "/raise/unhandled")[0] == 500
    assert paths == ["/raise/unhandled"] * 2


@pytest.mark.parametrize("blocks", [False, True])
def test_deadline_includes_exception_handlers(blocks):
    """The request deadline includes the exception handler, and a slow handler is answered with a 504."""
    app = app_of()

    @app.exception_handler(HandledError)
    async def wait(request: Request, error: HandledError):
        if blocks:
            time.sleep(0.1)
        await asyncio.sleep(30)

    served = with_edge(app, DeadlineMiddleware(app, LimitsSettings(request_timeout=0.05)))

    assert TestClient(served).get("/plain/handled").status_code == 504
    assert TestClient(served).get("/nowhere").status_code == 404


@pytest.mark.parametrize("error", [HandledError, ValueError, RuntimeError])
@pytest.mark.parametrize("path", ["/plain/", "/route/"])
async def test_failed_request_leaves_no_reference_cycle(path, error):
    """Nor does its exception."""
    app = app_of()
    add_problem_handlers(app)

    @app.get("/route/")
    async def fail():
        raise error

    async def fail_plainly(*args):
        raise error

    app.router.routes.insert(0, Mount("/plain", fail_plainly))
    served = with_edge(app)

    async def call():
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        with contextlib.suppress(error):
            await served(scope, nothing, nothing)

    await call()  # the first request creates cached objects
    with none_left():
        await call()


async def test_cancellation_by_the_server_reaches_the_exception_handler():
    """If the server cancels the request's task, CancelledError is raised in the running exception handler."""
    app, cancelled = app_of(), []

    @app.exception_handler(HandledError)
    async def wait(request: Request, error: HandledError):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    scope = {"type": "http", "method": "GET", "path": "/plain/handled", "query_string": b"", "headers": []}
    task = asyncio.create_task(with_edge(app)(scope, nothing, nothing))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert cancelled == [True]


class Seen:
    """Record which exceptions pass Starlette's classes, as agents do that patch these."""

    def __init__(self, monkeypatch):
        self.passed = []
        for kind in (Starlette, FastAPI):
            monkeypatch.setattr(kind, "__call__", self.watching(kind.__call__, kind.__name__))

    def watching(self, call, name):
        async def watched(app, scope, receive, send):
            try:
                await call(app, scope, receive, send)
            except BaseException as error:
                self.passed.append((name, type(error), error.__traceback__.tb_next is not None))
                raise

        return watched


def production(**sections):
    return Settings(environment="prod", hosts={"allowed": ["testserver"]}, **sections)


def made(way, **sections):
    """Return an app with an edge, made by `create_app` or `install`."""
    if way == "create_app":
        return create_app(production(**sections))
    app = FastAPI()
    install(app, production(**sections))
    return app


def scope_of(path):
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b""}
    return {**scope, "headers": [(b"host", b"testserver")]}


ways = pytest.mark.parametrize("way", ["create_app", "install"])


def statuses(output):
    return [line["http_status"] for text in output.splitlines() if (line := json.loads(text))["event"] == "request"]


def error_lines(output):
    return [line for text in output.splitlines() if "exception" in (line := json.loads(text))]


@ways
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_await_chain_of_the_task_reaches_the_handler(way, method):
    """For tools such as a stack dump."""
    app, hangs = made(way), asyncio.Event()

    @app.api_route("/hangs", methods=["GET", "POST"])
    async def handler(request: Request):
        await request.body()
        hangs.set()
        await asyncio.Event().wait()

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {**scope_of("/hangs"), "method": method}
    scope["headers"] += [(b"transfer-encoding", b"chunked")] if method == "POST" else []
    task = asyncio.create_task(app(scope, receive, nothing))
    await hangs.wait()
    awaited, names = task.get_coro(), []
    while hasattr(awaited, "cr_await"):
        names.append(awaited.cr_code.co_name)
        awaited = awaited.cr_await
    task.cancel()
    await asyncio.wait([task])

    assert names[-2:] == ["handler", "wait"]  # the latter is the event's


@ways
@pytest.mark.parametrize("patched_later", [False, True])
def test_exceptions_leave_starlette_call(way, patched_later, monkeypatch, capsys):
    """With their traceback; then they are logged, and the client has a 500."""
    seen = None if patched_later else Seen(monkeypatch)
    app = made(way)
    add_routes(app)
    seen = seen or Seen(monkeypatch)
    capsys.readouterr()

    response = TestClient(app).get("/raise/unhandled")

    [line] = error_lines(capsys.readouterr().out)
    assert (response.status_code, response.json()["status"]) == (500, 500)
    assert seen.passed == [("Starlette", ValueError, True), ("FastAPI", ValueError, True)]
    assert line["request_id"] == response.headers["x-request-id"]
    assert _context.current() is None


@ways
def test_edge_wraps_whatever_is_set_as_middleware_stack(way):
    """Agents that wrap `build_middleware_stack` find Starlette's layers."""

    class Agent:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            served.append(scope["path"])
            await self.app(scope, receive, send)

    app, served = made(way), []
    build = app.build_middleware_stack
    assert type(build()) is ServerErrorMiddleware
    app.build_middleware_stack = lambda: Agent(build())
    client = TestClient(app)

    first = client.get("/nowhere")
    app.middleware_stack = app.build_middleware_stack()  # how OpenTelemetry instruments an app that has started
    second = client.get("/nowhere")

    assert served == ["/nowhere", "/nowhere"]
    assert type(app.middleware_stack.app) is Agent
    for response in (first, second):
        assert response.headers["x-content-type-options"] == "nosniff"


@ways
def test_errors_raise_reraises_logged_exceptions(way, capsys):
    """With ERRORS_RAISE an unhandled exception is logged once and then raised to the caller of the app."""
    app = made(way, errors={"raise_": True})
    add_routes(app)
    capsys.readouterr()

    with pytest.raises(ValueError, match="nobody handles it"):
        TestClient(app).get("/raise/unhandled")

    assert len(error_lines(capsys.readouterr().out)) == 1
    assert _context.current() is None


def test_edge_without_error_boundary_reraises(capsys):
    """The server's record has the context of the request."""
    app = made("create_app", errors=None)
    add_routes(app)

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", "/raise/unhandled", "X-Request-ID: id-of-the-request"))
        response = read_response(client)

    [line] = error_lines(capsys.readouterr().out)
    assert response.startswith(b"HTTP/1.1 500")
    assert (line["logger"], line["request_id"]) == ("uvicorn.error", "id-of-the-request")


@pytest.mark.parametrize("errors", [None, {"raise_": True}])
async def test_in_process_call_does_not_change_the_callers_context(errors):
    """An in-process call to an app leaves the log context of the calling task unchanged, even on an error."""
    app = made("create_app", errors=errors)
    add_routes(app)
    token = _context.begin({"job": "nightly"})

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://testserver") as client:
        for path in ("/nowhere", "/raise/unhandled", "/midway/unhandled"):
            with contextlib.suppress(ValueError, RuntimeError):
                await client.get(path)
            assert _context.current() == {"job": "nightly"}

    _context.end(token)


def test_exception_of_an_agent_is_reraised(monkeypatch, capsys):
    """Nothing is logged about the request."""
    app = made("create_app")

    async def fail(self, scope, receive, send):
        raise LookupError("the agent's own")

    monkeypatch.setattr(Starlette, "__call__", fail)
    with pytest.raises(LookupError, match="the agent's own"):
        TestClient(app).get("/nowhere")

    assert error_lines(capsys.readouterr().out) == []


def test_cancellation_in_place_of_an_exception_is_not_swallowed(monkeypatch, capsys):
    """The exception is logged."""
    app = made("create_app")
    add_routes(app)
    call = Starlette.__call__

    async def report(self, scope, receive, send):
        try:
            await call(self, scope, receive, send)
        except ValueError as error:
            raise asyncio.CancelledError from error

    monkeypatch.setattr(Starlette, "__call__", report)
    capsys.readouterr()

    async def serve():
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": "/raise/unhandled",
            "query_string": b"",
        }
        await app({**scope, "headers": [(b"host", b"testserver")]}, nothing, nothing)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(serve())

    assert len(error_lines(capsys.readouterr().out)) == 1


async def test_failed_request_of_an_edge_leaves_no_reference_cycle():
    """A failed request through an edge leaves no reference cycle, so the exception is freed at once."""
    app = made("create_app", log=None, database=None)
    add_routes(app)
    logging.getLogger("fastapi_prodkit").setLevel(logging.CRITICAL)

    async def call():
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": "/plain/unhandled",
            "query_string": b"",
        }
        await app({**scope, "headers": [(b"host", b"testserver")]}, nothing, nothing)

    try:
        await call()
        with none_left():
            await call()
    finally:
        logging.getLogger("fastapi_prodkit").setLevel(logging.NOTSET)


def test_edge_keeps_name_and_methods_of_the_apps_class():
    """A copy of the app has the edge too."""

    class Own(FastAPI):
        __slots__ = ("extra",)

        async def __call__(self, scope, receive, send):
            called.append(scope["type"])
            await super().__call__(scope, receive, send)

    called, app = [], Own()
    install(app, production())

    assert isinstance(app, Own)
    assert (type(app).__name__, type(app).__module__) == ("Own", __name__)
    for each in (app, copy.copy(app)):
        assert TestClient(each).get("/nowhere").headers["x-content-type-options"] == "nosniff"
    assert called == ["http", "http"]


def test_edge_does_not_call_init_subclass_of_the_app():
    """Which may require arguments."""

    registered = []

    class Registry(FastAPI):
        def __init_subclass__(cls, *, kind, **options):
            registered.append(kind)
            super().__init_subclass__(**options)

    class Own(Registry, kind="own"):
        pass

    app = Own()
    install(app, production())

    assert isinstance(app, Own)
    assert type(app).__name__ == "Own"
    assert registered == ["own"]
    assert TestClient(app).get("/nowhere").headers["x-content-type-options"] == "nosniff"


def test_middleware_stack_can_be_deleted_and_set():
    """A deleted middleware_stack stays absent until a new stack is set, which then serves requests."""
    app = made("create_app")

    del app.middleware_stack

    assert not hasattr(app, "middleware_stack")
    app.middleware_stack = app.build_middleware_stack()
    assert TestClient(app).get("/nowhere").headers["x-content-type-options"] == "nosniff"


def test_edge_around_a_started_or_wrapped_app_is_refused():
    """Edge.put_around raises a ConfigurationError for an app that has started or already has an edge."""
    started, twice = Starlette(), Starlette()
    TestClient(started).get("/")
    Edge([]).put_around(twice)

    with pytest.raises(ConfigurationError, match="already started"):
        Edge([]).put_around(started)
    with pytest.raises(ConfigurationError, match="has an edge already"):
        Edge([]).put_around(twice)


def add_cancelled_routes(app):
    """Add routes that await a cancelled task."""

    async def wait():
        task = asyncio.create_task(asyncio.sleep(9))
        task.cancel()
        await task

    app.add_api_route("/cancelled", wait)

    async def midway(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await wait()

    app.mount("/cancelled-midway", midway)

    @app.get("/cancelled-later")
    async def later(tasks: BackgroundTasks):
        tasks.add_task(wait)

    @app.websocket("/cancelled-socket")
    async def socket(websocket: WebSocket, accept: bool = False):
        if accept:
            await websocket.accept()
        await wait()


@ways
def test_cancelled_error_of_the_app_is_a_500_problem(way, capsys):
    """One record, and the connection stays usable."""
    app = made(way, cors={"origins": ["https://app.example.com"]})
    add_cancelled_routes(app)

    with serving(app) as port, connection(port) as client:
        answers = []
        for path in ("/cancelled", "/cancelled-later", "/nowhere"):
            client.sendall(request("GET", path, "Origin: https://app.example.com"))
            answers.append(read_response(client))

    output = capsys.readouterr().out
    head, _, body = answers[0].partition(b"\r\n\r\n")
    assert [answer.split()[1] for answer in answers] == [b"500", b"200", b"404"]
    assert b"access-control-allow-origin" in head
    assert json.loads(body)["detail"] == "The server could not complete the request."
    assert [line["http_path"] for line in error_lines(output)] == ["/cancelled", "/cancelled-later"]
    assert all("in wait" in line["exception"] for line in error_lines(output))
    assert sorted(statuses(output)) == [200, 404, 500]


def test_cancelled_error_after_a_disconnect_is_logged_once(capsys):
    """A CancelledError of the handler is logged once if the problem cannot be sent to a disconnected client."""
    app = made("create_app")
    add_cancelled_routes(app)
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/cancelled", "query_string": b""}

    async def gone(message):
        raise OSError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(app({**scope, "headers": [(b"host", b"testserver")]}, nothing, gone))

    output = capsys.readouterr().out
    assert [line["http_path"] for line in error_lines(output)] == ["/cancelled"]
    assert statuses(output) == [499]


def test_cancelled_error_in_a_stream_aborts_the_transfer(capsys):
    """The log has the reason."""
    app = made("create_app")
    add_cancelled_routes(app)

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", "/cancelled-midway/"))
        received = read_all(client)

    output = capsys.readouterr().out
    assert b"begun" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert [line["http_path"] for line in error_lines(output)] == ["/cancelled-midway/"]
    assert statuses(output) == [200]


@pytest.mark.parametrize(("accept", "status"), [(False, 500), (True, 101)])
def test_cancelled_error_in_a_websocket_is_logged_once(accept, status, capsys):
    """With the status that the client saw."""
    app = made("create_app")
    add_cancelled_routes(app)
    handshake = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", f"/cancelled-socket?accept={accept}", *handshake, key))
        received = read_all(client)

    output = capsys.readouterr().out
    assert received.startswith(b"HTTP/1.1 %d" % status)
    assert len(error_lines(output)) == 1
    assert statuses(output) == [status]


@ways
def test_group_with_a_cancellation_is_an_error(way, capsys):
    """It is not an Exception."""
    app = made(way)

    @app.get("/group")
    async def fail():
        raise BaseExceptionGroup("of a task group", [asyncio.CancelledError(), ValueError("inner")])

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", "/group"))
        answer = read_response(client)

    output = capsys.readouterr().out
    [line] = error_lines(output)
    assert answer.startswith(b"HTTP/1.1 500")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"] == line["request_id"]
    assert "ValueError: inner" in line["exception"]
    assert statuses(output) == [500]


@ways
def test_exception_of_a_layer_is_a_500_problem(way, capsys):
    """Such as that of a store; it is logged once."""

    class Store:
        async def hit(self, limits, key, cost=1):
            raise RuntimeError("no store")

    app = create_app(production(), store=Store()) if way == "create_app" else FastAPI()
    if way == "install":
        install(app, production(), store=Store())
    response = TestClient(app).get("/")

    output = capsys.readouterr().out
    assert (response.status_code, response.json()["request_id"]) == (500, response.headers["X-Request-ID"])
    assert statuses(output) == [500]
    assert len(error_lines(output)) == 1


def test_system_exit_passes_to_the_server(capsys):
    """Its record has the request id."""
    app = made("create_app")

    @app.get("/exit")
    async def leave():
        raise SystemExit(3)

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", "/exit", "X-Request-ID: abcdefgh"))
        received = read_all(client)

    output = capsys.readouterr().out
    [line] = error_lines(output)
    assert received.startswith(b"HTTP/1.1 500")
    assert (line["logger"], line["request_id"]) == ("uvicorn.error", "abcdefgh")
    assert statuses(output) == [500]


def test_exception_object_raised_again_is_logged_each_time(capsys):
    """An exception object that several requests raise is logged for each of these requests."""
    app, error = made("create_app"), RuntimeError("kept in a variable")

    @app.get("/fail")
    async def fail():
        raise error

    async def midway(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    app.mount("/midway", midway)

    with serving(app) as port:
        for path in ("/fail", "/midway/", "/fail", "/midway/"):
            with connection(port) as client:
                client.sendall(request("GET", path, "Connection: close"))
                read_all(client)

    found = [(line["logger"], line["http_path"]) for line in error_lines(capsys.readouterr().out)]
    assert found == [("fastapi_prodkit.error", path) for path in ("/fail", "/midway/", "/fail", "/midway/")]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_header_that_the_server_refuses_is_a_500(http, capsys):
    """Such as one with a line break; the log has the server's reason."""
    app = made("create_app")

    @app.get("/split")
    async def split():
        return PlainTextResponse("never seen", headers={"x-split": "a\r\nb: c"})

    with serving(app, http=http) as port, connection(port) as client:
        client.sendall(request("GET", "/split"))
        received = read_all(client)

    output = capsys.readouterr().out
    [line] = error_lines(output)
    assert b"never seen" not in received
    assert "header value" in line["exception"]
    assert statuses(output) == [500]


def test_edge_around_a_plain_asgi_app_decides_in_place(capsys):
    """An edge around a plain ASGI app answers CancelledError of the handler with a 500 and logs one error."""
    edge = Edge([ErrorBoundaryMiddleware(None)]).around(FastAPI())
    app = FastAPI()
    add_cancelled_routes(app)
    configure_logging()
    capsys.readouterr()

    response = TestClient(edge.around(app)).get("/cancelled")

    assert response.status_code == 500
    assert len(error_lines(capsys.readouterr().out)) == 1


# Bodies that are not read


def unread_app():
    """An app that answers without reading the body, after a part, or after all of it."""
    app = create_app(Settings(environment="test", limits={"max_body_size": None}))

    @app.post("/unread")
    async def unread():
        return "ok"

    @app.post("/part")
    async def part(request: Request):
        return len(await anext(request.stream()))

    @app.post("/read")
    async def read(request: Request):
        return len(await request.body())

    return app


@pytest.fixture(scope="module", params=["h11", "httptools"])
def port(request):
    with serving(unread_app(), http=request.param) as port:
        yield port


def head(path, *lines):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("path", "announced", "sent"),
    [("/unread", 65_537, 0), ("/unread", 10_000_000, 10), ("/part", 100_000, 1_000), ("/nowhere", 2**63, 0)],
)
def test_large_unread_body_closes_the_connection(port, path, announced, sent):
    """The server would have to read the rest before the next request."""
    with connection(port) as client:
        client.sendall(head(path, f"Content-Length: {announced}") + b"x" * sent)
        response = read_all(client)

    assert b"\r\nconnection: close\r\n" in response
    assert response.count(b"connection: close") == 1


@pytest.mark.parametrize("path", ["/unread", "/part"])
def test_unread_chunked_body_closes_the_connection(port, path):
    """A response sent before a chunked body is read to its end has the header Connection: close."""
    with connection(port) as client:
        client.sendall(head(path, "Transfer-Encoding: chunked") + b"1\r\nx\r\n")

        assert b"\r\nconnection: close\r\n" in read_all(client)


@pytest.mark.parametrize(
    ("path", "size"), [("/unread", 65_536), ("/unread", 1), ("/part", 60_000), ("/read", 300_000), ("/nowhere", 10)]
)
def test_read_or_small_body_keeps_the_connection(port, path, size):
    """A connection stays open for the next request if the body was read or its unread rest is small."""
    with connection(port) as client:
        client.sendall(head(path, f"Content-Length: {size}") + b"x" * size)
        first = read_response(client)
        client.sendall(head("/read", "Content-Length: 2") + b"ok")
        second = read_response(client)

    assert b"connection: close" not in first
    assert second.endswith(b"\r\n\r\n2")


def test_read_chunked_body_keeps_the_connection(port):
    """A connection stays open for the next request once a chunked body is read to its end."""
    with connection(port) as client:
        client.sendall(head("/read", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n")
        first = read_response(client)
        client.sendall(head("/read", "Content-Length: 2") + b"ok")

        assert read_response(client).endswith(b"\r\n\r\n2")
    assert b"connection: close" not in first


@pytest.mark.parametrize("layer", ["rate_limit", "limits"])
def test_refusal_of_a_layer_closes_the_connection(layer):
    """If the body is large."""
    settings = Settings(environment="test", rate_limit={"default": "1/hour"}, limits={"max_body_size": 100})
    app = create_app(settings)
    with serving(app) as port:
        if layer == "rate_limit":
            with connection(port) as client:
                client.sendall(head("/nowhere", "Content-Length: 0"))
                read_response(client)
        with connection(port) as client:
            client.sendall(head("/nowhere", "Content-Length: 100000"))
            response = read_all(client)

    assert response.startswith(b"HTTP/1.1 429 " if layer == "rate_limit" else b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in response


async def test_http_2_has_no_connection_header():
    """An HTTP/2 response has no Connection header, because the protocol forbids that header."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": "2", "method": "POST", "path": "/unread", "raw_path": b"/unread"}
    headers = [(b"host", b"a"), (b"content-length", b"10000000")]
    await unread_app()({**scope, "query_string": b"", "headers": headers, "client": None}, None, send)

    assert sent[0]["status"] == 200
    assert b"connection" not in dict(sent[0]["headers"])
