"""The access log: exactly one line for each request, and one record for each exception."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import logging.config
import re
from contextlib import asynccontextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import Queue

import pytest
import structlog
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket, WebSocketException
from fastapi.responses import StreamingResponse
from outcomes import items, outcomes
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_prodkit import Settings, _context, _scope, create_app
from fastapi_prodkit._context import Reason
from fastapi_prodkit._pipeline import exchange
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.deadline import Timeout
from fastapi_prodkit.errors import ErrorBoundaryMiddleware
from fastapi_prodkit.logging import EventHandler, configure_logging
from fastapi_prodkit.rate_limit import Limit, RateLimit, SharedStore
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.sections import ErrorsSettings, RateLimitSettings

FIELDS = ("http_method", "http_route", "http_path", "http_status", "client_ip")


def with_both(app, *, raise_=False, **options):
    """Return the app inside an access log, and an error boundary inside of that."""
    return AccessLogMiddleware(ErrorBoundaryMiddleware(app, raise_=raise_), **options)


@pytest.fixture(autouse=True)
def level(caplog):
    """Logging at INFO, as `configure_logging` sets it."""
    caplog.set_level(logging.INFO)


class Handler(logging.Handler):
    """A handler of another library, which keeps its records."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_line_truncates_a_long_path():
    """A path of 5,000 characters is cut to 2,048 in the access line."""
    handler = Handler()
    logger = logging.getLogger("fastapi_prodkit.access")
    logger.addHandler(handler)
    try:
        TestClient(with_both(service())).get("/" + "x" * 5000)
    finally:
        logger.removeHandler(handler)

    assert [len(record.http_path) for record in handler.records] == [2048]


def lines(caplog):
    """Return the fields of each access line, except its duration."""
    found = [record for record in caplog.records if record.name == "fastapi_prodkit.access"]
    assert all(record.duration_ms >= 0 for record in found)
    return [{name: vars(record)[name] for name in FIELDS if name in vars(record)} for record in found]


def line(path, status, *, route="_unmatched", method="GET"):
    return {
        "http_method": method,
        "http_route": route,
        "http_path": path,
        "http_status": status,
        "client_ip": "testclient",
    }


def errors(caplog):
    return [record for record in caplog.records if record.name == "fastapi_prodkit.error"]


async def fail():
    raise RuntimeError("after the response")


def service() -> FastAPI:
    router = outcomes()
    inner = FastAPI()
    inner.include_router(items())
    outer = APIRouter()
    outer.include_router(router, prefix="/v1")
    app = FastAPI(max_body_size=10)
    app.include_router(outer, prefix="/api")
    app.include_router(router)
    app.mount("/sub", inner)
    return app


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/ok/1", "/ok/{number}", 200),
        ("GET", "/sync/1", "/sync/{number}", 200),
        ("GET", "/api/v1/ok/1", "/api/v1/ok/{number}", 200),
        ("GET", "/sub/items/1", "/sub/items/{number}", 200),
        ("GET", "/empty", "/empty", 204),
        ("GET", "/unchanged", "/unchanged", 304),
        ("GET", "/elsewhere", "/elsewhere", 307),
        ("GET", "/folder", "_unmatched", 307),
        ("GET", "/missing", "/missing", 404),
        ("GET", "/nothing", "_unmatched", 404),
        ("GET", "/sub/nothing", "_unmatched", 404),
        ("DELETE", "/ok/1", "/ok/{number}", 405),
        ("HEAD", "/ok/1", "/ok/{number}", 405),
        ("OPTIONS", "/ok/1", "/ok/{number}", 405),
        ("POST", "/ok/1", "/ok/{number}", 413),
        ("GET", "/ok/x", "/ok/{number}", 422),
        ("GET", "/limited", "/limited", 429),
        ("GET", "/unavailable", "/unavailable", 503),
        ("GET", "/stream", "/stream", 200),
        ("GET", "/background", "/background", 200),
    ],
)
def test_line_has_the_fields_of_every_outcome(method, path, route, status, caplog):
    """Each line has method, route, path, the status that the client saw, and the client."""
    app = with_both(service())
    content = {"number": "more than ten bytes"} if status == 413 else None

    response = TestClient(app, follow_redirects=False).request(method, path, json=content)

    assert response.status_code == status
    assert lines(caplog) == [line(path, status, route=route, method=method)]
    assert errors(caplog) == []


def test_line_contains_no_query_header_or_body(caplog):
    """The access line contains neither the query string nor values of request headers."""
    app = with_both(service())

    TestClient(app).post("/ok/1?token=s3cret", headers={"Authorization": "s3cret", "Cookie": "id=s3cret"})

    assert len(lines(caplog)) == 1
    assert not any("s3cret" in str(vars(record)) for record in caplog.records if record.name.startswith("fastapi"))


@pytest.mark.parametrize("client", [None, "absent"])
async def test_line_omits_a_client_without_an_address(client, caplog):
    """For example on a Unix socket."""
    server = Server()
    server.scope["client"] = client
    if client == "absent":
        del server.scope["client"]

    await server.call(with_both(respond_and()))

    [found] = lines(caplog)
    assert "client_ip" not in found


class Server:
    """A fake server; it disconnects after `hang_up_after` messages of the response."""

    def __init__(self, *, hang_up_after=None, extensions=(), body=()):
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [],
            "client": ("203.0.113.9", 1),
            "asgi": {"spec_version": "2.4"},
            "extensions": {name: {} for name in extensions},
        }
        self.body = [*body, {"type": "http.disconnect"}]
        self.hang_up_after = hang_up_after
        self.sent = []

    async def receive(self):
        return self.body.pop(0)

    async def send(self, message):
        if len(self.sent) == self.hang_up_after:
            raise OSError("the client has gone")
        self.sent.append(message)

    async def call(self, app):
        await app(self.scope, self.receive, self.send)


def statuses(caplog):
    return [found["http_status"] for found in lines(caplog)]


def respond_and(error=None):
    """Return an app that sends a complete response, and then raises the exception, if there is one."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        if error is not None:
            raise error

    return app


def start_and(error):
    """Return an app that raises after the start of its response."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        raise error

    return app


async def test_exception_after_a_complete_response_is_swallowed(caplog):
    """It is logged once; the connection is still usable."""
    error = RuntimeError("in a background task")

    await Server().call(with_both(respond_and(error)))

    [record] = errors(caplog)
    assert (record.getMessage(), record.levelno, record.http_path) == ("unhandled exception", logging.ERROR, "/")
    assert record.exc_info[1] is error
    assert statuses(caplog) == [200]


async def test_exception_in_the_middle_of_a_response_reaches_the_server(caplog):
    """It is logged once, and the server aborts the transfer; the client saw a 200."""
    error = RuntimeError("in a stream")

    with pytest.raises(RuntimeError, match="in a stream"):
        await Server().call(with_both(start_and(error)))

    assert [record.exc_info[1] for record in errors(caplog)] == [error]
    assert statuses(caplog) == [200]


async def test_exception_before_the_response_reaches_the_server(caplog):
    """The server answers 500, and so does the line."""

    async def app(scope, receive, send):
        raise RuntimeError("at once")

    with pytest.raises(RuntimeError, match="at once"):
        await Server().call(with_both(app))

    assert len(errors(caplog)) == 1
    assert statuses(caplog) == [500]


def test_exception_in_fastapi_is_swallowed_after_its_500(caplog):
    """An exception for which FastAPI has sent a complete 500 is logged and not raised to the server."""
    app = FastAPI()
    app.get("/")(fail)

    response = TestClient(with_both(app)).get("/")

    assert response.status_code == 500
    assert lines(caplog) == [line("/", 500, route="/")]
    assert len(errors(caplog)) == 1


def test_middleware_of_an_app_logs_500(caplog):
    """As the app's own middleware it is inside of the layer that sends the 500."""
    app = FastAPI()
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware)
    app.get("/")(fail)

    response = TestClient(app, raise_server_exceptions=False).get("/")

    assert response.status_code == 500
    assert lines(caplog) == [line("/", 500, route="/")]
    assert len(errors(caplog)) == 1


def test_failing_background_task_is_logged_after_a_200(caplog):
    """An exception of a background task is logged as an error, and the access line keeps status 200."""
    app = FastAPI()
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks):
        tasks.add_task(fail)
        return {}

    response = TestClient(app).get("/")

    assert response.status_code == 200
    assert lines(caplog) == [line("/", 200, route="/")]
    assert [str(record.exc_info[1]) for record in errors(caplog)] == ["after the response"]


async def test_raise_setting_reraises_a_logged_exception(caplog):
    """With `raise_=True`, an exception after the response is logged and then raised to the server."""
    with pytest.raises(RuntimeError, match="after the response"):
        await Server().call(with_both(respond_and(RuntimeError("after the response")), raise_=True))

    assert len(errors(caplog)) == 1
    assert statuses(caplog) == [200]


@pytest.mark.parametrize(("app", "status"), [(respond_and, 200), (start_and, 499)])
async def test_cancellation_passes_and_is_no_error(app, status, caplog):
    """Before the end of the response it means that the client has disconnected."""

    async def serve():
        asyncio.current_task().cancel()
        await Server().call(with_both(app(asyncio.CancelledError())))

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(serve())

    assert errors(caplog) == []
    assert statuses(caplog) == [status]


async def test_cancelled_error_without_a_cancellation_is_an_error(caplog):
    """It is logged, and swallowed after a complete response."""
    with pytest.raises(asyncio.CancelledError):
        await Server().call(with_both(start_and(asyncio.CancelledError())))
    await Server().call(with_both(respond_and(asyncio.CancelledError())))

    assert len(errors(caplog)) == 2
    assert statuses(caplog) == [200, 200]


async def test_reraised_exception_is_marked_as_logged():
    """So that the server's own record of it can be dropped."""
    raised, swallowed = RuntimeError(), RuntimeError()

    with pytest.raises(RuntimeError):
        await Server().call(with_both(start_and(raised)))
    await Server().call(with_both(respond_and(swallowed)))

    assert [_scope.is_logged(each) for each in (raised, swallowed)] == [True, False]


async def test_websocket_disconnect_in_an_http_handler_is_an_error(caplog):
    """It may be from a WebSocket to another service."""
    with pytest.raises(WebSocketDisconnect):
        await Server().call(with_both(start_and(WebSocketDisconnect(1006))))

    assert len(errors(caplog)) == 1


async def test_frozen_exception_is_logged_and_swallowed(caplog):
    """Its class forbids setting attributes."""

    @dataclasses.dataclass(frozen=True)
    class FrozenError(Exception):
        code: int

    await Server().call(with_both(respond_and(FrozenError(7))))

    assert len(errors(caplog)) == 1


async def test_disconnect_during_the_body_is_status_499(caplog):
    """A disconnect before the request body is complete is logged as status 499 and not as an error."""

    async def app(scope, receive, send):
        await Request(scope, receive).body()

    server = Server(body=[{"type": "http.request", "body": b"half", "more_body": True}])

    await server.call(with_both(app))

    assert errors(caplog) == []
    assert statuses(caplog) == [499]


async def test_disconnect_during_a_stream_is_status_499(caplog):
    """A disconnect during a streamed response is logged as status 499 and not as an error."""
    app = StreamingResponse(iter([b"a", b"b", b"c"]))

    await Server(hang_up_after=2).call(with_both(app))

    assert errors(caplog) == []
    assert statuses(caplog) == [499]


async def test_disconnect_that_the_app_receives_is_status_499(caplog):
    """The app returns without a response."""

    async def app(scope, receive, send):
        if await Request(scope, receive).is_disconnected():
            return
        raise AssertionError

    await Server().call(with_both(app))

    assert statuses(caplog) == [499]


async def test_disconnect_after_the_response_changes_nothing(caplog):
    """A disconnect that the app receives after the complete response leaves the logged status at 200."""

    async def app(scope, receive, send):
        await respond_and()(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    await Server().call(with_both(app))

    assert statuses(caplog) == [200]


async def test_error_after_a_disconnect_is_logged(caplog):
    """An error that the disconnect has not caused is logged and re-raised."""

    async def app(scope, receive, send):
        await receive()
        raise RuntimeError("while clearing up")

    with pytest.raises(RuntimeError):
        await Server().call(with_both(app))

    assert len(errors(caplog)) == 1
    assert statuses(caplog) == [499]


@pytest.mark.parametrize("error", [ClientDisconnect(), ConnectionRefusedError("database")])
async def test_connection_error_of_the_app_is_an_error(error, caplog):
    """It is from a connection to another service: the client is still connected."""
    with pytest.raises(type(error)):
        await Server().call(with_both(start_and(error)))

    assert len(errors(caplog)) == 1
    assert statuses(caplog) == [200]


async def test_file_sent_by_the_server_completes_the_response(caplog):
    """A file sent by `http.response.pathsend` completes the response, so a later exception keeps status 200."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/tmp/file"})
        raise RuntimeError("in a background task")

    await Server(extensions=["http.response.pathsend"]).call(with_both(app))

    assert statuses(caplog) == [200]


async def test_duration_excludes_background_tasks(caplog, monkeypatch):
    """In milliseconds, until the end of the response."""
    now = 1000.0
    monkeypatch.setattr(exchange, "perf_counter", lambda: now)

    async def app(scope, receive, send):
        nonlocal now
        now += 0.25
        await respond_and()(scope, receive, send)
        now += 60

    await Server().call(with_both(app))

    assert [record.duration_ms for record in caplog.records if record.name == "fastapi_prodkit.access"] == [250.0]


def websocket_app(endpoint):
    app = FastAPI()
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware)
    app.websocket("/rooms/{room}")(endpoint)
    return app


def websocket_line(status, *, route="/rooms/{room}", path="/rooms/7"):
    return {"http_route": route, "http_path": path, "http_status": status, "client_ip": "testclient"}


def test_websocket_has_one_line_at_its_close(caplog):
    """The access log writes one line per WebSocket, and only when the connection has closed."""
    before_close = []

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.accept()
        before_close.extend(lines(caplog))
        await websocket.close()

    with TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7"):
        pass

    assert before_close == []
    assert lines(caplog) == [websocket_line(101)]


def test_websocket_closed_by_the_client_is_no_error(caplog):
    """Even if the handler does not catch the disconnect."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.accept()
        while True:
            await websocket.receive_text()

    with TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7") as session:
        session.send_text("hello")

    assert errors(caplog) == []
    assert lines(caplog) == [websocket_line(101)]


@pytest.mark.parametrize(("others", "count"), [([], 0), ([ValueError()], 1)])
def test_websocket_in_a_task_group_that_the_client_closes(others, count, caplog):
    """A group of exceptions is an error only if one of them is another than that the client has left."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.accept()
        raise ExceptionGroup("unhandled errors in a TaskGroup", [WebSocketDisconnect(1000), *others])

    with contextlib.suppress(ExceptionGroup), TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7"):
        pass

    assert len(errors(caplog)) == count
    assert lines(caplog) == [websocket_line(101)]


@pytest.mark.parametrize("path", ["/rooms/7", "/nothing"])
def test_refused_handshake_is_status_403(path, caplog):
    """A refused WebSocket handshake is logged as 403, the status with which servers answer."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.close()

    with pytest.raises(WebSocketDisconnect), TestClient(websocket_app(endpoint)).websocket_connect(path):
        pass

    assert statuses(caplog) == [403]


def test_handshake_refused_with_a_response_has_its_status(caplog):
    """A WebSocket handshake refused with a denial response is logged with the status of that response."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.send_denial_response(PlainTextResponse("no", 402))

    with pytest.raises(WebSocketDisconnect), TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7"):
        pass

    assert lines(caplog) == [websocket_line(402)]


def test_exception_in_a_websocket_is_logged_and_reraised(caplog):
    """Only the server can close the connection."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.accept()
        raise RuntimeError("in a conversation")

    with (
        pytest.raises(RuntimeError, match="in a conversation"),
        TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7"),
    ):
        pass

    assert len(errors(caplog)) == 1
    assert lines(caplog) == [websocket_line(101)]


@pytest.mark.parametrize("path", ["/health", "/health/"])
def test_exempt_path_has_no_line(path, caplog):
    """With or without a trailing slash; its exceptions are logged."""
    app = FastAPI(redirect_slashes=False)
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware, exempt={"/health"})
    app.get(path)(fail)

    TestClient(app, raise_server_exceptions=False).get(path)

    assert lines(caplog) == []
    assert len(errors(caplog)) == 1


def test_exempt_path_is_relative_to_the_root_path(caplog):
    """Exempt paths match without the root_path, so a proxy's prefix does not change the exemptions."""
    app = FastAPI()
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware, exempt={"/health"})
    client = TestClient(app, root_path="/api")

    client.get("/api/health")
    client.get("/api/other")

    assert [found["http_path"] for found in lines(caplog)] == ["/api/other"]


def test_level_above_info_keeps_refusals_and_failures(caplog):
    """At level WARNING, the access log writes a line for a 500 but none for a 200 or a 404."""
    app = FastAPI()
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(AccessLogMiddleware)
    app.get("/")(fail)
    app.get("/ok")(lambda: "ok")
    caplog.set_level(logging.WARNING)
    client = TestClient(app, raise_server_exceptions=False)

    for path in ("/", "/ok", "/nowhere"):
        client.get(path)

    assert [found["http_path"] for found in lines(caplog)] == ["/"]
    assert len(errors(caplog)) == 1


@pytest.fixture
def configure(monkeypatch, capsys):
    """Return a function that configures logging as in a service, without pytest's own handlers."""

    def configure(*further, settings=None):
        monkeypatch.setattr(logging.root, "handlers", list(further))
        configure_logging(settings)

    return configure


def access_lines(capsys):
    """Return our access lines, without the fields that differ between requests."""
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    changing = {"timestamp", "duration_ms"}
    return [{key: each[key] for key in each if key not in changing} for each in found if each["event"] == "request"]


def test_line_is_the_same_with_and_without_a_record(configure, capsys):
    """Another handler makes records necessary; fields and their order stay the same."""
    app = RequestIDMiddleware(with_both(service()))
    headers = {"X-Request-ID": "abcdefgh"}

    configure()
    TestClient(app).get("/ok/1", headers=headers)
    configure(Handler())
    TestClient(app).get("/ok/1", headers=headers)

    direct, recorded = access_lines(capsys)
    assert list(direct.items()) == list(recorded.items())
    assert (direct["logger"], direct["request_id"]) == ("fastapi_prodkit.access", "abcdefgh")


def test_line_has_the_context_of_structlog(configure, capsys):
    """Context variables that a route binds with structlog appear in its access line."""
    app = FastAPI()
    app.add_middleware(AccessLogMiddleware)

    @app.get("/")
    async def endpoint():
        structlog.contextvars.bind_contextvars(tenant="acme")

    configure()
    TestClient(app).get("/")

    assert [line["tenant"] for line in access_lines(capsys)] == ["acme"]


def add_to_root(handler):
    logging.root.addHandler(handler)


def add_to_parent(handler):
    logging.getLogger("fastapi_prodkit").addHandler(handler)


def add_to_logger(handler):
    logging.getLogger("fastapi_prodkit.access").addHandler(handler)


def queue(handler):
    """Put a queue in front of the handlers, as services with slow handlers do."""
    waiting = Queue()
    listener = QueueListener(waiting, handler, *logging.root.handlers)
    logging.root.handlers = [QueueHandler(waiting)]
    listener.start()
    return listener.stop


def use_dict_config(handler):
    handlers = {"theirs": {"()": lambda: handler}, "ours": {"()": EventHandler}}
    root = {"handlers": [*handlers], "level": "INFO"}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "handlers": handlers, "root": root})


@pytest.fixture
def restored():
    """Undo what `configure_logging` and `dictConfig` change on the package's loggers."""
    yield
    for name in ("fastapi_prodkit", "fastapi_prodkit.access"):
        logging.getLogger(name).handlers.clear()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("add", [add_to_root, add_to_parent, add_to_logger, queue, use_dict_config])
def test_handler_added_in_the_lifespan_gets_every_record(add, configure, capsys):
    """Observability SDKs add a handler at start-up; our line is still written."""
    theirs = Handler()

    @asynccontextmanager
    async def lifespan(app):
        stop = add(theirs)
        yield
        if stop is not None:
            stop()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(AccessLogMiddleware)
    app.add_middleware(RequestIDMiddleware)
    configure()

    with TestClient(app) as client:
        client.get("/nowhere")
        client.get("/nowhere")

    records = [record for record in theirs.records if record.name == "fastapi_prodkit.access"]
    ours = access_lines(capsys)
    assert [record.getMessage() for record in records] == ["GET _unmatched 404"] * 2
    assert [record.request_id for record in records] == [line["request_id"] for line in ours]
    assert [line["http_status"] for line in ours] == [404, 404]


def add_field(record):
    record.shelf = "A"
    return True


@pytest.mark.parametrize("where", ["handler", "logger"])
def test_filters_add_fields_and_drop_lines(where, configure, capsys):
    """Filters of the root handler and of the logger, whenever they are added."""
    app = with_both(service())
    configure()
    [handler] = logging.root.handlers
    filtered = handler if where == "handler" else logging.getLogger("fastapi_prodkit.access")

    try:
        filtered.addFilter(add_field)
        filtered.addFilter(lambda record: getattr(record, "http_path", "") != "/empty")
        TestClient(app).get("/ok/1")
        TestClient(app).get("/empty")
    finally:
        filtered.filters.clear()

    assert [(line["http_path"], line["shelf"]) for line in access_lines(capsys)] == [("/ok/1", "A")]


def test_record_factory_adds_fields(configure, capsys):
    """Even if it is set while the service runs."""
    app = with_both(service())
    configure()

    def factory(*args, **options):
        record = logging.LogRecord(*args, **options)
        record.trace_id = "abc"
        return record

    logging.setLogRecordFactory(factory)
    try:
        TestClient(app).get("/ok/1")
    finally:
        logging.setLogRecordFactory(logging.LogRecord)

    assert [line["trace_id"] for line in access_lines(capsys)] == ["abc"]


@pytest.mark.parametrize(("name", "shown"), [("request_id", "own"), ("http_path", "/ok/1")])
def test_record_factory_may_set_our_fields(name, shown, configure, capsys):
    """The request is served and logged; the factory's request id stays, and our other fields win."""
    app = RequestIDMiddleware(with_both(service()))
    configure()

    def factory(*args, **options):
        record = logging.LogRecord(*args, **options)
        setattr(record, name, "own")
        return record

    logging.setLogRecordFactory(factory)
    try:
        response = TestClient(app).get("/ok/1")
    finally:
        logging.setLogRecordFactory(logging.LogRecord)

    assert response.status_code == 200
    assert [line[name] for line in access_lines(capsys)] == [shown]


def test_exception_is_logged_if_a_record_factory_sets_its_field(configure, capsys):
    """With ERROR switched off, there is no record."""
    app = FastAPI()
    app.get("/fails")(fail)
    client = TestClient(ErrorBoundaryMiddleware(app), raise_server_exceptions=False)
    configure()

    def factory(*args, **options):
        record = logging.LogRecord(*args, **options)
        record.http_path = "own"
        return record

    logging.setLogRecordFactory(factory)
    try:
        client.get("/fails")
        logging.disable(logging.ERROR)
        client.get("/fails")
    finally:
        logging.disable(logging.NOTSET)
        logging.setLogRecordFactory(logging.LogRecord)

    found = [line for text in capsys.readouterr().out.splitlines() if "exception" in (line := json.loads(text))]
    assert [(line["event"], line["http_path"]) for line in found] == [("unhandled exception", "/fails")]


def test_patched_call_handlers_sees_every_line(configure, capsys, monkeypatch):
    """Agents of Sentry and New Relic replace `Logger.callHandlers`."""
    app, seen, original = with_both(service()), [], logging.Logger.callHandlers
    configure()

    def patched(logger, record):
        seen.append(record.getMessage())
        original(logger, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", patched)
    TestClient(app).get("/ok/1")

    assert "GET /ok/{number} 200" in seen
    assert len(access_lines(capsys)) == 1


def test_disabled_logging_writes_no_line(configure, capsys, monkeypatch):
    """By `logging.disable`, by the levels of logger and handler, or by a logger without a handler."""
    app, logger = with_both(service()), logging.getLogger("fastapi_prodkit.access")
    client = TestClient(app)
    configure()

    logging.disable(logging.INFO)
    client.get("/ok/1")
    logging.disable(logging.NOTSET)
    logging.root.handlers[0].setLevel(logging.WARNING)
    client.get("/ok/2")
    logging.root.handlers[0].setLevel(logging.NOTSET)
    with monkeypatch.context() as patch:
        patch.setattr(logger, "propagate", False)
        client.get("/ok/3")
    client.get("/ok/4")

    assert [line["http_path"] for line in access_lines(capsys)] == ["/ok/4"]


def test_record_has_a_message_and_fields_for_any_formatter(caplog):
    """A plain logging formatter can use the message, the HTTP fields and the request id of the record."""
    app = RequestIDMiddleware(with_both(service()))

    TestClient(app).get("/ok/1", headers={"X-Request-ID": "abcdefgh"})

    [record] = [record for record in caplog.records if record.name == "fastapi_prodkit.access"]
    formatter = logging.Formatter("%(request_id)s %(message)s %(http_method)s %(http_route)s %(http_status)d")
    assert formatter.format(record) == "abcdefgh GET /ok/{number} 200 GET /ok/{number} 200"
    assert record.duration_ms > 0
    assert record.msg == "%s %s %s"


def test_message_of_a_websocket_names_it_in_place_of_a_method(caplog):
    """The message of a WebSocket's access line has the word WebSocket where a request has its method."""

    async def endpoint(websocket: WebSocket, room: str):
        await websocket.accept()
        await websocket.close()

    with TestClient(websocket_app(endpoint)).websocket_connect("/rooms/7"):
        pass

    assert "WebSocket /rooms/{room} 101" in caplog.messages


async def test_lifespan_messages_pass_unchanged(caplog):
    """Lifespan calls reach the app with unchanged arguments, and write no access line."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    await with_both(app)({"type": "lifespan"}, 1, 2)

    assert seen == [({"type": "lifespan"}, 1, 2)]
    assert lines(caplog) == []


def test_two_apps_have_separate_exemptions(caplog):
    """A path that is exempt in one app is still logged in another app of the process."""

    async def ok(request):
        return PlainTextResponse("ok")

    def app(**options):
        return Starlette(routes=[Route("/a", ok)], middleware=[Middleware(AccessLogMiddleware, **options)])

    first, second = app(exempt={"/a"}), app()

    TestClient(first).get("/a")
    TestClient(second).get("/a")

    assert lines(caplog) == [line("/a", 200, route="/a")]


def refusing() -> FastAPI:
    """Return an app with every layer that refuses, and with routes that refuse requests themselves."""
    pytest.importorskip("redis", reason="needs the extra: pip install 'fastapi-prodkit[redis]'")
    pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
    from fastapi_prodkit.database import SessionDep

    settings = Settings(
        environment="test",
        errors=ErrorsSettings(),
        log=None,
        hosts={"allowed": ["testserver"]},
        cors={"origins": ["https://app.example"]},
        limits={"max_body_size": 10, "request_timeout": 0.5, "max_concurrent": 1, "queue_timeout": None},
        database={"url": "postgresql://u@127.0.0.1:1/x", "connect_timeout": 1, "ssl": "off"},
    )
    app = create_app(settings, registry=CollectorRegistry())
    store = SharedStore(
        RateLimitSettings(storage_url="redis://127.0.0.1:1/0", on_storage_error="deny"), registry=CollectorRegistry()
    )
    inner = FastAPI()

    @app.post("/items/{number}")
    @inner.post("/items/{number}")
    async def write(number: int, request: Request):
        return len(await request.body())

    @app.post("/large", max_body_size=20)
    async def large(request: Request):
        return len(await request.body())

    @app.get("/slow")
    async def slow():
        await asyncio.sleep(30)

    @app.get("/slower", dependencies=[Depends(Timeout(0.05))])
    async def slower():
        await asyncio.sleep(30)

    @app.get("/limited", dependencies=[Depends(RateLimit("1/hour", key=lambda _: "all", cost=2, name="heavy"))])
    def limited(): ...

    @app.get("/uncounted")
    async def uncounted():
        await store.hit([Limit("default", 1, 60)], "a")

    @app.get("/database")
    async def database(session: SessionDep):
        await session.connection()

    @app.get("/status/{status}")
    def status(status: int):
        return Response(status_code=status)

    @app.get("/raised/{status}")
    def raised(status: int):
        raise HTTPException(status)

    @app.get("/broken")
    async def broken():
        raise RuntimeError

    @app.get("/recovered/{status}")
    def recovered(status: int):
        _context.refuse(Reason("rate_limited", "a limit that was passed by"))
        return Response(status_code=status)

    @app.websocket("/rooms/{room}")
    async def room(websocket: WebSocket):
        raise WebSocketException(1008, "no such room")

    @app.websocket("/closed/{code}")
    async def closed(websocket: WebSocket, code: int, reason: str | None = None):
        await websocket.close(code, reason)

    @app.websocket("/answered/{status}")
    async def answered(websocket: WebSocket, status: int):
        raise HTTPException(status, websocket.query_params.get("detail"))

    @app.websocket("/open/{status}")
    async def opened(websocket: WebSocket, status: int):
        await websocket.accept()
        _context.refuse(Reason("rate_limited", "too many messages"))
        raise HTTPException(status)

    @app.websocket("/denied/{status}")
    async def denied(websocket: WebSocket, status: int):
        await websocket.send_denial_response(Response(status_code=status))

    app.mount("/sub", inner)
    app.mount("/tenants/{tenant}", inner)
    app.mount("/files", PlainTextResponse("a file"))
    return app


BODY = "body larger than LIMITS_MAX_BODY_SIZE=10; max_body_size= on the route"
LARGE = "body larger than max_body_size=20"
ORIGIN = "Origin: 'https://evil.example' is not one of CORS_ORIGINS"
HOST = "Host: 'evil.example' is not one of HOSTS_ALLOWED"
TIMEOUT = "no response within LIMITS_REQUEST_TIMEOUT=0.5 seconds; Timeout() on the route"
UNAVAILABLE = "the database is unavailable: CannotConnectError ConnectionRefusedError"

FOREIGN = {"Origin": "https://evil.example"}
PREFLIGHT = {**FOREIGN, "Access-Control-Request-Method": "POST"}
ELSEWHERE = {"Host": "evil.example"}


@pytest.fixture(scope="module")
def refuser():
    """A client of that app."""
    with TestClient(refusing(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def records():
    """The records of the access log, at any level of the root logger."""
    handler, logger = Handler(), logging.getLogger("fastapi_prodkit.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("request_line", "options", "status", "route", "reason"),
    [
        ("POST /items/1", {"content": b"x" * 11}, 413, "/items/{number}", BODY),
        ("POST /items/1", {"content": [b"x" * 6] * 2}, 413, "/items/{number}", BODY),
        ("POST /sub/items/1", {"content": b"x" * 31}, 413, "/sub/items/{number}", LARGE),
        ("POST /large", {"content": [b"x" * 11] * 2}, 413, "/large", LARGE),
        ("GET /items/1", {"headers": ELSEWHERE}, 400, "/items/{number}", HOST),
        ("GET /sub/items/1", {"headers": ELSEWHERE}, 400, "/sub/items/{number}", HOST),
        ("GET /tenants/7/items/1", {"headers": ELSEWHERE}, 400, "_unmatched", HOST),
        ("GET /files/x", {"headers": ELSEWHERE}, 400, "_unmatched", HOST),
        ("GET /nowhere", {"headers": ELSEWHERE}, 400, "_unmatched", HOST),
        ("OPTIONS /items/1", {"headers": PREFLIGHT}, 403, "/items/{number}", ORIGIN),
        ("GET /slow", {}, 504, "/slow", TIMEOUT),
        ("GET /slower", {}, 504, "/slower", "no response within Timeout(0.05), in seconds, of the route"),
        ("GET /limited", {}, 429, "/limited", "over the limit heavy (1 in 3600 s)"),
        ("GET /uncounted", {}, 503, "/uncounted", "the store fails; RATE_LIMIT_ON_STORAGE_ERROR=deny"),
        ("GET /database", {}, 503, "/database", UNAVAILABLE),
    ],
)
def test_refusal_is_a_warning_with_its_reason(refuser, records, request_line, options, status, route, reason):
    """The line has the route, even for a refusal before routing."""
    method, path = request_line.split()

    response = refuser.request(method, path, **options)

    [record] = records
    assert response.status_code == record.http_status == status
    assert (record.http_route, record.levelname, record.reason) == (route, "WARNING", reason)


@pytest.mark.parametrize(
    ("path", "level"),
    [
        *((f"/status/{status}", "WARNING") for status in (408, 413, 429, 431, 503, 504)),
        *((f"/raised/{status}", "WARNING") for status in (429, 503)),
        *((f"/status/{status}", "ERROR") for status in (500, 502)),
        ("/raised/500", "ERROR"),
        ("/broken", "WARNING"),
        *((f"/status/{status}", "INFO") for status in (204, 401, 409)),
        *((f"/recovered/{status}", "INFO") for status in (204, 404)),
        ("/recovered/500", "ERROR"),
    ],
)
def test_level_depends_on_the_status_of_the_app(refuser, records, path, level):
    """A 5xx is ERROR, unless an exception with its own record caused it."""
    refuser.get(path)

    [record] = records
    assert (record.levelname, hasattr(record, "reason")) == (level, False)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [(FOREIGN, ORIGIN), (ELSEWHERE, HOST), ({}, "the app has closed it: no such room")],
)
def test_refused_websocket_has_its_reason(refuser, records, headers, reason):
    """By a layer, or by the app before it was open."""
    refused = (WebSocketDenialResponse, WebSocketDisconnect)

    with pytest.raises(refused), refuser.websocket_connect("/rooms/7", headers=headers):
        ...

    [record] = records
    assert (record.http_route, record.levelname, record.reason) == ("/rooms/{room}", "WARNING", reason)


@pytest.mark.parametrize(
    ("path", "route", "status", "level", "reason"),
    [
        ("/closed/1000", "/closed/{code}", 403, "WARNING", "the app has closed it: 1000, before it was open"),
        ("/closed/4001", "/closed/{code}", 403, "WARNING", "the app has closed it: 4001, before it was open"),
        ("/closed/1013?reason=full", "/closed/{code}", 403, "WARNING", "the app has closed it: full"),
        ("/closed/x", "/closed/{code}", 403, "WARNING", "the app has closed it: The request is not valid."),
        ("/nowhere", "_unmatched", 403, "WARNING", "the app has closed it: 1000, before it was open"),
        ("/answered/403", "/answered/{status}", 403, "WARNING", "the app has answered it with 403: Forbidden"),
        (
            "/answered/404?detail=a%0A%20b",
            "/answered/{status}",
            404,
            "WARNING",
            "the app has answered it with 404: a b",
        ),
        (
            "/answered/503",
            "/answered/{status}",
            503,
            "WARNING",
            "the app has answered it with 503: Service Unavailable",
        ),
        ("/answered/500", "/answered/{status}", 500, "ERROR", None),
        ("/denied/401", "/denied/{status}", 401, "WARNING", "the app has answered it with 401"),
        ("/denied/502", "/denied/{status}", 502, "ERROR", None),
    ],
)
def test_handshake_refused_by_the_app_has_its_reason(refuser, records, path, route, status, level, reason):
    """A server error is not a refusal."""
    refused = (WebSocketDenialResponse, WebSocketDisconnect)

    with pytest.raises(refused), refuser.websocket_connect(path):
        ...

    [record] = records
    assert (record.http_route, record.http_status, record.levelname) == (route, status, level)
    assert getattr(record, "reason", None) == reason


@pytest.mark.parametrize(
    ("path", "level", "reason"), [("/open/429", "WARNING", "too many messages"), ("/open/500", "INFO", None)]
)
def test_refusal_of_an_open_websocket_has_its_reason(refuser, records, path, level, reason):
    """If the code with which the app closes it says that the client is refused; the status stays 101."""
    with refuser.websocket_connect(path) as websocket, pytest.raises(WebSocketDisconnect):
        websocket.receive_text()

    [record] = records
    assert (record.http_status, record.levelname, getattr(record, "reason", None)) == (101, level, reason)


def test_reason_of_a_handshake_is_truncated(refuser, records):
    """The text of an app may repeat what the client has sent."""
    with pytest.raises(WebSocketDenialResponse), refuser.websocket_connect(f"/answered/403?detail={'x' * 1000}"):
        ...

    assert len(records[0].reason) == 200


def test_refusals_are_counted_by_code():
    """WebSockets too; requests that were served in the end are not counted."""
    with TestClient(refusing(), raise_server_exceptions=False) as client:
        for path in ("/status/503", "/status/503", "/status/500", "/recovered", "/limited"):
            client.get(path)
        client.post("/items/1", content=b"x" * 11)
        refused = (WebSocketDenialResponse, WebSocketDisconnect)
        for path, headers in [
            ("/rooms/7", FOREIGN),
            ("/closed/1000", {}),
            ("/answered/403", {}),
            ("/answered/429", {}),
        ]:
            with pytest.raises(refused), client.websocket_connect(path, headers=headers):
                ...
        with client.websocket_connect("/open/429"):
            ...
        shown = client.get("/metrics").text

    found = re.findall(r'http_server_refusals_total\{reason="(\w+)"\} (\d)', shown)
    expected = {"unavailable": "2", "rate_limited": "3", "body_too_large": "1"}
    assert dict(found) == {**expected, "origin_not_allowed": "1", "websocket_refused": "2"}
