"""The concurrency limit: never more at a time than allowed, and every place is given back, whatever happens."""

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
WITHIN = 10  # seconds, for what happens at once on a machine that is not busy


@pytest.fixture
def registry():
    return CollectorRegistry()


class Service:
    """An app whose requests stay inside until they are let go, in front of it the limit."""

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
        """Let every request go, and wait until they are over."""
        self.gate.set()
        await asyncio.wait([call.task for call in self.calls], timeout=WITHIN)
        return [call.status for call in self.calls]


class Call:
    """One request, whose client can leave."""

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


async def test_the_limit(registry):
    """As many as allowed are inside; as many wait; the next one is refused at once, as a problem."""
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


async def test_first_come_first_served(registry):
    """Places are handed on in the order in which requests came."""
    served = []

    async def app(scope, receive, send):
        served.append(scope["path"])
        await asyncio.sleep(0)

    limit = ConcurrencyLimitMiddleware(app, LimitsSettings(max_concurrent=5, queue_timeout=30), registry=registry)
    calls = [Call(limit, str(number), [{"type": "http.request"}]) for number in range(10)]
    await asyncio.wait([call.task for call in calls], timeout=WITHIN)

    assert served == [str(number) for number in range(10)]


async def test_waiting_ends(registry):
    """Who has waited for `queue_timeout` in vain is refused, and no longer in line."""
    service = Service(registry, patience=0.05)
    service.call()
    late = service.call()
    await until(late.task.done)

    statuses = [*await service.end(), await status_of(service)]

    assert statuses == [200, 503, 200]
    assert dict(late.sent[0]["headers"])[b"retry-after"] == b"1"
    assert refused(registry, "queue_timeout") == 1


async def test_no_waiting(registry):
    """With `queue_timeout` none, what is too much is refused at once."""
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
async def test_a_refusal_says_why(registry, caplog, patience, reason):
    """The line of the log names the setting."""
    service = Service(registry, patience=patience)
    service.app = AccessLogMiddleware(service.app)
    service.call()
    second = service.call()
    await until(second.task.done)

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert (record.levelname, record.http_status, record.reason) == ("WARNING", 503, reason)
    await service.end()


async def test_a_full_queue_says_so(registry, caplog):
    """It is another reason than a wait that was too long."""
    service = Service(registry)
    service.app = AccessLogMiddleware(service.app)
    calls = [service.call() for _ in range(3)]
    await until(calls[-1].task.done)

    [record] = [each for each in caplog.records if each.name == "fastapi_prodkit.access"]
    assert record.reason == f"{SERVED}, and as many wait"
    await service.end()


async def status_of(service):
    """The status of one more request: whether places have come back."""
    call = service.call()
    await asyncio.wait([call.task], timeout=WITHIN)
    return call.status


async def test_a_client_that_leaves_the_line(registry):
    """A client that leaves while it waits gives up its place in line, and the app never hears of it."""
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


async def test_a_cancelled_request_leaves_the_line(registry):
    """A request that is cancelled while it waits gives up its place in line."""
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
async def test_who_leaves_as_the_place_comes_hands_it_on(registry, leave):
    """A place that comes in the same moment in which its client leaves, or is cancelled, goes to the next one."""
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
async def test_the_place_comes_back(registry, cancelled):
    """A request inside that fails or is cancelled gives its place to the one that waits."""
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


async def test_the_body_arrives_whole(registry):
    """What a waiting client sends is the app's, in order; of a body in parts no more than one is kept meanwhile."""
    service = Service(registry)
    service.call()
    parts = [{"type": "http.request", "body": body, "more_body": body != b"c"} for body in (b"a", b"b", b"c")]
    waiting = service.call(messages=parts)
    await until(lambda: len(waiting.messages) == 2)

    await service.end()

    assert service.bodies == [b"", b"a"]
    assert waiting.messages == parts[1:]


async def test_an_error_of_the_server(registry):
    """A server that fails to tell of the client fails the request, and its place in line is free."""

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


async def test_exempt_paths(registry):
    """A probe neither counts nor waits."""
    service = Service(registry, exempt={"/health"})
    service.call()
    await until(lambda: service.inside)
    service.call("/health")

    await until(lambda: service.inside == ["/", "/health"])

    assert queued(registry) == 0
    assert await service.end() == [200, 200]


def test_streams_and_background_tasks_count(registry):
    """A place is taken until the stream has ended, and the background task is done."""
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


def test_websockets_do_not_count(registry):
    """An open WebSocket takes no place, and none has to wait for one."""
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


def test_it_has_no_default():
    """How much a service can do at a time nobody knows but its owner."""
    with pytest.raises(ConfigurationError, match="LIMITS_MAX_CONCURRENT"):
        ConcurrencyLimitMiddleware(FastAPI())


def test_two_apps_in_one_process(registry):
    """Two apps count apart, and their refusals add up."""
    apps = [
        ConcurrencyLimitMiddleware(PlainTextResponse("ok"), LimitsSettings(max_concurrent=1), registry=registry)
        for _ in range(2)
    ]

    assert [TestClient(app).get("/").status_code for app in apps] == [200, 200]


def test_on_the_wire(registry):
    """Under a real server waiting clients that hang up give their place up, and the others are served in order."""
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


def test_in_the_whole_app(capsys):
    """A client that leaves the line is a 499 in the access log; probes are served while others wait."""
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


def test_left_out_without_a_limit():
    """Without LIMITS_MAX_CONCURRENT there is no layer that could cost anything."""
    app = create_app(Settings(environment="test"))
    TestClient(app).get("/")

    assert "ConcurrencyLimitMiddleware" not in [type(layer).__name__ for layer in app.middleware_stack.layers]


def test_none_is_a_value():
    """Each of the limits can be switched off by its variable."""
    names = ("max_body_size", "body_timeout", "request_timeout", "max_concurrent", "queue_timeout")

    settings = LimitsSettings.model_validate(dict.fromkeys(names, "none"))

    assert [getattr(settings, name) for name in names] == [None] * 5
