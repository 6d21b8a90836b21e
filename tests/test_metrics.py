"""Metrics: every request is measured, clients add no series, and access is restricted."""

import asyncio
import hmac
import math
import threading

import httpx2 as httpx
import pytest
from anyio import to_thread
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from outcomes import items, outcomes
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_prodkit._pipeline import exchange
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.metrics import BUCKETS, MetricsMiddleware, metrics_router
from fastapi_prodkit.sections import MetricsSettings

DURATION = "http_server_request_duration_seconds"
ACTIVE = "http_server_active_requests"


@pytest.fixture
def registry():
    return CollectorRegistry()


def series(registry):
    """Return the number of requests of each series."""
    return {
        (
            sample.labels["http_request_method"],
            sample.labels["http_route"],
            sample.labels["http_response_status_code"],
        ): (int(sample.value))
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"{DURATION}_count"
    }


def active(registry):
    return registry.get_sample_value(ACTIVE)


async def hello():
    return {}


async def fail():
    raise RuntimeError


def service(registry, **options) -> FastAPI:
    router = outcomes()
    router.get("/broken")(fail)
    inner = FastAPI()
    inner.include_router(items())
    outer = APIRouter()
    outer.include_router(router, prefix="/v1")
    app = FastAPI(max_body_size=10)
    app.include_router(router)
    app.include_router(outer, prefix="/api")
    app.include_router(router, prefix="/again")
    app.mount("/sub", inner)
    app.mount("/tenants/{tenant}", inner)
    app.add_middleware(MetricsMiddleware, registry=registry, **options)
    return app


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/ok/1", "/ok/{number}", 200),
        ("GET", "/sync/1", "/sync/{number}", 200),
        ("GET", "/api/v1/ok/1", "/api/v1/ok/{number}", 200),
        ("GET", "/again/ok/1", "/again/ok/{number}", 200),
        ("GET", "/sub/items/1", "/sub/items/{number}", 200),
        ("GET", "/tenants/acme/items/1", "_unmatched", 200),
        ("GET", "/empty", "/empty", 204),
        ("GET", "/unchanged", "/unchanged", 304),
        ("GET", "/elsewhere", "/elsewhere", 307),
        ("GET", "/ok/1/", "_unmatched", 307),
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
        ("GET", "/broken", "/broken", 500),
        ("GET", "/stream", "/stream", 200),
        ("GET", "/background", "/background", 200),
    ],
)
def test_requests_are_counted_by_method_template_and_status(method, path, route, status, registry):
    """Of every outcome."""
    client = TestClient(service(registry), raise_server_exceptions=False, follow_redirects=False)
    content = {"number": "more than ten bytes"} if status == 413 else None

    response = client.request(method, path, json=content)

    assert response.status_code == status
    assert series(registry) == {(method, route, str(status)): 1}
    assert active(registry) == 0


def test_clients_add_no_series(registry):
    """By paths, methods, hosts or parameters."""
    with TestClient(service(registry)) as client:
        for number in range(50):
            client.get(f"/unknown/{number}")
            client.get(f"/ok/{number}")
            client.get(f"/tenants/{number}/items/1")
            client.request(f"METHOD{number}", "/ok/1")
            client.get("/ok/1", headers={"Host": f"host{number}.example.com"})

    assert series(registry) == {
        ("GET", "_unmatched", "404"): 50,
        ("GET", "/ok/{number}", "200"): 100,
        ("GET", "_unmatched", "200"): 50,
        ("_OTHER", "/ok/{number}", "405"): 50,
    }


@pytest.mark.parametrize(
    ("method", "label"), [("PATCH", "PATCH"), ("TRACE", "TRACE"), ("get", "_OTHER"), ("QUERY", "_OTHER")]
)
async def test_unknown_method_is_other(method, label, registry):
    """Known are those of RFC 9110, and PATCH."""
    await Server(method=method).call(MetricsMiddleware(PlainTextResponse("ok"), registry=registry))

    assert series(registry) == {(label, "_unmatched", "200"): 1}


class Server:
    """A fake server; it disconnects after `hang_up_after` messages of the response."""

    def __init__(self, *, method="GET", hang_up_after=None, body=()):
        self.scope = {
            "type": "http",
            "method": method,
            "path": "/",
            "query_string": b"",
            "headers": [],
            "asgi": {"spec_version": "2.4"},
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


async def test_disconnect_during_the_body_is_status_499(registry):
    """Whatever the app answers afterwards."""

    async def app(scope, receive, send):
        try:
            await Request(scope, receive).body()
        finally:
            await PlainTextResponse("cannot read that", 400)(scope, receive, send)

    server = Server(body=[{"type": "http.request", "body": b"half", "more_body": True}])

    with pytest.raises(Exception, match=r"^$"):
        await server.call(MetricsMiddleware(app, registry=registry))

    assert series(registry) == {("GET", "_unmatched", "499"): 1}
    assert active(registry) == 0


async def test_disconnect_during_a_stream_is_status_499(registry):
    """A request whose client disconnects in the middle of a stream is counted with status 499."""
    app = MetricsMiddleware(StreamingResponse(iter([b"a", b"b"])), registry=registry)

    with pytest.raises(Exception, match=r"^$"):
        await Server(hang_up_after=2).call(app)

    assert series(registry) == {("GET", "_unmatched", "499"): 1}
    assert active(registry) == 0


async def test_failed_stream_has_the_sent_status(registry):
    """A stream that raises after its start is counted with the status that the client has already received."""

    async def chunks():
        yield b"a"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await Server().call(MetricsMiddleware(StreamingResponse(chunks()), registry=registry))

    assert series(registry) == {("GET", "_unmatched", "200"): 1}
    assert active(registry) == 0


async def test_active_requests_return_to_zero(registry):
    """However requests end."""
    proceed = asyncio.Event()

    async def app(scope, receive, send):
        await proceed.wait()
        if scope["method"] == "POST":
            raise RuntimeError
        await PlainTextResponse("ok")(scope, receive, send)

    measured = MetricsMiddleware(app, registry=registry)
    before = active(registry)
    tasks = [asyncio.create_task(Server(method=method).call(measured)) for method in ("GET", "POST", "PUT")]
    await asyncio.sleep(0)
    during = active(registry)
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    after_a_cancellation = active(registry)
    proceed.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in results] == [type(None), RuntimeError, asyncio.CancelledError]
    assert (before, during, after_a_cancellation, active(registry)) == (0, 3, 2, 0)
    assert series(registry) == {
        ("GET", "_unmatched", "200"): 1,
        ("POST", "_unmatched", "500"): 1,
        ("PUT", "_unmatched", "499"): 1,
    }


async def test_concurrent_requests_are_all_counted(registry):
    """In threads too."""
    transport = httpx.ASGITransport(app=service(registry))

    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        await asyncio.gather(*[client.get(f"/{kind}/1") for kind in ("ok", "sync") for _ in range(250)])

    assert series(registry) == {("GET", "/ok/{number}", "200"): 250, ("GET", "/sync/{number}", "200"): 250}
    assert active(registry) == 0


async def test_buckets_are_cumulative(registry, monkeypatch):
    """A duration on a bound is in that bucket; the last bucket has all."""
    now = 1000.0
    monkeypatch.setattr(exchange, "perf_counter", lambda: now)
    durations = [0.0, 0.0078125, 0.25, 0.3, 10.0, 11.0]  # those that lie on a bound are exact in binary

    for duration in durations:

        async def app(scope, receive, send, duration=duration):
            nonlocal now
            now += duration
            await PlainTextResponse("ok")(scope, receive, send)

        await Server().call(MetricsMiddleware(app, registry=registry))

    [family] = [family for family in registry.collect() if family.name == DURATION]
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == f"{DURATION}_bucket"}
    assert buckets == {
        **{str(bound): sum(duration <= bound for duration in durations) for bound in BUCKETS},
        "+Inf": len(durations),
    }
    [total] = [sample.value for sample in family.samples if sample.name == f"{DURATION}_sum"]
    assert math.isclose(total, sum(durations))


def test_bucket_bounds_are_those_of_opentelemetry():
    """The bucket bounds of the duration are those of OpenTelemetry's semantic conventions, in seconds."""
    assert BUCKETS == (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


async def test_duration_excludes_background_tasks(registry, monkeypatch):
    """The request is active until they end."""
    now, seen = 1000.0, []
    monkeypatch.setattr(exchange, "perf_counter", lambda: now)

    async def app(scope, receive, send):
        nonlocal now
        await PlainTextResponse("ok")(scope, receive, send)
        seen.append(active(registry))
        now += 60

    await Server().call(MetricsMiddleware(app, registry=registry))

    assert seen == [1]
    assert registry.get_sample_value(f"{DURATION}_sum", labels_of("GET", "_unmatched", "200")) == 0


def labels_of(method, route, status):
    return {"http_request_method": method, "http_route": route, "http_response_status_code": status}


@pytest.mark.parametrize("path", ["/health", "/health/"])
def test_exempt_path_is_not_measured(path, registry):
    """With or without a trailing slash."""
    app = FastAPI(redirect_slashes=False)
    app.add_middleware(MetricsMiddleware, exempt={"/health"}, registry=registry)
    app.get(path)(hello)

    TestClient(app).get(path)
    TestClient(app, root_path="/api").get(f"/api{path}")

    assert series(registry) == {}


def test_websocket_is_not_measured(registry):
    """A WebSocket adds no sample to the request duration and does not count as an active request."""
    app = FastAPI()
    app.add_middleware(MetricsMiddleware, registry=registry)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        assert active(registry) == 0
        await websocket.close()

    with TestClient(app).websocket_connect("/ws"):
        pass

    assert series(registry) == {}


async def test_lifespan_messages_pass_unchanged(registry):
    """The metrics middleware passes the scope, receive and send of a lifespan to the app unchanged."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    await MetricsMiddleware(app, registry=registry)({"type": "lifespan"}, 1, 2)

    assert seen == [({"type": "lifespan"}, 1, 2)]


async def ok(request):
    return PlainTextResponse("ok")


def plain_app(registry, path="/a"):
    return Starlette(routes=[Route(path, ok)], middleware=[Middleware(MetricsMiddleware, registry=registry)])


def test_two_registries_are_separate(registry):
    """Two apps with a registry each count only their own requests."""
    other = CollectorRegistry()

    TestClient(plain_app(registry, "/a")).get("/a")
    TestClient(plain_app(other, "/b")).get("/b")

    assert series(registry) == {("GET", "/a", "200"): 1}
    assert series(other) == {("GET", "/b", "200"): 1}


def test_two_apps_with_one_registry_are_summed(registry):
    """Two apps that share a registry add to one metric, which is registered only once."""
    first, second = TestClient(plain_app(registry)), TestClient(plain_app(registry))

    first.get("/a")
    second.get("/a")

    assert series(registry) == {("GET", "/a", "200"): 2}


def client_of(registry, **settings):
    app = FastAPI()
    add_problem_handlers(app)
    app.add_middleware(MetricsMiddleware, exempt={"/metrics"}, registry=registry)
    app.include_router(metrics_router(MetricsSettings(**settings), registry=registry))
    app.get('/quoted"\\')(hello)
    client = TestClient(app)
    client.get('/quoted"\\')
    return client


def test_metrics_are_valid_text(registry):
    """By Prometheus's own parser."""
    Counter("orders", "Orders of an app.", registry=registry).inc()

    response = client_of(registry, public=True).get("/metrics")

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in parse_text(response.text)}
    assert (families[DURATION].type, families[ACTIVE].type, families["orders"].type) == (
        "histogram",
        "gauge",
        "counter",
    )
    [count] = [sample for sample in families[DURATION].samples if sample.name == f"{DURATION}_count"]
    assert (count.labels, count.value) == (labels_of("GET", '/quoted"\\', "200"), 1)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        "application/openmetrics-text;version=1.0.0",
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    ],
)
def test_metrics_are_valid_openmetrics(accept, registry):
    """By the parser of OpenMetrics."""
    response = client_of(registry, public=True).get("/metrics", headers={"Accept": accept})

    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    families = {family.name: family for family in parse_openmetrics(response.text)}
    assert (families[DURATION].type, families[ACTIVE].type) == ("histogram", "gauge")


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/html", "application/openmetrics-text;version=oops", "text/plain;version=\xfc", ";;=,,"]
)
def test_other_accept_headers_get_text(accept, registry):
    """`/metrics` uses the text format if the Accept header is invalid or does not request OpenMetrics."""
    response = client_of(registry, public=True).get("/metrics", headers={"Accept": accept.encode("latin-1")})

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_metrics_before_the_first_request_are_valid(registry):
    """The metrics of an app without requests are valid OpenMetrics with no duration sample."""
    app = FastAPI()
    app.add_middleware(MetricsMiddleware, exempt={"/metrics"}, registry=registry)
    app.include_router(metrics_router(MetricsSettings(public=True), registry=registry))

    response = TestClient(app).get("/metrics", headers={"Accept": "application/openmetrics-text"})

    families = {family.name: [sample.value for sample in family.samples] for family in parse_openmetrics(response.text)}
    assert families == {DURATION: [], ACTIVE: [0]}


def test_failing_collector_is_logged_once(registry, caplog):
    """Other metrics are shown."""
    Gauge("broken", "Broken.", registry=registry).set_function(lambda: 1 / 0)
    Gauge("whole", "Whole.", registry=registry).set(1)
    app = FastAPI()
    app.include_router(metrics_router(MetricsSettings(public=True), registry=registry))

    shown = [TestClient(app).get("/metrics") for _ in range(2)]

    assert [each.status_code for each in shown] == [200, 200]
    assert "whole 1.0" in shown[1].text
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_path_without_a_token_is_a_404(registry):
    """Unless a token is configured, `/metrics` answers like an unknown path, also to an empty bearer token."""
    client = client_of(registry)

    responses = [client.get("/metrics"), client.get("/metrics", headers={"Authorization": "Bearer "})]

    for response in responses:
        assert response.status_code == 404
        assert response.json() == client.get("/nothing").json() | {"instance": "/metrics"}
        assert "www-authenticate" not in response.headers


@pytest.mark.parametrize("authorization", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "])
def test_token_opens_the_path(authorization, registry):
    """Case of the scheme and spaces do not matter."""
    client = client_of(registry, token="s3cret")

    assert client.get("/metrics", headers={"Authorization": authorization}).status_code == 200


def test_request_without_credentials_is_a_401(registry):
    """Without an error code (RFC 6750, section 3.1)."""
    response = client_of(registry, token="s3cret").get("/metrics")

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "authorization",
    [
        b"Bearer wrong",
        b"Bearer",
        b"Bearer ",
        b"",
        b"s3cret",
        b"Basic s3cret",
        b"Bearer s3cret2",
        b"Bearer S3CRET",
        b"Bearer \xff\xfe",
    ],
)
def test_wrong_token_is_a_401(authorization, registry):
    """A malformed or wrong Authorization header gets a challenge with `invalid_token`, never the token itself."""
    response = client_of(registry, token="s3cret").get("/metrics", headers={"Authorization": authorization})

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert "s3cret" not in response.text


def test_token_may_have_any_characters(registry):
    """Sent as UTF-8."""
    client = client_of(registry, token="schlüssel")

    assert client.get("/metrics", headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 200


def test_tokens_are_compared_in_constant_time(registry, monkeypatch):
    """By the standard library."""
    compared, original = [], hmac.compare_digest

    def compare_digest(one, other):
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    client_of(registry, token="s3cret").get("/metrics", headers={"Authorization": "Bearer other"})

    assert compared == [(b"other", b"s3cret")]


def test_public_metrics_need_no_token(registry):
    """Even if there is one."""
    assert client_of(registry, public=True, token="s3cret").get("/metrics").status_code == 200


@pytest.mark.parametrize(("settings", "status"), [({"public": True}, 200), ({"token": "s3cret"}, 401), ({}, 404)])
def test_head_is_answered_like_get(settings, status, registry):
    """A HEAD request for `/metrics` gets the status of a GET: 200, 401 or 404 according to the settings."""
    assert client_of(registry, **settings).head("/metrics").status_code == status


def test_path_is_not_in_the_schema(registry):
    """The OpenAPI schema omits `/metrics`, because the path is not part of the documented interface of the app."""
    assert "/metrics" not in client_of(registry, public=True).get("/openapi.json").json()["paths"]


def test_router_without_arguments_is_closed():
    """A metrics router without settings answers 404, because no token is set and the metrics are not public."""
    app = FastAPI()
    app.include_router(metrics_router())

    assert TestClient(app).get("/metrics").status_code == 404
    assert MetricsSettings(token="s3cret").token == SecretStr("s3cret")


def test_default_registry_has_metrics_of_middleware_and_app():
    """Middleware and router without a registry use prometheus_client's default, and so show its metrics, too."""
    app = FastAPI()
    app.add_middleware(MetricsMiddleware)
    app.include_router(metrics_router(MetricsSettings(public=True)))
    app.get("/only-in-this-test/{number}")(hello)
    client = TestClient(app)

    client.get("/only-in-this-test/1")
    response = client.get("/metrics")

    labels = labels_of("GET", "/only-in-this-test/{number}", "200")
    assert REGISTRY.get_sample_value(f"{DURATION}_count", labels) == 1
    assert "/only-in-this-test/{number}" in response.text
    assert "python_info" in response.text


async def test_metrics_are_rendered_in_a_thread(registry):
    """Rendering the metrics runs in a worker thread, so it does not block the event loop."""
    app = FastAPI()
    app.include_router(metrics_router(MetricsSettings(public=True), registry=registry))
    threads = []

    class Probe:
        def collect(self):
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                threads.append("worker")
            return []

    registry.register(Probe())
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        await client.get("/metrics")

    assert threads == ["worker"]


async def test_metrics_answer_while_all_threads_of_the_app_block(registry):
    """`/metrics` answers while all threads of the default pool are blocked, because it does not use that pool."""
    app = FastAPI()
    app.include_router(metrics_router(MetricsSettings(public=True), registry=registry))
    released = threading.Event()

    @app.get("/stuck")
    def stuck():
        released.wait()

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        hanging = [asyncio.create_task(client.get("/stuck")) for _ in range(41)]
        while not to_thread.current_default_thread_limiter().statistics().tasks_waiting:
            await asyncio.sleep(0)
        try:
            response = await client.get("/metrics")
        finally:
            released.set()
            await asyncio.gather(*hanging)

    assert response.status_code == 200
