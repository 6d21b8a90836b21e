"""The assembly: what every response has, and that middleware, handlers and routes of users keep working."""

import asyncio
import functools
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Container
from contextlib import asynccontextmanager

import anyio
import httpx2 as httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route
from starlette.websockets import WebSocketDisconnect
from wire import connection, read_all, read_response, request, serving

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.app import Edge, Layer, LayerStack
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware, add_problem_handlers
from fastapi_prodkit.exceptions import (
    CheckWarning,
    ConfigurationError,
    MissingExtraError,
    SettingsError,
    SettingsWarning,
)
from fastapi_prodkit.health import health_router
from fastapi_prodkit.logging import bind, configure_logging
from fastapi_prodkit.metrics import MetricsMiddleware
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.rate_limit import MemoryStore, RateLimit, RateLimitMiddleware
from fastapi_prodkit.request_id import RequestIDMiddleware, current_request_id
from fastapi_prodkit.sections import HeadersSettings, RateLimitSettings
from fastapi_prodkit.security_headers import SQLADMIN_CSP, SecurityHeadersMiddleware

ORIGIN = "https://app.example.com"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No variables and no .env files except those of the test."""
    monkeypatch.chdir(tmp_path)


def settings_of(**sections) -> Settings:
    """Return valid production settings; frozen, so equal ones are made once."""
    return _settings_of(json.dumps(sections), tuple(os.environ.items()))


@functools.cache
def _settings_of(sections: str, _environment: tuple[tuple[str, str], ...]) -> Settings:
    defaults = {
        "environment": "prod",
        "hosts": {"allowed": ["testserver"]},
        "cors": {"origins": [ORIGIN]},
        "metrics": {"token": "a-token-of-metrics"},
        "rate_limit": {"default": "100000/minute"},
    }
    return Settings(**{**defaults, **json.loads(sections)})


class Item(BaseModel):
    name: str
    price: float


async def broken_dependency():
    raise RuntimeError("internal-detail-dependency")


async def broken_teardown():
    yield
    raise RuntimeError("internal-detail-teardown")


def broken_sync_dependency():
    raise RuntimeError("internal-detail-sync-dependency")


def broken_sync_teardown():
    yield
    raise RuntimeError("internal-detail-sync-teardown")


def fail():
    raise RuntimeError("internal-detail-background")


@functools.cache
def routes() -> APIRouter:
    """Return one route for each outcome; made once, because apps only read it."""
    router = APIRouter()

    @router.get("/ok")
    async def ok():
        return {"id": current_request_id()}

    @router.get("/sync/{number}")
    def sync(number: int):
        return {"id": current_request_id()}

    @router.api_route("/head", methods=["GET", "HEAD"])
    async def head():
        return {}

    @router.get("/no-content", status_code=204)
    async def no_content():
        return None

    @router.get("/not-modified")
    async def not_modified():
        return Response(status_code=304)

    @router.get("/redirect")
    async def redirect():
        return RedirectResponse("/ok")

    @router.get("/missing/{item_id}")
    async def missing(item_id: int):
        raise HTTPException(404, "no such item")

    @router.post("/items")
    async def create(item: Item):
        return item

    @router.post("/any")
    async def send_back(body: dict) -> dict:
        return body

    @router.get("/float")
    async def read_float(x: float):
        return x

    @router.get("/limited", dependencies=[Depends(RateLimit("1/minute", name="limited"))])
    async def limited():
        return {}

    @router.get("/unavailable")
    async def unavailable():
        raise HTTPException(503, headers={"Retry-After": "5"})

    @router.get("/broken")
    async def broken():
        raise RuntimeError("internal-detail-route")

    @router.get("/broken-sync")
    def broken_sync():
        raise RuntimeError("internal-detail-sync")

    @router.get("/broken-sync-dependency", dependencies=[Depends(broken_sync_dependency)])
    def with_broken_sync_dependency():
        return {}

    @router.get("/broken-sync-teardown", dependencies=[Depends(broken_sync_teardown)])
    def with_broken_sync_teardown():
        return {}

    @router.get("/broken-dependency", dependencies=[Depends(broken_dependency)])
    async def with_broken_dependency():
        return {}

    @router.get("/broken-teardown", dependencies=[Depends(broken_teardown)])
    async def with_broken_teardown():
        return {}

    @router.get("/broken-early-teardown", dependencies=[Depends(broken_teardown, scope="function")])
    async def with_broken_early_teardown():
        return {}

    @router.get("/background")
    async def background(tasks: BackgroundTasks):
        tasks.add_task(lambda: logging.getLogger("task").info("in background"))
        return {}

    @router.get("/broken-background")
    async def broken_background(tasks: BackgroundTasks):
        tasks.add_task(fail)
        return {}

    @router.get("/stream")
    async def stream():
        return StreamingResponse(iter([b"a", b"b", b"c"]))

    @router.get("/broken-stream")
    async def broken_stream():
        def chunks():
            yield b"first"
            raise RuntimeError("internal-detail-stream")

        return StreamingResponse(chunks())

    @router.get("/endless")
    async def endless():
        async def chunks():
            while True:
                yield b"x" * 1024
                await anyio.sleep(0.001)

        return StreamingResponse(chunks())

    @router.websocket("/socket")
    async def socket(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text(str(current_request_id()))
        await websocket.close()

    return router


def service(**sections) -> FastAPI:
    """Return an app with one route for each outcome, direct, included, nested and mounted."""
    sub = FastAPI(openapi_url=None)
    sub.include_router(routes())
    inner = APIRouter()
    inner.include_router(routes(), prefix="/inner")
    app = create_app(settings_of(**sections), routers=[routes()])
    app.include_router(inner, prefix="/outer")
    app.mount("/sub", sub)
    return app


def access_lines(output: str) -> list[dict]:
    lines = [json.loads(line) for line in output.splitlines()]
    return [line for line in lines if line["event"] == "request"]


def samples() -> dict[tuple[str, str, str], float]:
    return {
        tuple(
            sample.labels[f"http_{label}"] for label in ("request_method", "route", "response_status_code")
        ): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "http_server_request_duration_seconds_count"
    }


def added(before: dict) -> dict:
    return {key: value - before.get(key, 0) for key, value in samples().items() if value != before.get(key, 0)}


def assert_edge(response: httpx.Response) -> None:
    """Every response has an id and the security headers, and no header twice."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{8,128}", response.headers["x-request-id"])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" in response.headers
    assert_no_header_twice(response)


def assert_no_header_twice(response: httpx.Response) -> None:
    names = Counter(name.lower() for name, _ in response.headers.raw)
    assert [name for name, count in names.items() if count > 1] == []


def assert_reported_once(response: httpx.Response, output: str, before: dict, label: str) -> None:
    """The response has the headers of the edge, one access line, and one sample under its label."""
    (line,) = access_lines(output)
    told = (line["http_method"], line["http_path"], line["http_status"])
    assert_edge(response)
    assert line["request_id"] == response.headers["x-request-id"]
    assert told == (response.request.method, response.request.url.path, response.status_code)
    assert line["http_route"] == label
    assert added(before) == {(response.request.method, label, str(response.status_code)): 1}


everywhere = pytest.mark.parametrize("prefix", ["", "/outer/inner", "/sub"])  # direct, nested and mounted

OUTCOMES = [
    # method, path, status, route
    ("GET", "/ok", 200, "/ok"),
    ("GET", "/sync/7", 200, "/sync/{number}"),
    ("GET", "/no-content", 204, "/no-content"),
    ("GET", "/not-modified", 304, "/not-modified"),
    ("GET", "/redirect", 307, "/redirect"),
    ("GET", "/missing/7", 404, "/missing/{item_id}"),
    ("GET", "/nowhere", 404, "_unmatched"),
    ("DELETE", "/ok", 405, "/ok"),
    ("HEAD", "/ok", 405, "/ok"),
    ("HEAD", "/head", 200, "/head"),
    ("OPTIONS", "/ok", 405, "/ok"),
    ("POST", "/items", 422, "/items"),
    ("GET", "/sync/seven", 422, "/sync/{number}"),
    ("GET", "/unavailable", 503, "/unavailable"),
    ("GET", "/broken", 500, "/broken"),
    ("GET", "/broken-sync", 500, "/broken-sync"),
    ("GET", "/broken-sync-dependency", 500, "/broken-sync-dependency"),
    ("GET", "/broken-sync-teardown", 200, "/broken-sync-teardown"),
    ("GET", "/broken-dependency", 500, "/broken-dependency"),
    ("GET", "/broken-teardown", 200, "/broken-teardown"),
    ("GET", "/broken-early-teardown", 500, "/broken-early-teardown"),
    ("GET", "/background", 200, "/background"),
    ("GET", "/broken-background", 200, "/broken-background"),
    ("GET", "/stream", 200, "/stream"),
]


@everywhere
@pytest.mark.parametrize(("method", "path", "status", "route"), OUTCOMES)
def test_every_outcome_has_headers_line_and_sample(prefix, method, path, status, route, capsys):
    """For direct, nested and mounted routes; the label is the template of the route."""
    before = samples()
    with TestClient(service(), raise_server_exceptions=False, follow_redirects=False) as client:
        capsys.readouterr()

        response = client.request(method, prefix + path, headers={"Origin": ORIGIN})

        assert response.status_code == status
        assert_reported_once(
            response, capsys.readouterr().out, before, route if route == "_unmatched" else prefix + route
        )
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "internal-detail" not in response.text


@pytest.mark.parametrize("path", ["/missing/7", "/nowhere", "/broken", "/unavailable", "/sync/seven"])
def test_errors_are_problems_with_the_request_id(path):
    """Every error response is application/problem+json with the request's id, and is not cached."""
    with TestClient(service(), raise_server_exceptions=False) as client:
        response = client.get(path)

    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == response.status_code
    assert problem["instance"] == path
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"


@everywhere
@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_body_is_a_413_problem(prefix, chunked, capsys):
    """Announced or chunked: refused before routing, or while it is read."""
    before = samples()
    content = iter([b"x" * 60, b"x" * 60]) if chunked else b"x" * 101
    with TestClient(service(limits={"max_body_size": 100})) as client:
        capsys.readouterr()

        response = client.post(prefix + "/items", content=content, headers={"Origin": ORIGIN})

    assert response.status_code == response.json()["status"] == 413
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert_reported_once(response, capsys.readouterr().out, before, prefix + "/items")


def test_announced_oversized_body_never_reaches_the_handler():
    """A client repeats the request after a 413. A larger limit of the route applies."""
    done = []
    app = create_app(settings_of(limits={"max_body_size": 100}))

    @app.post("/transfer")
    async def transfer(amount: int):
        done.append(amount)

    @app.post("/upload", max_body_size=1000)
    async def upload(request: Request):
        return len(await request.body())

    with TestClient(app) as client:
        assert client.post("/transfer?amount=5", content=b"x" * 2000).status_code == 413
        assert client.post("/upload", content=b"x" * 500).json() == 500
    assert done == []


@everywhere
def test_rate_limits_are_429_problems_with_headers(prefix, capsys):
    """The default limit and a limit of the route share the headers."""
    with TestClient(service()) as client:
        first = client.get(prefix + "/limited")
        before = samples()
        capsys.readouterr()

        second = client.get(prefix + "/limited", headers={"Origin": ORIGIN})

    assert first.headers["ratelimit-policy"] == '"default";q=100000;w=60, "limited";q=1;w=60'
    assert second.status_code == 429
    assert prefix == "/sub" or second.json()["violated-policies"] == ["limited"]  # its handlers are FastAPI's
    assert 0 < int(second.headers["retry-after"]) <= 60
    assert second.headers["access-control-allow-origin"] == ORIGIN
    assert "RateLimit" in second.headers["access-control-expose-headers"]
    assert_reported_once(second, capsys.readouterr().out, before, prefix + "/limited")


@everywhere
def test_default_limit_is_a_429_problem_before_routing(prefix, capsys):
    """Line and metrics still name the route."""
    with TestClient(service(rate_limit={"default": "1/minute"})) as client:
        client.get(prefix + "/ok")
        before = samples()
        capsys.readouterr()

        response = client.get(prefix + "/ok", headers={"Origin": ORIGIN})

    assert response.status_code == response.json()["status"] == 429
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert_reported_once(response, capsys.readouterr().out, before, prefix + "/ok")


def test_default_limit_counts_every_kind_of_route():
    """Direct, included, mounted and unknown paths share one quota; probes and preflights do not count."""
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
    with TestClient(service(rate_limit={"default": "4/minute"})) as client:
        for path in ("/ok", "/outer/inner/ok", "/sub/ok", "/nowhere"):
            client.get("/health")
            client.options(path, headers=preflight)
            assert client.get(path).status_code != 429

        assert client.get("/ok").status_code == 429
        assert client.get("/health").status_code == 200
        assert client.options("/ok", headers=preflight).status_code == 204


@everywhere
def test_preflight_is_answered_by_the_edge(prefix, capsys):
    """It has the headers of the edge, and never reaches a route."""
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    before = samples()
    with TestClient(service()) as client:
        capsys.readouterr()

        response = client.options(prefix + "/items", headers=headers)

    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert_reported_once(response, capsys.readouterr().out, before, "_unmatched")


def test_unknown_host_is_refused_except_for_probes():
    """Load balancers probe by address."""
    with TestClient(service(), base_url="http://10.0.0.7:8000") as client:
        assert client.get("/ok").status_code == 400
        assert client.get("/health").json() == {"status": "pass"}
        assert client.get("/ready").status_code == 200


def test_probes_and_metrics_are_neither_logged_nor_measured(capsys):
    """They still have a request id and the security headers."""
    before = samples()
    with TestClient(service()) as client:
        capsys.readouterr()
        for path in ("/health", "/ready", "/metrics"):
            response = client.get(path, headers={"Authorization": "Bearer a-token-of-metrics"})
            assert response.status_code == 200
            assert_edge(response)

    assert access_lines(capsys.readouterr().out) == []
    assert added(before) == {}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/docs", 200),
        ("HEAD", "/docs", 200),
        ("GET", "/docs/assets/swagger-ui.css", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/log-level", 401),
        ("POST", "/health", 405),
    ],
)
@pytest.mark.parametrize("root_path", ["", "/api"])
def test_docs_routes_have_headers_line_and_sample(root_path, method, path, status, capsys):
    """The label is their path."""
    app = create_app(settings_of(environment="dev", log={"format": "json", "level_token": "t" * 32}))
    before = samples()
    with TestClient(app, root_path=root_path) as client:
        capsys.readouterr()

        response = client.request(method, root_path + path)

        (line,) = access_lines(capsys.readouterr().out)
        assert response.status_code == status
        assert_edge(response)
        assert line["request_id"] == response.headers["x-request-id"]
        assert (line["http_route"], line["http_status"]) == (path, status)
        assert added(before) == {(method, path, str(status)): 1}


def test_unknown_paths_methods_and_hosts_add_no_series():
    """The number of series depends on the code, not on requests."""
    with TestClient(service(), raise_server_exceptions=False) as client:
        client.get("/nowhere"), client.request("BREW", "/ok"), client.get("/ok", headers={"Host": "other"})
        before = len(samples())
        for number in range(50):
            client.get(f"/nowhere/{number}")
            client.request(f"BREW{number}", "/ok")
            client.get("/ok", headers={"Host": f"host{number}"})

        assert len(samples()) == before


@everywhere
def test_websockets_have_an_id_and_one_line(prefix, capsys):
    """The handshake carries the id; the line is written at the close, and there is no duration."""
    before = samples()
    with TestClient(service()) as client:
        capsys.readouterr()
        with client.websocket_connect(prefix + "/socket") as websocket:
            request_id = websocket.receive_text()
            accepted = websocket.extra_headers
        (line,) = access_lines(capsys.readouterr().out)

    assert len(dict(accepted)) == len(accepted)
    assert dict(accepted)[b"x-request-id"].decode() == line["request_id"] == request_id
    assert (line["http_route"], line["http_status"]) == (prefix + "/socket", 101)
    assert added(before) == {}


def test_websockets_from_foreign_origins_are_refused(capsys):
    """A WebSocket handshake with a foreign Origin header is refused and logged as 403."""
    with TestClient(service()) as client, pytest.raises(WebSocketDisconnect):  # noqa: SIM117
        with client.websocket_connect("/socket", headers={"Origin": "https://evil.example"}):
            pass  # pragma: no cover - not reached

    (line,) = access_lines(capsys.readouterr().out)
    assert line["http_status"] == 403


def headers_of(received: bytes, *, of_server: Container[str] = ()) -> dict[str, str]:
    """Return the headers of a response as sent, and assert that only headers of the server are repeated."""
    lines = received.partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")[1:]
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name: value for name, value in pairs if name not in of_server}
    assert len(headers) == len([name for name, _ in pairs if name not in of_server])
    return headers


class TestOnTheWire:
    """Tests that need a real server and connection."""

    @pytest.mark.parametrize(
        "path",
        [
            "/broken",
            "/broken-dependency",
            "/broken-background",
            "/broken-teardown",
            "/broken-early-teardown",
            "/broken-sync",
            "/broken-sync-dependency",
            "/broken-sync-teardown",
        ],
    )
    def test_connection_stays_usable_after_an_exception(self, path, capsys):
        """The exception is logged once, and the next request on the connection is served."""
        with serving(service()) as port, connection(port) as client:
            client.sendall(request("GET", path))
            first = read_response(client)
            client.sendall(request("GET", "/ok"))
            second = read_response(client)

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        (error,) = [line for line in lines if "exception" in line]
        complete = path in (
            "/broken-background",
            "/broken-teardown",
            "/broken-sync-teardown",
        )  # they fail after the response
        assert first.startswith(b"HTTP/1.1 200" if complete else b"HTTP/1.1 500")
        assert b"internal-detail" not in first
        assert b"close" not in first.lower().partition(b"\r\n\r\n")[0]
        assert second.startswith(b"HTTP/1.1 200")
        assert "internal-detail" in error["exception"]
        assert error["request_id"].encode() in first

    @everywhere
    def test_exception_in_a_stream_aborts_the_transfer(self, prefix, capsys):
        """Without a final chunk; one error record and one access line."""
        before = samples()
        with serving(service()) as port, connection(port) as client:
            client.sendall(request("GET", prefix + "/broken-stream", f"Origin: {ORIGIN}"))
            received = read_all(client)

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        (line,) = [line for line in lines if line["event"] == "request"]
        (error,) = [line for line in lines if "exception" in line]
        headers = headers_of(received)
        assert b"first" in received
        assert not received.endswith(b"0\r\n\r\n")
        assert headers["x-request-id"] == line["request_id"] == error["request_id"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["access-control-allow-origin"] == ORIGIN
        assert (line["http_route"], line["http_status"]) == (prefix + "/broken-stream", 200)
        assert added(before) == {("GET", prefix + "/broken-stream", "200"): 1}

    @everywhere
    def test_disconnect_is_status_499(self, prefix, capsys):
        """In the line and in the metric."""
        before = samples()
        with serving(service()) as port, connection(port) as client:
            client.sendall(request("GET", prefix + "/endless"))
            received = client.recv(65536)

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        (line,) = [line for line in lines if line["event"] == "request"]
        assert (line["http_route"], line["http_status"]) == (prefix + "/endless", 499)
        assert headers_of(received)["x-request-id"] == line["request_id"]
        assert added(before) == {("GET", prefix + "/endless", "499"): 1}
        assert [line for line in lines if line["level"] == "error"] == []

    @everywhere
    @pytest.mark.parametrize("origin", [ORIGIN, "https://evil.example"])
    def test_answer_to_a_handshake_repeats_no_header(self, prefix, origin):
        """Accepted or refused."""
        handshake = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        with serving(service()) as port, connection(port) as client:
            client.sendall(request("GET", prefix + "/socket", *handshake, key, f"Origin: {origin}"))
            received = client.recv(65536)

        assert received.startswith(b"HTTP/1.1 101" if origin == ORIGIN else b"HTTP/1.1 403")
        # Older versions of uvicorn add these, whatever the app sends.
        assert "x-request-id" in headers_of(received, of_server={"date", "content-length", "content-type"})

    def test_lines_of_the_process_are_json_with_the_request_id(self, capsys):
        """Lines of the server too."""
        with serving(service()) as port, connection(port) as client:
            client.sendall(request("GET", "/broken-stream", "X-Request-ID: a-request-of-mine"))
            read_all(client)

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {line["logger"] for line in lines} >= {"uvicorn.error", "fastapi_prodkit.access"}
        assert {line.get("request_id") for line in lines if "exception" in line} == {"a-request-of-mine"}


class BrokenMiddleware:
    """Middleware of a user that fails before or after the app inside."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") == "/broken-before":
            raise RuntimeError("internal-detail-middleware")
        await self.app(scope, receive, send)
        if scope.get("path") == "/broken-after":
            raise RuntimeError("internal-detail-middleware")


class BrokenBaseMiddleware(BaseHTTPMiddleware):
    """Middleware of a user that fails, based on BaseHTTPMiddleware."""

    async def dispatch(self, request, call_next):
        if request.url.path == "/broken-before":
            raise RuntimeError("internal-detail-middleware")
        response = await call_next(request)
        if request.url.path == "/broken-after":
            raise RuntimeError("internal-detail-middleware")
        return response


@pytest.mark.parametrize("added_later", [False, True])
@pytest.mark.parametrize(
    ("middleware", "path", "status", "route"),
    [
        (BrokenMiddleware, "/broken-before", 500, "_unmatched"),
        (BrokenMiddleware, "/broken-after", 200, "/broken-after"),  # the response was complete
        (BrokenBaseMiddleware, "/broken-before", 500, "_unmatched"),
        (BrokenBaseMiddleware, "/broken-after", 500, "/broken-after"),  # it was not sent
    ],
)
def test_exception_in_user_middleware_is_a_500_problem(added_later, middleware, path, status, route, capsys):
    """Passed in or added later; it is logged once, and the connection stays usable."""
    before = samples()
    app = create_app(settings_of(), middleware=[] if added_later else [Middleware(middleware)], routers=[routes()])
    if added_later:
        app.add_middleware(middleware)
    app.add_api_route("/broken-after", lambda: "ok")

    with serving(app) as port, connection(port) as client:
        client.sendall(request("GET", path, f"Origin: {ORIGIN}"))
        first = read_response(client)
        client.sendall(request("GET", "/ok"))
        second = read_response(client)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    line, _ = [line for line in lines if line["event"] == "request"]
    (error,) = [line for line in lines if "exception" in line]
    assert first.startswith(b"HTTP/1.1 %d" % status)
    assert second.startswith(b"HTTP/1.1 200")
    assert b"internal-detail" not in first
    assert headers_of(first)["access-control-allow-origin"] == ORIGIN
    assert headers_of(first)["x-request-id"] == line["request_id"] == error["request_id"]
    assert added(before) == {("GET", route, str(status)): 1, ("GET", "/ok", "200"): 1}


async def test_contexts_of_concurrent_requests_are_separate():
    """Each of 200 concurrent requests reads only its own id, after awaits and in a worker thread."""
    app = create_app(settings_of())

    @app.get("/{number}")
    async def read(number: int):
        bind(number=number)
        seen = []
        for _ in range(5):
            await asyncio.sleep(0)
            seen.append(current_request_id())
        return [*seen, await anyio.to_thread.run_sync(current_request_id)]

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        ids = [f"request-{number}" for number in range(200)]
        responses = await asyncio.gather(
            *(client.get(f"/{number}", headers={"X-Request-ID": each}) for number, each in enumerate(ids))
        )

    assert [set(response.json()) for response in responses] == [{each} for each in ids]
    assert current_request_id() is None


def test_request_id_reaches_background_tasks_and_sync_routes(capsys):
    """Log lines of a background task, and synchronous routes, have the id of their request."""
    with TestClient(service()) as client:
        capsys.readouterr()
        response = client.get("/background")
        sync = client.get("/sync/1")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line["event"] == "in background"]
    assert line["request_id"] == response.headers["x-request-id"]
    assert sync.json()["id"] == sync.headers["x-request-id"]


HOSTILE = [
    b'{"name": "a", "price": NaN}',
    b'{"name": "a", "price": 1e999}',
    b'{"name": "\\ud800", "price": 1}',
    b'{"name": "\\ud800", "price": "x"}',
    b'{"name": "\xff\xfe", "price": 1}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"name": "a", "price": ' + b"9" * 5000 + b"}",
    b'{"\\ud800": 1}',
    b"null",
    b"",
]


@pytest.fixture(scope="module")
def client():
    return TestClient(service())  # without its lifespan, whose thread would measure the event loop during other tests


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("path", ["/items", "/outer/inner/items"])
def test_hostile_bodies_are_4xx_problems(client, path, body, media_type):
    """Malformed bodies of any media type get a problem with a 4xx status, never a 500."""
    response = client.post(path, content=body, headers={"Content-Type": media_type})

    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"
    response.json()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/items", b'{"name": "a", "price": NaN}'),
        ("POST", "/any", b'{"a": "\\ud800"}'),
        ("POST", "/any", b'{"a":' * 300 + b"1" + b"}" * 300),
        ("POST", "/any", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
        ("GET", "/float?x=nan", b""),
    ],
)
def test_response_that_repeats_unserializable_input_is_a_422(method, path, body, capsys):
    """It has the headers of the edge, and nothing is logged as an error."""
    with TestClient(service()) as client:
        capsys.readouterr()
        response = client.request(method, path, content=body, headers={"Content-Type": "application/json"})

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert response.status_code == 422
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert_edge(response)
    assert [line["http_status"] for line in lines if line["event"] == "request"] == [422]
    assert [line for line in lines if "exception" in line] == []


def test_response_with_unserializable_data_of_the_app_is_a_500(capsys):
    """It is logged once."""
    app = create_app(settings_of())
    app.add_api_route("/ratio", lambda: float("nan"))

    with TestClient(app, raise_server_exceptions=False) as client:
        capsys.readouterr()
        response = client.get("/ratio")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert response.status_code == response.json()["status"] == 500
    assert ["Out of range" in line["exception"] for line in lines if "exception" in line] == [True]


def test_two_apps_have_separate_settings_and_quotas():
    """Two apps in one process count requests separately, each against its own default limit."""
    limit = RateLimit("1/minute")
    one, other = (create_app(settings_of(rate_limit={"default": default})) for default in ("1/minute", "100/minute"))

    async def limited():
        return {}

    for app in (one, other):
        app.add_api_route("/limited", limited, dependencies=[Depends(limit)])

    with TestClient(one) as first, TestClient(other) as second:
        assert [first.get("/limited").status_code, second.get("/limited").status_code] == [200, 200]
        assert first.get("/nowhere").status_code == 429
        assert second.get("/nowhere").status_code == 404


@pytest.mark.parametrize("path", ["/ok", "/broken"])
def test_two_apps_have_separate_edges(path, capsys):
    """Id, policy, origins, line and metric belong to the app; logging is that of the process, set by the last app."""
    origins = {"one": "https://one.example.com", "two": "https://two.example.com"}
    apps = {
        name: service(
            service={"name": name, "version": f"1.0.{name}"},
            request_id={"header": f"X-{name}-ID"},
            headers={"csp": f"default-src {origin}"},
            cors={"origins": [origin]},
        )
        for name, origin in origins.items()
    }

    for name, app in apps.items():
        other = "two" if name == "one" else "one"
        before = samples()
        with TestClient(app, raise_server_exceptions=False) as client:
            capsys.readouterr()
            foreign = client.get(path, headers={"Origin": origins[other]})
            capsys.readouterr()
            response = client.get(path, headers={"Origin": origins[name]})

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        (line,) = [line for line in lines if line["event"] == "request"]
        status = str(response.status_code)
        assert "access-control-allow-origin" not in foreign.headers
        assert response.headers["access-control-allow-origin"] == origins[name]
        assert response.headers["content-security-policy"] == f"default-src {origins[name]}"
        assert response.headers[f"x-{name}-id"] == line["request_id"]
        assert f"x-{other}-id" not in response.headers
        assert_no_header_twice(response)
        assert len([line for line in lines if "exception" in line]) == (path == "/broken")
        assert (line["service"], line["version"]) == ("two", "1.0.two")
        assert added(before) == {("GET", path, status): 2}


def test_mounted_app_uses_the_edge_of_the_outer_app(capsys):
    """One id, line and set of headers; dependencies of the inner app find its own objects."""
    inner = create_app(settings_of())

    @inner.get("/pieces")
    async def pieces(request: Request):
        return request.scope["fastapi_prodkit"]["rate_limit"] is inner.state.rate_limit

    outer = create_app(settings_of())
    outer.mount("/inner", inner)

    with TestClient(outer) as client:
        capsys.readouterr()
        response = client.get("/inner/pieces")

    assert response.json() is True
    assert_edge(response)
    (line,) = access_lines(capsys.readouterr().out)
    assert line["http_route"] == "/inner/pieces"


def test_handlers_and_arguments_of_the_user_win():
    """Exception handlers and a title passed to `create_app` replace the defaults, and headers are still added."""

    async def teapot(request, error):
        return PlainTextResponse("short and stout", 418)

    app = create_app(settings_of(), title="Mine", exception_handlers={KeyError: teapot, 404: teapot})
    app.add_api_route("/key", lambda: {}["missing"])

    with TestClient(app) as client:
        assert app.title == "Mine"
        assert client.get("/key").text == "short and stout"
        assert client.get("/nowhere").status_code == 418
        assert_edge(client.get("/nowhere"))


def test_install_keeps_middleware_handlers_lifespan_and_routes(capsys):
    """After `install`, the existing app's own parts work as before, and its responses get our headers."""
    started = []

    @asynccontextmanager
    async def lifespan(app):
        started.append(app)
        yield {"who": "own"}

    class Marking:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def send_marked(message):
                if message["type"] == "http.response.start":
                    message["headers"].append((b"x-mark", b"1"))
                await send(message)

            await self.app(scope, receive, send_marked)

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(Marking)

    @app.exception_handler(KeyError)
    async def key_error(request, error):
        return JSONResponse({"mine": True}, 409)

    @app.get("/key")
    async def key(request: Request):
        assert request.state.who == "own"
        raise KeyError

    @app.post("/upload")
    async def upload(request: Request):
        return len(await request.body())

    install(app, settings_of(limits={"max_body_size": 10}))

    with TestClient(app) as client:
        response = client.get("/key")
        assert (response.status_code, response.json()) == (409, {"mine": True})
        assert response.headers["x-mark"] == "1"
        assert_edge(response)
        assert client.get("/health").json() == {"status": "pass"}
        assert [client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 404]
        assert client.post("/upload", content=b"x" * 11).status_code == 413
    assert started == [app]
    assert "generate_unique_id_function=" in capsys.readouterr().out


def test_install_replaces_the_docs_page_of_fastapi():
    """FastAPI's page loads its scripts from a CDN, which the policy forbids."""
    app = FastAPI()
    install(app, settings_of(environment="dev"))

    with TestClient(app) as client:
        page = client.get("/docs")
        assert "cdn" not in page.text
        assert "/docs/assets/swagger-ui-bundle.js" in page.text
        assert [client.get(path).status_code for path in ("/redoc", "/openapi.json")] == [404, 200]


def test_install_refuses_a_started_or_installed_app():
    """Calling `install` twice or after the start raises a ConfigurationError that says why."""
    twice = create_app(settings_of())
    late = FastAPI()
    with TestClient(late):
        pass

    with pytest.raises(ConfigurationError, match="called before"):
        install(twice, settings_of())
    with pytest.raises(ConfigurationError, match="already started"):
        install(late, settings_of())


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("rate_limit", {"default": "abc/minute"}, "abc/minute"),
        ("proxy", {"trusted": ["10.0.0.1/8"]}, "PROXY_TRUSTED"),
        ("hosts", {"allowed": ["https://api.example.com"]}, "HOSTS_ALLOWED"),
        ("cors", {"origins": ["*"], "allow_credentials": True}, "CORS_"),
    ],
)
def test_unusable_setting_fails_when_the_app_is_created(section, value, named):
    """In the lifespan, uvicorn would ignore the error and serve."""
    with pytest.raises(ConfigurationError, match=named):
        create_app(settings_of(environment="dev", **{section: value}))


def test_only_probes_are_exempt():
    """A user's own route at such a path is limited and checked."""
    app = create_app(settings_of(metrics=None, rate_limit={"default": "2/minute"}))

    @app.post("/health")
    @app.post("/metrics")
    @app.get("/{path:path}")
    async def own(path: str = ""):
        return {}

    with TestClient(app) as client:
        assert [client.get("/health").status_code for _ in range(5)] == [200] * 5
        requests = [("POST", "/health"), ("GET", "/health//"), ("POST", "/metrics"), ("GET", "/metrics")]
        assert [client.request(*each).status_code for each in requests] == [200, 200, 429, 429]
        assert client.post("/health", headers={"Host": "evil.example"}).status_code == 400


def test_install_does_not_overwrite_app_state():
    """A name that dependencies look up is an error; other names stay."""
    own, taken = FastAPI(), FastAPI()
    own.state.settings = "mine"
    taken.state.rate_limit = "mine"

    install(own, settings_of())

    assert own.state.settings == "mine"
    with pytest.raises(ConfigurationError, match=r"app\.state\.rate_limit exists already"):
        install(taken, settings_of())


def test_exceptions_are_handled_without_the_access_log(capsys):
    """The exception is logged once, and the connection stays usable."""
    with serving(service(access_log=None)) as port, connection(port) as client:
        client.sendall(request("GET", "/broken"))
        first = read_response(client)
        client.sendall(request("GET", "/ok"))
        second = read_response(client)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first.startswith(b"HTTP/1.1 500")
    assert second.startswith(b"HTTP/1.1 200")
    assert len([line for line in lines if "exception" in line]) == 1
    assert [line for line in lines if line["event"] == "request"] == []


def test_middleware_in_a_mounted_app_shares_context_and_headers(capsys):
    """One id, one context, and every limit in the headers."""
    sub = FastAPI()
    sub.add_middleware(RequestIDMiddleware)
    sub.add_middleware(RateLimitMiddleware, RateLimitSettings(default="5/minute"))

    @sub.get("/")
    async def read():
        bind(customer="c-1")
        return {"id": current_request_id()}

    app = create_app(settings_of())
    app.mount("/sub", sub)

    with TestClient(app) as client:
        capsys.readouterr()
        response = client.get("/sub/")

    (line,) = access_lines(capsys.readouterr().out)
    assert response.json()["id"] == response.headers["x-request-id"] == line["request_id"]
    assert line["customer"] == "c-1"
    assert response.headers["ratelimit-policy"] == '"default";q=100000;w=60, "default-5-per-60s";q=5;w=60'
    assert_edge(response)


@pytest.mark.parametrize(
    "section",
    ["log", "access_log", "request_id", "headers", "cors", "hosts", "limits", "rate_limit", "health", "metrics"],
)
def test_a_section_set_to_none_leaves_its_piece_out(section):
    """The other pieces work without it."""
    sections = {section: None}
    if section == "hosts":
        sections["environment"] = "dev"

    with TestClient(service(**sections)) as client:
        response = client.get("/ok", headers={"Origin": ORIGIN})
        health = client.get("/health")

    assert response.status_code == 200
    assert ("x-request-id" in response.headers) == (section != "request_id")
    assert ("x-frame-options" in response.headers) == (section != "headers")
    assert ("access-control-allow-origin" in response.headers) == (section != "cors")
    assert ("ratelimit" in response.headers) == (section != "rate_limit")
    assert health.status_code == (404 if section == "health" else 200)


def test_app_without_pieces_has_none_of_their_effects(capsys):
    """No access line, no check of host and body, no metrics, and logging unchanged."""
    sections = {"access_log": None, "limits": None, "metrics": None, "log": None}
    with TestClient(service(**sections, environment="dev", hosts=None), base_url="http://anything") as client:
        response = client.post("/items", content=b'{"name": "' + b"x" * 1_100_000 + b'", "price": 1}')
        metrics = client.get("/metrics")

    assert response.status_code == 422  # a TestClient sends no content type; read, and not refused for its size
    assert metrics.status_code == 404
    assert access_lines(capsys.readouterr().out) == []


def test_missing_extra_fails_when_the_app_is_created(monkeypatch):
    """For example DATABASE_URL without SQLAlchemy; the error says what to install."""
    for name in [name for name in sys.modules if name.startswith("fastapi_prodkit.database")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-prodkit\[database\]'"):
        create_app(settings_of(database={"url": "sqlite://"}))


def test_warnings_about_settings_are_logged(monkeypatch, capsys):
    """Although logging is configured after the settings are read."""
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setenv("RATE_LIMT_DEFAULT", "5/minute")
    warnings.simplefilter("always", SettingsWarning)

    create_app()

    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["logger"] == "py.warnings"
    assert "did you mean RATE_LIMIT_DEFAULT?" in line["event"]


WORKER = """
import multiprocessing, os
from fastapi_prodkit import create_app

def work():
    try:
        create_app()
    except ValueError as error:
        print(error, flush=True)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    worker.join()
"""


@pytest.mark.system
def test_production_refuses_separate_limits_of_several_workers(tmp_path):
    """`uvicorn --workers 2` starts such child processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "ENVIRONMENT": "prod", "HOSTS_ALLOWED": "api.example.com"}

    output = subprocess.run(
        [sys.executable, "worker.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout

    assert "RATE_LIMIT_ENABLED: this is a worker process" in output


def test_worker_is_refused_in_production_only(monkeypatch, capsys):
    """Other environments warn; without a limit nothing is said."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a parent")
    monkeypatch.setattr("fastapi_prodkit.metrics.multiprocess.shared_directory", lambda: None)

    warnings.simplefilter("always", SettingsWarning)
    create_app(settings_of(rate_limit=None))
    before = capsys.readouterr().out
    create_app(settings_of(environment="dev"))

    said = "SettingsWarning: RATE_LIMIT_ENABLED: this is a worker process"
    assert said not in before
    assert said in capsys.readouterr().out
    with pytest.raises(SettingsError, match="RATE_LIMIT_ENABLED"):
        create_app(settings_of())


def test_failing_check_makes_readiness_503():
    """A warning does not."""

    async def warns():
        raise CheckWarning("slow")

    async def fails():
        raise RuntimeError("password=secret")

    with TestClient(create_app(settings_of(), checks={"cache": warns})) as client:
        assert client.get("/ready").json()["status"] == "warn"
    with TestClient(create_app(settings_of(), checks={"cache": fails})) as client:
        response = client.get("/ready")
    assert response.status_code == 503
    assert "secret" not in response.text


def test_client_and_scheme_of_a_trusted_proxy_are_used(capsys):
    """The client is logged and limited; the scheme decides about HSTS."""
    app = service(proxy={"trusted": ["127.0.0.0/8"]}, rate_limit={"default": "1/minute"})
    with TestClient(app, client=("127.0.0.1", 4000)) as client:
        for address in ("198.51.100.1", "198.51.100.2"):
            response = client.get("/ok", headers={"X-Forwarded-For": address, "X-Forwarded-Proto": "https"})
            assert response.status_code == 200
            assert "strict-transport-security" in response.headers

    assert [line["client_ip"] for line in access_lines(capsys.readouterr().out)] == ["198.51.100.1", "198.51.100.2"]


def test_environment_test_reraises_exceptions():
    """With ENVIRONMENT=test, exceptions of routes and background tasks are raised in TestClient."""
    with TestClient(service(environment="test", hosts={"allowed": ["*"]})) as client:
        with pytest.raises(RuntimeError, match="internal-detail-route"):
            client.get("/broken")
        with pytest.raises(RuntimeError, match="internal-detail-background"):
            client.get("/broken-background")


def test_debug_shows_the_traceback_page_of_fastapi():
    """With `debug` outside of production, an exception shows FastAPI's traceback page."""
    with TestClient(service(environment="dev", debug=True), raise_server_exceptions=False) as client:
        assert "internal-detail-route" in client.get("/broken").text


@pytest.mark.parametrize(("environment", "lines"), [("dev", 1), ("prod", 0)])
def test_dev_explains_swallowed_exceptions_once(capsys, environment, lines):
    """With a tracker around the app object, the log names the setting."""
    with TestClient(service(environment=environment), raise_server_exceptions=False) as client:
        for _ in range(2):
            assert client.get("/broken").status_code == 500

    assert capsys.readouterr().out.count("set ERRORS_RAISE=true") == lines


def test_docs_are_closed_in_production_and_open_in_dev():
    """The schema too."""
    with TestClient(service()) as client:
        assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc")] == [404, 404, 404]
    with TestClient(create_app(settings_of(environment="dev"))) as client:
        assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc")] == [200, 200, 404]


def test_probes_skip_dependencies_and_catch_all_routes_of_the_app():
    """Probes answer 200 even if the app has a global authentication dependency and a catch-all route."""

    async def refuse():
        raise HTTPException(401)

    app = create_app(settings_of(), dependencies=[Depends(refuse)])
    app.add_api_route("/{path:path}", lambda path: path)

    with TestClient(app) as client:
        assert client.get("/anything").status_code == 401
        assert client.get("/health").status_code == 200


def edge_of(app):
    app.middleware_stack = app.build_middleware_stack()
    return app.middleware_stack


def test_layers_are_in_the_order_of_the_design():
    """The layers of `create_app` wrap the app in a fixed order, from proxy headers to the body limit."""
    limits = {"max_concurrent": 100, "cancel_on_disconnect": True}
    app = create_app(settings_of(proxy={"trusted": ["10.0.0.0/8"]}, limits=limits))
    names = [type(layer).__name__ for layer in edge_of(app).layers]

    assert names == [
        "ProxyHeadersMiddleware",
        "RequestIDMiddleware",
        "AccessLogMiddleware",
        "ErrorBoundaryMiddleware",
        "MetricsMiddleware",
        "SecurityHeadersMiddleware",
        "CORSMiddleware",
        "HeadLimitMiddleware",
        "AllowedHostsMiddleware",
        "ConcurrencyLimitMiddleware",
        "RateLimitMiddleware",
        "DeadlineMiddleware",
        "DisconnectMiddleware",
        "BodyLimitMiddleware",
    ]
    assert type(edge_of(app).app).__name__ == "ServerErrorMiddleware"


def test_layers_that_refuse_are_inside_of_layers_that_report():
    """Layers behind the first one that may answer have no hooks for responses."""
    edge = edge_of(create_app(settings_of(proxy={"trusted": ["10.0.0.0/8"]})))
    names = [type(piece).__name__ for piece in edge.layers]
    inside = edge.layers[names.index("CORSMiddleware") + 1 :]

    assert inside
    for piece in inside:
        assert (type(piece).on_response_start, type(piece).on_end) == (Layer.on_response_start, Layer.on_end)


def test_list_of_layers_can_be_built_from_public_names(capsys):
    """In another app and with a layer of its own."""

    class Marking(Layer):
        def on_response_start(self, exchange, headers, present):
            headers.append((b"x-mark", str(exchange.status).encode()))

    app, settings = FastAPI(), settings_of(limits={"max_concurrent": 100})
    configure_logging(settings.log)
    add_problem_handlers(app)
    store = MemoryStore()
    layers = [
        ProxyHeadersMiddleware(app, settings.proxy),
        RequestIDMiddleware(app, settings.request_id),
        AccessLogMiddleware(app),
        ErrorBoundaryMiddleware(app, settings.errors),
        MetricsMiddleware(app),
        SecurityHeadersMiddleware(app, settings.headers),
        Marking(),
        CORSMiddleware(app, settings.cors),
        AllowedHostsMiddleware(app, settings.hosts),
        ConcurrencyLimitMiddleware(app, settings.limits),
        RateLimitMiddleware(app, settings.rate_limit, store=store),
        DeadlineMiddleware(app, settings.limits),
        BodyLimitMiddleware(app, settings.limits),
    ]
    Edge(layers, installed={"rate_limit": store}).put_around(app)
    app.include_router(routes())
    served = LayerStack([Marking()], PlainTextResponse("any app"))
    before = samples()
    capsys.readouterr()

    response = TestClient(app).get("/broken", headers={"Origin": ORIGIN})

    assert response.headers["x-mark"] == "500"
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert_reported_once(response, capsys.readouterr().out, before, "/broken")
    assert TestClient(served).get("/").headers["x-mark"] == "200"


def test_cors_outside_of_metrics_is_refused():
    """A preflight would be measured without having been counted."""
    app = FastAPI()

    with pytest.raises(ConfigurationError, match="MetricsMiddleware is behind CORSMiddleware"):
        Edge([CORSMiddleware(app), MetricsMiddleware(app)])


def test_root_path_keeps_exemptions_and_labels(capsys):
    """A root_path changes neither the exemption of probes nor the route's template in log and metrics."""
    before = samples()
    with TestClient(service(), root_path="/api") as client:
        capsys.readouterr()
        assert client.get("/api/health").status_code == 200
        assert client.get("/api/ok").status_code == 200

    (line,) = access_lines(capsys.readouterr().out)
    assert line["http_route"] == "/ok"
    assert added(before) == {("GET", "/ok", "200"): 1}


def test_create_app_reads_settings_from_the_environment(monkeypatch):
    """Without arguments, `create_app()` reads its settings from environment variables."""
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setenv("SERVICE_NAME", "from-the-environment")

    assert create_app().title == "from-the-environment"


@pytest.mark.parametrize(("environment", "reported"), [("dev", ["/page"]), ("test", [])])
def test_page_has_the_policy_of_its_path(environment, reported, caplog):
    """In dev, a page under a policy that blocks it is reported."""
    app = create_app(Settings(environment=environment), csp_policies={"/admin": SQLADMIN_CSP})
    for path in ("/page", "/admin/page"):
        app.add_api_route(path, lambda: "<p>", response_class=HTMLResponse)
    client = TestClient(app)

    general, own, _docs = (
        client.get(path).headers["content-security-policy"] for path in ("/page", "/admin/page", "/docs")
    )

    records = [record for record in caplog.records if record.name == "fastapi_prodkit.security_headers"]
    assert (general, own) == (HeadersSettings().csp, SQLADMIN_CSP)
    assert [record.args[0] for record in records] == reported


def test_install_accepts_policies_by_path():
    """For paths without a route too."""
    app = FastAPI()
    install(app, settings_of(), csp_policies={"/admin": SQLADMIN_CSP})

    response = TestClient(app).get("/admin/users")

    assert response.headers.get_list("content-security-policy") == [SQLADMIN_CSP]


def test_mounted_starlette_app_has_the_headers():
    """Responses of a mounted Starlette app, including its 404, carry the headers that our layers add."""

    async def hello(request):
        return PlainTextResponse("hello")

    app = create_app(settings_of())
    app.mount("/plain", Starlette(routes=[Route("/hello/{name}", hello)]))

    with TestClient(app) as client:
        assert_edge(client.get("/plain/hello/you"))
        assert_edge(client.get("/plain/nowhere"))


def test_app_may_include_its_own_health_router():
    """With `health=None`, an app can include a health router itself, and its probe answers 200."""
    app = create_app(settings_of(health=None))
    app.include_router(health_router(checks={}))

    with TestClient(app) as client:
        assert client.get("/health").status_code == 200


def test_drain_closes_connections():
    """A response that already has the header gets no second one."""
    app = create_app(settings_of())

    @app.get("/")
    async def read():
        return "ok"

    @app.get("/closing")
    async def closing():
        return PlainTextResponse("bye", headers={"connection": "close"})

    with TestClient(app) as client:
        before = client.get("/")
        app.state.shutdown.drain()
        after, twice, ready = client.get("/"), client.get("/closing"), client.get("/ready")

    assert "connection" not in before.headers
    assert after.headers.get_list("connection") == ["close"]
    assert twice.headers.get_list("connection") == ["close"]
    assert ready.status_code == 503


def test_app_without_shutdown_leaves_signals_to_the_server():
    """With `shutdown=None`, the app has no shutdown state, and readiness depends on the checks alone."""
    app = create_app(settings_of(shutdown=None))

    with TestClient(app) as client:
        assert client.get("/ready").status_code == 200
    assert not hasattr(app.state, "shutdown")


# Objects in place of those that the settings imply


class Bounded:
    """A store of a user: a fixed number of requests in total, and a lifespan."""

    def __init__(self, amount):
        self.left = amount
        self.events = []

    async def hit(self, limits, key, cost=1):
        self.left -= cost
        return [(limit, self.left, 60) for limit in limits]

    @asynccontextmanager
    async def lifespan(self, app):
        self.events.append("started")
        yield
        self.events.append("closed")


def assembled(way, settings, **options):
    if way == "create_app":
        return create_app(settings, **options)
    app = FastAPI()
    install(app, settings, **options)
    return app


ways = pytest.mark.parametrize("way", ["create_app", "install"])


@ways
def test_given_store_counts_every_request(way):
    """For the default limit and limits of routes; the app's lifespan runs its lifespan."""
    store = Bounded(3)
    app = assembled(way, settings_of(), store=store)
    app.get("/limited", dependencies=[Depends(RateLimit("5/minute"))])(lambda: "ok")

    with TestClient(app) as client:
        running = list(store.events)
        statuses = [client.get("/limited").status_code for _ in range(2)]

    assert statuses == [200, 429]  # each request counts twice
    assert app.state.rate_limit is store
    assert (running, store.events) == (["started"], ["started", "closed"])


def test_given_store_counts_for_routes_without_a_default_limit():
    """With `rate_limit=None`, a given store still counts for routes that have a limit."""
    app = create_app(settings_of(rate_limit=None), store=Bounded(1))
    app.get("/limited", dependencies=[Depends(RateLimit("5/minute"))])(lambda: "ok")
    client = TestClient(app)

    assert "ratelimit" not in client.get("/nowhere").headers
    assert [client.get("/limited").status_code for _ in range(2)] == [200, 429]


def test_given_store_may_be_shared_by_workers(monkeypatch):
    """Only a store in memory counts separately in each worker."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a parent")
    monkeypatch.setattr("fastapi_prodkit.metrics.multiprocess.shared_directory", lambda: None)

    create_app(settings_of(), store=Bounded(1))

    with pytest.raises(SettingsError, match="RATE_LIMIT_ENABLED"):
        create_app(settings_of(), store=MemoryStore())


@ways
def test_given_registry_has_all_metrics(way):
    """Two apps are measured separately; the default registry stays empty."""
    before = _samples(REGISTRY)
    registry = CollectorRegistry()
    options = {"limits": {"max_concurrent": 1}, "metrics": {"public": True}}
    store = {"storage_url": "redis://127.0.0.1:1", "storage_timeout": 0.01, "default": "9/minute"}
    pytest.importorskip("redis")
    app = assembled(way, settings_of(**options, rate_limit=store), registry=registry)
    other = assembled(way, settings_of(**options), registry=CollectorRegistry())

    with TestClient(app) as client:
        assert client.get("/nowhere").status_code == 404
        shown = client.get("/metrics").text

    assert 'http_server_request_duration_seconds_count{http_request_method="GET"' in shown
    for name in ("http_server_queued_requests", "event_loop_blocks_total", "rate_limit_storage_up"):
        assert f"\n{name}" in shown
    assert "_unmatched" not in TestClient(other).get("/metrics").text
    assert _samples(REGISTRY) == before


def _samples(registry):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name.startswith(("http_server", "event_loop", "rate_limit"))
    }


def test_app_state_may_have_the_given_object_only():
    """If `app.state.rate_limit` holds another object than the given store, `install` raises an error."""
    store, app = Bounded(9), FastAPI()
    app.state.rate_limit = store

    install(app, settings_of(), store=store)

    other = FastAPI()
    other.state.rate_limit = Bounded(9)
    with pytest.raises(ConfigurationError, match=r"app\.state\.rate_limit exists already"):
        install(other, settings_of(), store=store)
