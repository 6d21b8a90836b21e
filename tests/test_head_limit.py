"""The number of header lines, which our code limits whatever server runs it."""

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
    """Return header lines that make so many together with those of the client."""
    own = len(client_of().get("/").request.headers.raw)
    return [("x", "y")] * (number - own)


@pytest.mark.parametrize(("keywords", "most"), [({}, 100), ({"max_headers": 20}, 20)])
def test_as_many_lines_as_allowed(keywords, most):
    """So many lines are served, repeated ones included, and one more is a 431 problem."""
    client = client_of(**keywords)

    served, refused = client.get("/", headers=lines(most)), client.get("/", headers=lines(most + 1))

    assert (served.status_code, served.text) == (200, str(most))
    assert refused.status_code == 431
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["detail"] == "The request has too many header lines."


def test_what_passes_is_left_alone():
    """Streams, exceptions and WebSockets are as without it."""
    client = client_of()

    assert client.get("/stream").text == "ab"
    with pytest.raises(RuntimeError):
        client.get("/fail")
    with client.websocket_connect("/ws") as websocket:
        assert websocket.receive_text() == "hello"


def test_a_handshake_is_refused():
    """A WebSocket is a request as well."""
    with pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)) as refused:
        client_of(max_headers=2).websocket_connect("/ws").__enter__()

    assert refused.value.status_code == 431


def test_without_a_limit():
    """A middleware without a limit is an error, and an app without one has none."""
    with pytest.raises(ConfigurationError, match="LIMITS_MAX_HEADERS is none"):
        HeadLimitMiddleware(PlainTextResponse("ok"), LimitsSettings(max_headers=None))

    app = create_app(Settings(environment="test", limits={"max_headers": None}))
    assert TestClient(app).get("/health", headers=[("x", "y")] * 200).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/nowhere"])
def test_in_an_app_under_a_plain_server(path):
    """Whatever is asked for, the 431 has what every response has, and the next request is served."""
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
