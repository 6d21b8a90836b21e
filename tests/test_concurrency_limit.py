"""The concurrency limit: never more requests at a time than allowed, and every slot is released."""

import asyncio
import json
import time

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import LimitsSettings

SERVED = "1 requests are being served (LIMITS_MAX_CONCURRENT)"
WITHIN = 10  # seconds; on an idle machine it happens at once


@pytest.fixture
def registry():
    return CollectorRegistry()


class Service:
    """An app behind the limit, whose requests run until the test ends them."""

    def __init__(self, registry, *, most=1, patience=30.0, **options):
        self.inside = []
        self.bodies = []
        self.gate = asyncio.Event()
        limits = {"max_concurrent": most, "queue_timeout": patience}
        self.app = ConcurrencyLimitMiddleware(self.serve, registry=registry, **limits, **options)
        self.calls = []

    async def serve(self, scope, receive, send):
        self.inside.append(scope["path"])
        try:
            await self.gate.wait()
            if scope["path"] == "/fails":
                raise RuntimeError
            self.bodies.append((await receive()).get("body"))
            await PlainTextResponse("ok")(scope, receive, send)
        finally:
            self.inside.remove(scope["path"])

    def call(self, path="/", messages=None):
        """Start a request, and return it."""
        call = Call(self.app, path, messages or [{"type": "http.request", "body": b"", "more_body": False}])
        self.calls.append(call)
        return call

    async def end(self):
        """End all requests, and wait for them."""
        self.gate.set()
        await asyncio.wait([call.task for call in self.calls], timeout=WITHIN)
        return [call.status for call in self.calls]


class Call:
    """One request, whose client can disconnect."""

    def __init__(self, app, path, messages):
        self.sent = []
        self.messages = list(messages)
        self.more = asyncio.Event()
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "headers": []}
        self.task = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self):
        while not self.messages:
            self.more.clear()
            await self.more.wait()
        return self.messages.pop(0)

    async def send(self, message):
        self.sent.append(message)

    def says(self, message):
        self.messages.append(message)
        self.more.set()

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None


async def until(true):
    deadline = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def queued(registry):
    return registry.get_sample_value("http_server_queued_requests")


def refused(registry, reason):
    return registry.get_sample_value("http_server_shed_requests_total", {"reason": reason})


async def test_limit_serves_queues_and_refuses(registry):
    """As many requests as allowed are served; as many wait; the next is a 503 problem."""
    service = Service(registry, most=2)
    calls = [service.call(f"/{number}") for number in range(5)]
    await until(calls[4].task.done)

    inside, waiting = list(service.inside), queued(registry)
    statuses = await service.end()

    assert (inside, waiting) == (["/0", "/1"], 2)
    assert statuses == [200, 200, 200, 200, 503]
    assert dict(calls[4].sent[0]["headers"])[b"retry-after"] == b"30"
    assert dict(calls[4].sent[0]["headers"])[b"content-type"] == b"application/problem+json"
    assert (queued(registry), refused(registry, "queue_full")) == (0, 1)


async def test_queue_is_first_come_first_served(registry):
    """Waiting requests are served in the order in which they arrived."""
    served = []

    async def app(scope, receive, send):
        served.append(scope["path"])
        await asyncio.sleep(0)

    limit = ConcurrencyLimitMiddleware(app, LimitsSettings(max_concurrent=5, queue_timeout=30), registry=registry)
    calls = [Call(limit, str(number), [{"type": "http.request"}]) for number in range(10)]
    await asyncio.wait([call.task for call in calls], timeout=WITHIN)

    assert served == [str(number) for number in range(10)]


async def test_wait_longer_than_queue_timeout_is_refused(registry):
    """The request leaves the queue."""
    service = Service(registry, patience=0.05)
    service.call()
    late = service.call()
    await until(late.task.done)

    statuses = [*await service.end(), await status_of(service)]

    assert statuses == [200, 503, 200]
    assert dict(late.sent[0]["headers"])[b"retry-after"] == b"1"
    assert refused(registry, "queue_timeout") == 1


async def test_queue_timeout_none_refuses_at_once(registry):
    """With `queue_timeout=None`, a request above the limit gets a 503 with Retry-After without waiting."""
    service = Service(registry, patience=None)
    service.call()
    second = service.call()
    await until(second.task.done)

    assert await service.end() == [200, 503]
    assert dict(second.sent[0]["headers"])[b"retry-after"] == b"1"


@pytest.mark.parametrize(
    ("patience", "reason"),
    [
        (None, SERVED),
        (0.01, f"{SERVED}, for more than 0.01 s (LIMITS_QUEUE_TIMEOUT)"),
    ],
)
async def test_refusal_is_logged_with_the_setting(registry, caplog, patience, reason):
    """The access line of a refused request is a WARNING whose reason names the settings that caused it."""
    service = Service(registry, patience=patience)
    service.app = AccessLogMiddleware(service.app)
    service.call()
    second = service.call()
    await until(second.task.done)

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert (record.levelname, record.http_status, record.reason) == ("WARNING", 503, reason)
    await service.end()


async def test_full_queue_is_another_reason_than_a_long_wait(registry, caplog):
    """The logged reason for a full queue differs from the reason for a wait that exceeded its time-out."""
    service = Service(registry)
    service.app = AccessLogMiddleware(service.app)
    calls = [service.call() for _ in range(3)]
    await until(calls[-1].task.done)

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert record.reason == f"{SERVED}, and as many wait"
    await service.end()


async def status_of(service):
    """Return the status of one more request: 200 if a slot is free."""
    call = service.call()
    await asyncio.wait([call.task], timeout=WITHIN)
    return call.status


async def test_disconnect_in_the_queue_never_reaches_the_app(registry):
    """A client that disconnects while it waits leaves the queue, and the app is not called."""
    service = Service(registry)
    service.call("/first")
    await until(lambda: service.inside)
    second = service.call("/second")
    await until(lambda: queued(registry) == 1)

    second.says({"type": "http.disconnect"})
    await until(second.task.done)
    third = service.call("/third")
    await until(lambda: queued(registry) == 1)

    assert await service.end() == [200, None, 200]
    assert third.status == 200
    assert service.inside == []


async def test_cancelled_request_leaves_the_queue(registry):
    """A request that is cancelled while it waits leaves the queue, and later requests are served."""
    service = Service(registry)
    service.call()
    second = service.call()
    await until(lambda: queued(registry) == 1)

    second.task.cancel()
    await asyncio.wait([second.task], timeout=WITHIN)

    assert second.task.cancelled()
    assert queued(registry) == 0
    assert await service.end() == [200, None]
    assert await status_of(service) == 200


@pytest.mark.parametrize("leave", [True, False])
async def test_slot_given_to_a_leaving_request_is_passed_on(registry, leave):
    """It disconnects or is cancelled at the same moment."""
    service = Service(registry, most=2)
    inside = [service.call("/fails"), service.call()]
    await until(lambda: len(service.inside) == 2)
    waiting = [service.call(), service.call()]
    await until(lambda: queued(registry) == 2)

    service.gate.set()
    for call in [*inside, *waiting]:
        if leave:
            call.says({"type": "http.disconnect"})
        else:
            call.task.cancel()
    await asyncio.wait([call.task for call in service.calls], timeout=WITHIN)

    assert [await status_of(service) for _ in range(3)] == [200, 200, 200]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_failed_or_cancelled_request_releases_its_slot(registry, cancelled):
    """When a running request fails or is cancelled, its slot goes to the next waiting request."""
    service = Service(registry)
    first = service.call("/fails")
    await until(lambda: service.inside)
    second = service.call()
    await until(lambda: queued(registry) == 1)

    if cancelled:
        first.task.cancel()
        await until(lambda: service.inside == ["/"])
    await service.end()

    assert first.task.cancelled() or isinstance(first.task.exception(), RuntimeError)
    assert second.status == 200
    assert await status_of(service) == 200


async def test_body_sent_while_waiting_reaches_the_app(registry):
    """In order; of a body in parts at most one part is kept."""
    service = Service(registry)
    service.call()
    parts = [{"type": "http.request", "body": body, "more_body": body != b"c"} for body in (b"a", b"b", b"c")]
    waiting = service.call(messages=parts)
    await until(lambda: len(waiting.messages) == 2)

    await service.end()

    assert service.bodies == [b"", b"a"]
    assert waiting.messages == parts[1:]


async def test_error_of_receive_fails_the_request_and_frees_the_queue(registry):
    """If `receive` raises while a request waits, that request fails and its place in the queue is freed."""

    async def fail():
        raise OSError("gone")

    service = Service(registry)
    first = service.call()
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/", "headers": []}
    broken = asyncio.create_task(service.app(scope, fail, first.send))
    await until(lambda: queued(registry) == 1)
    await service.end()

    with pytest.raises(OSError, match="gone"):
        await broken
    assert await status_of(service) == 200


async def test_exempt_path_neither_counts_nor_waits(registry):
    """An exempt path is served at once while all slots are taken, and takes no slot itself."""
    service = Service(registry, exempt={"/health"})
    service.call()
    await until(lambda: service.inside)
    service.call("/health")

    await until(lambda: service.inside == ["/", "/health"])

    assert queued(registry) == 0
    assert await service.end() == [200, 200]


def test_slot_is_held_until_stream_and_background_task_end(registry):
    """A request holds its slot until its stream has ended and its background task is done."""
    app, seen = FastAPI(), []
    limit = ConcurrencyLimitMiddleware(app, LimitsSettings(max_concurrent=3, queue_timeout=None), registry=registry)

    @app.get("/stream")
    async def stream():
        async def lines():
            seen.append(limit._active)  # no client can see it
            yield b"x"
            seen.append(limit._active)

        return StreamingResponse(lines(), background=BackgroundTask(lambda: seen.append(limit._active)))

    assert TestClient(limit).get("/stream").text == "x"
    assert (seen, limit._active) == ([1, 1, 1], 0)


def test_websocket_neither_counts_nor_waits(registry):
    """Open WebSockets take no slot, and connect even if the limit is one request."""
    app = FastAPI()
    app.add_middleware(
        ConcurrencyLimitMiddleware, LimitsSettings(max_concurrent=1, queue_timeout=None), registry=registry
    )

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    @app.get("/")
    async def hello():
        return {}

    client = TestClient(app)
    with client.websocket_connect("/ws") as first, client.websocket_connect("/ws") as second:
        statuses = [client.get("/").status_code for _ in range(2)]
        for session in (first, second):
            session.send_text("hello")
            assert session.receive_text() == "hello"

    assert statuses == [200, 200]


def test_middleware_without_max_concurrent_fails_at_construction():
    """Without `max_concurrent`, which has no default, the middleware raises ConfigurationError."""
    with pytest.raises(ConfigurationError, match="LIMITS_MAX_CONCURRENT"):
        ConcurrencyLimitMiddleware(FastAPI())


def test_two_apps_count_separately(registry):
    """Their refusals are added up."""
    apps = [
        ConcurrencyLimitMiddleware(PlainTextResponse("ok"), LimitsSettings(max_concurrent=1), registry=registry)
        for _ in range(2)
    ]

    assert [TestClient(app).get("/").status_code for app in apps] == [200, 200]


def test_real_server_frees_the_queue_of_disconnected_clients(registry):
    """On a real server, clients that disconnect leave the queue, and the others are served in order."""
    app = FastAPI()
    entered, served = [], asyncio.Event()

    @app.get("/{name}")
    async def hold(name: str, request: Request):
        entered.append(name)
        if name == "first":
            await served.wait()
        if name == "release":
            served.set()

    app.add_middleware(
        ConcurrencyLimitMiddleware,
        LimitsSettings(max_concurrent=1, queue_timeout=WITHIN),
        exempt={"/release"},
        registry=registry,
    )
    with serving(app) as port, connection(port) as first, connection(port) as third, connection(port) as free:
        first.sendall(request("GET", "/first"))
        wait_for(lambda: entered == ["first"])
        with connection(port) as second:
            second.sendall(request("GET", "/second"))
            wait_for(lambda: queued(registry) == 1)
        wait_for(lambda: queued(registry) == 0)
        third.sendall(request("GET", "/third"))
        wait_for(lambda: queued(registry) == 1)
        free.sendall(request("GET", "/release"))
        answers = [read_response(client).split()[1] for client in (free, first, third)]
        third.sendall(request("GET", "/again"))
        answers.append(read_response(third).split()[1])

    assert answers == [b"200"] * 4
    assert entered == ["first", "release", "third", "again"]


def wait_for(true):
    deadline = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_disconnect_in_the_queue_is_status_499(capsys):
    """Probes are served while others wait."""
    app = create_app(Settings(environment="prod", hosts={"allowed": "testserver"}, limits={"max_concurrent": 1}))
    entered, served = [], asyncio.Event()

    @app.get("/hold")
    async def hold():
        entered.append(asyncio.get_running_loop())
        await served.wait()

    with serving(app) as port, connection(port) as first, connection(port) as probe:
        first.sendall(request("GET", "/hold"))
        wait_for(lambda: entered)
        with connection(port) as second:
            second.sendall(request("GET", "/hold?second"))
            wait_for(lambda: queued(REGISTRY) == 1)
        wait_for(lambda: queued(REGISTRY) == 0)
        probe.sendall(request("GET", "/health"))
        health = read_response(probe)
        probe.sendall(request("GET", "/hold"))
        refusal = read_response(probe)
        entered[0].call_soon_threadsafe(served.set)
        read_response(first)

    statuses = [json.loads(line).get("http_status") for line in capsys.readouterr().out.splitlines()]
    assert health.split()[1] == b"200"
    assert refusal.split()[1] == b"503"
    assert b"retry-after: 1" in refusal.lower()
    assert len(entered) == 1
    assert [status for status in statuses if status in (499, 503)] == [499, 503]


def test_app_without_the_limit_has_no_layer():
    """Without LIMITS_MAX_CONCURRENT, the app has no ConcurrencyLimitMiddleware."""
    app = create_app(Settings(environment="test"))
    TestClient(app).get("/")

    assert "ConcurrencyLimitMiddleware" not in [type(layer).__name__ for layer in app.middleware_stack.layers]


def test_variables_accept_none():
    """The value `none` switches off each of the five limits."""
    names = ("max_body_size", "body_timeout", "request_timeout", "max_concurrent", "queue_timeout")

    settings = LimitsSettings.model_validate(dict.fromkeys(names, "none"))

    assert [getattr(settings, name) for name in names] == [None] * 5
