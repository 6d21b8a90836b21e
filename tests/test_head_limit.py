"""The limit of header lines, under any server."""

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from wire import connection, read_response, request, serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.head_limit import HeadLimitMiddleware
from fastapi_prodkit.sections import LimitsSettings


async def count(request):
    return PlainTextResponse(str(len(request.scope["headers"])))


async def stream(request):
    return StreamingResponse(iter([b"a", b"b"]))


async def fail(request):
    raise RuntimeError


async def greet(websocket):
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def client_of(**keywords):
    routes = [Route("/", count), Route("/stream", stream), Route("/fail", fail), WebSocketRoute("/ws", greet)]
    app = Starlette(routes=routes, middleware=[Middleware(HeadLimitMiddleware, **keywords)])
    return TestClient(app)


def lines(number):
    """Return header lines that, with those of the client, are so many."""
    own = len(client_of().get("/").request.headers.raw)
    return [("x", "y")] * (number - own)


@pytest.mark.parametrize(("keywords", "most"), [({}, 100), ({"max_headers": 20}, 20)])
def test_more_lines_than_allowed_are_a_431_problem(keywords, most):
    """Repeated lines count."""
    client = client_of(**keywords)

    served, refused = client.get("/", headers=lines(most)), client.get("/", headers=lines(most + 1))

    assert (served.status_code, served.text) == (200, str(most))
    assert refused.status_code == 431
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["detail"] == "The request has too many header lines."


def test_allowed_requests_pass_unchanged():
    """Streams, exceptions and WebSockets."""
    client = client_of()

    assert client.get("/stream").text == "ab"
    with pytest.raises(RuntimeError):
        client.get("/fail")
    with client.websocket_connect("/ws") as websocket:
        assert websocket.receive_text() == "hello"


def test_handshake_with_too_many_lines_is_refused():
    """A WebSocket handshake with more header lines than max_headers is refused with status 431."""
    with pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)) as refused:
        client_of(max_headers=2).websocket_connect("/ws").__enter__()

    assert refused.value.status_code == 431


def test_middleware_without_a_limit_fails_at_construction():
    """An app without a limit has no such layer."""
    with pytest.raises(ConfigurationError, match="LIMITS_MAX_HEADERS is none"):
        HeadLimitMiddleware(PlainTextResponse("ok"), LimitsSettings(max_headers=None))

    app = create_app(Settings(environment="test", limits={"max_headers": None}))
    assert TestClient(app).get("/health", headers=[("x", "y")] * 200).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/nowhere"])
def test_431_has_the_headers_of_the_edge(path):
    """The next request is served."""
    registry = CollectorRegistry()
    app = create_app(Settings(environment="test"), registry=registry)
    app.add_api_route("/", lambda: "ok")
    with serving(app, http="h11") as port, connection(port) as client:
        client.sendall(request("GET", path, *["x: y"] * 100))
        refused = read_response(client)
        client.sendall(request("GET", "/"))
        served = read_response(client)

    assert refused.startswith(b"HTTP/1.1 431 ")
    assert b"\r\nx-request-id: " in refused
    assert b"\r\nx-content-type-options: nosniff" in refused
    assert served.startswith(b"HTTP/1.1 200 ")
    assert registry.get_sample_value("http_server_refusals_total", {"reason": "head_too_large"}) == 1
