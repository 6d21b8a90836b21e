"""The limits for the head of a request that uvicorn lacks, on a real server."""

import socket
import time

import pytest
from fastapi import Request, WebSocket
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

pytest.importorskip("httptools", reason="needs the extra: pip install 'fastapi-prodkit[standard]'")

import wire
from wire import read_all, read_response, request

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.cli import protocol
from fastapi_prodkit.cli.protocol import HeadLimitProtocol
from fastapi_prodkit.sections import LimitsSettings

LIMITS = LimitsSettings(max_head_size=10_000, max_headers=20)
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


async def hello(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_slow_head_times_out():
    """So does a connection without data."""
    with wire.serving(hello, http=HeadLimitProtocol, header_timeout=0.2) as port:
        with wire.connection(port) as client:
            idle = read_all(client)
        begun = ask(port, b"GET / HTTP/1.1\r\nHost: a\r\n")

    assert idle == b""
    assert begun.startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_keep_alive_applies_between_requests():
    """The next head has its own time-out."""
    with (
        wire.serving(hello, http=HeadLimitProtocol, header_timeout=0.5) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        for _ in range(2):
            client.sendall(request("GET", "/"))
            assert b"200 OK" in read_response(client)
            time.sleep(0.8)
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert read_response(client).startswith(b"HTTP/1.1 408 ")


def test_disconnect_cancels_the_head_timer():
    """A client that disconnects after its response leaves no pending head timer."""
    with wire.serving(hello, http=HeadLimitProtocol, header_timeout=0.5) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/"))
        assert b"200 OK" in read_response(client)


# Size and lines


async def echo(scope, receive, send):
    """Answer with the number of header lines and bytes of the body."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = f"{len(scope['headers'])} {size}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port():
    with wire.serving(echo, http=HeadLimitProtocol, limits=LIMITS) as port:
        yield port


def ask(port, *pieces):
    with wire.connection(port) as client:
        for piece in pieces:
            client.sendall(piece)
        return read_response(client)


def head_of(size):
    start, end = b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("in_bytes", [False, True])
def test_head_larger_than_allowed_is_a_431(port, in_bytes):
    """In any number of parts."""
    allowed, beyond = head_of(10_000), head_of(10_001)

    def in_pieces(head):
        return [head[:9_000], *(bytes([byte]) for byte in head[9_000:])] if in_bytes else [head]

    served, refused = ask(port, *in_pieces(allowed)), ask(port, *in_pieces(beyond))

    assert served.endswith(b"\r\n\r\n2 0")
    assert refused.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"\r\nconnection: close\r\n" in refused
    assert b'"status":431' in refused


@pytest.mark.parametrize(
    "start", [b"GET /" + b"x" * 9, b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"GET / HTTP/1.1\r\nX", b"\r\n"]
)
def test_endless_head_is_a_431(port, start):
    """An endless target, value, name, or empty lines; the client can read the answer."""
    filling = b"\r\n" if start == b"\r\n" else b"x"

    response = ask(port, start, *[filling * 1000] * 30)

    assert response.startswith(b"HTTP/1.1 431 ")


def test_more_lines_than_allowed_are_a_431(port):
    """The Host line counts."""
    served = ask(port, request("GET", "/", *["a: b"] * 19))
    refused = ask(port, request("GET", "/", *["a: b"] * 20))

    assert served.endswith(b"\r\n\r\n20 0")
    assert refused.startswith(b"HTTP/1.1 431 ")


def test_invalid_http_is_a_400(port):
    """Bytes that are not valid HTTP get a 400 response."""
    assert ask(port, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("first", "size"),
    [
        (request("POST", "/", body=b"x" * 300_000), b"300000"),
        (CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", b"20000"),
    ],
)
def test_body_does_not_count_as_head(port, first, size):
    """A head after it is counted anew."""
    answers = b""
    with wire.connection(port) as client:
        client.sendall(first + head_of(9_000))
        while not answers.endswith(b"\r\n\r\n2 0"):
            answers += client.recv(65_536)

    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert b" %b" % size in answers


@pytest.mark.parametrize("start", [b"1\r\nx\r\n0\r\nX: ", b"1\r\nx\r\n0\r\nX", b"1\r\nx\r\n5;x="])
def test_endless_trailers_close_the_connection(port, start):
    """Chunk extensions too; the app receives a disconnect."""
    with wire.connection(port) as client:
        client.sendall(CHUNKED + start)
        client.sendall(b"x" * 30_000)

        assert read_all(client) == b""


def test_large_head_behind_an_unanswered_request_has_no_answer():
    """The client would mistake the 431 for the earlier response."""
    with wire.serving(echo, http=HeadLimitProtocol, limits=LIMITS) as port, wire.connection(port) as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n")
        client.sendall(b"0\r\n" + b"X: y\r\n" * 10_000)

        assert read_all(client) == b""


def test_data_after_a_refusal_is_dropped(port, monkeypatch):
    """Up to a limit, for a second."""
    monkeypatch.setattr(protocol, "_MAX_DROPPED", 20_000)
    monkeypatch.setattr(protocol, "_LINGER", 60)
    with wire.connection(port) as client:
        client.sendall(head_of(20_000))
        response = read_response(client)
        with pytest.raises(OSError):
            while True:
                client.sendall(b"x" * 10_000)

    assert response.startswith(b"HTTP/1.1 431 ")


def test_refused_connection_is_closed(port, monkeypatch):
    """The server closes a refused connection a short time after the response, so the client can read it."""
    monkeypatch.setattr(protocol, "_LINGER", 0.05)
    with wire.connection(port) as client:
        client.sendall(head_of(10_001))

        assert read_all(client).startswith(b"HTTP/1.1 431 ")


def test_endless_lines_do_not_block_the_event_loop(port):
    """A valid request is served within two seconds while twenty clients send endless header lines."""
    clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
    try:
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
        started = time.perf_counter()

        response = ask(port, request("GET", "/"))

        assert time.perf_counter() - started < 2
        assert response.startswith(b"HTTP/1.1 200 ")
    finally:
        for client in clients:
            client.close()


def test_limits_can_be_switched_off():
    """A limit set to None is not applied: a head of 100 kB with 200 lines is accepted."""
    limits = LimitsSettings(max_head_size=None, max_headers=None)
    with wire.serving(echo, http=HeadLimitProtocol, limits=limits) as port:
        assert ask(port, request("GET", "/", *["a: b"] * 200, "c: " + "d" * 100_000)).endswith(b"202 0")


def test_websocket_handshake_passes():
    """Other upgrades are served without one."""
    pytest.importorskip("websockets", reason="needs websockets")
    from websockets.sync.client import connect

    app = create_app(Settings(environment="test", limits=LIMITS), registry=CollectorRegistry())

    @app.websocket("/ws")
    async def greet(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    with wire.serving(app, http=HeadLimitProtocol, limits=LIMITS) as port:
        with connect(f"ws://127.0.0.1:{port}/ws") as websocket:
            greeting = websocket.recv()
        other = ask(port, request("GET", "/health", "Connection: upgrade", "Upgrade: other"))

    assert greeting == "hello"
    assert other.startswith(b"HTTP/1.1 200 ")


# Trailers


@pytest.mark.parametrize("in_pieces", [False, True])
def test_trailers_are_dropped(in_pieces):
    """They are added to no request."""
    seen = []

    async def collect(scope, receive, send):
        assert scope["type"] == "http"
        while (await receive())["more_body"]:
            pass
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    trailers = b"0\r\nAuthorization: Bearer t\r\nX-Forwarded-For: 192.0.2.1\r\nExpect: 100-continue\r\n\r\n"
    first = CHUNKED + b"1\r\nx\r\n" + trailers
    with wire.serving(collect, http=HeadLimitProtocol, limits=LIMITS) as port, wire.connection(port) as client:
        for piece in [bytes([byte]) for byte in first] if in_pieces else [first]:
            client.sendall(piece)
        answers = [read_response(client)]
        client.sendall(request("GET", "/"))
        answers.append(read_response(client))

    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 2
    assert seen == [{b"host": b"a", b"transfer-encoding": b"chunked"}, {b"host": b"testserver"}]


def test_trailers_are_dropped_by_h11():
    """uvicorn's h11 protocol drops trailers, so a client cannot inject header fields with them."""
    pytest.importorskip("h11", reason="needs h11")
    with wire.serving(echo, http="h11") as port:
        assert ask(port, CHUNKED + b"1\r\nx\r\n0\r\nX-User: admin\r\n\r\n").endswith(b"\r\n\r\n2 1")


# Refusals


@pytest.fixture(scope="module")
def registry():
    return CollectorRegistry()


@pytest.fixture(scope="module")
def service(registry):
    """An app with an edge, behind the protocol."""
    app = create_app(Settings(environment="test", limits=LIMITS), registry=registry)

    @app.post("/items/{number}")
    async def post(number: int, request: Request):
        return len(await request.body())

    @app.post("/streams")
    async def stream(request: Request):
        async def parts():
            yield b"begun"
            await request.body()

        return StreamingResponse(parts(), headers={"content-length": "5000"})

    with wire.serving(app, http=HeadLimitProtocol, limits=LIMITS, header_timeout=0.3) as port:
        yield port


@pytest.fixture
def lines(caplog):
    """The access lines, and the lines of uvicorn."""

    def wait_for(count=1):
        deadline = time.monotonic() + 10
        while len(found := [each for each in caplog.records if each.name in LOGGERS]) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return found

    return wait_for


LOGGERS = {"fastapi_prodkit.access", "uvicorn.error", "fastapi_prodkit.serve"}
POST = b"POST /items/7?token=secret HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
KNOWN = ("POST", "/items/7", "/items/{number}")
UNKNOWN = (None, None, "_unmatched")


@pytest.mark.parametrize(
    ("sent", "known", "status", "code", "reason"),
    [
        (POST + b"X: " + b"x" * 20_000, KNOWN, 431, "head_too_large", "head larger than LIMITS_MAX_HEAD_SIZE=10000"),
        (
            POST + b"a: b\r\n" * 20 + b"\r\n",
            KNOWN,
            431,
            "head_too_large",
            "more header lines than LIMITS_MAX_HEADERS=20",
        ),
        (POST, KNOWN, 408, "head_timeout", "head not complete after --header-timeout=0.3 s"),
        (POST + b"X Y: z\r\n\r\n", KNOWN, 400, "malformed_request", "not valid HTTP: Invalid header token"),
        (b"\x16\x03\x01\r\n\r\n", UNKNOWN, 400, "malformed_request", "not valid HTTP: Invalid method encountered"),
        (b"\r\n" * 10_000, UNKNOWN, 431, "head_too_large", "head larger than LIMITS_MAX_HEAD_SIZE=10000"),
        (
            b"GET http://u:p@[ HTTP/1.1\r\n\r\n",
            UNKNOWN,
            400,
            "malformed_request",
            "not valid HTTP: the target cannot be read",
        ),
        (
            b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n",
            ("GET", "/health", "_unmatched"),
            431,
            "head_too_large",
            "more header lines than LIMITS_MAX_HEADERS=20",
        ),
        (
            POST + b"\r\n0\r\n" + b"X: y\r\n" * 5_000,
            KNOWN,
            431,
            "head_too_large",
            "trailers or chunk extensions larger than LIMITS_MAX_HEAD_SIZE=10000",
        ),
        (POST + b"\r\nxyz\r\n", KNOWN, 400, "malformed_request", "not valid HTTP: Invalid character in chunk size"),
    ],
)
def test_refusal_is_logged_and_counted(service, registry, lines, sent, known, status, code, reason):
    """With the headers of every refusal."""
    method, path, route = known
    counted = registry.get_sample_value("http_server_refusals_total", {"reason": code}) or 0

    response = ask(service, sent)

    assert response.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in response
    assert b"\r\nx-request-id: " in response
    assert b"\r\nx-content-type-options: nosniff\r\n" in response
    assert b"\r\ncontent-type: application/problem+json\r\n" in response
    [line] = lines()
    assert (line.levelname, line.http_status, line.reason, line.http_route) == ("WARNING", status, reason, route)
    assert (getattr(line, "http_method", None), getattr(line, "http_path", None)) == (method, path)
    assert line.client_ip == "127.0.0.1"
    assert line.getMessage() == f"{method or '-'} {route} {status}"
    assert "secret" not in str(vars(line))
    assert registry.get_sample_value("http_server_refusals_total", {"reason": code}) == counted + 1


def test_refusal_has_no_fields_of_earlier_requests(service, lines):
    """The log line of a refused request has no path of the previous request on the connection."""
    with wire.connection(service) as client:
        client.sendall(request("POST", "/items/7", body=b"x"))
        assert read_response(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"\x16\x03\x01")
        assert read_response(client).startswith(b"HTTP/1.1 400 ")

    assert [vars(line).get("http_path") for line in lines(2)] == ["/items/7", None]


def test_refusal_without_an_answer_is_logged(service, lines):
    """The refused request and the aborted stream each have an access line, although the client gets no answer."""
    with wire.connection(service) as client:
        client.sendall(request("POST", "/streams", body=b"x" * 10_000) + b"\x16\x03\x01")
        read_all(client)

    assert sorted(line.http_status for line in lines(2)) == [400, 499]


def test_invalid_body_during_a_response_closes_the_connection(service, lines):
    """An invalid chunk during a response closes the connection without a second response."""
    with wire.connection(service) as client:
        client.sendall(CHUNKED.replace(b" / ", b" /streams "))
        received = b""
        while b"begun" not in received:
            received += client.recv(65_536)
        client.sendall(b"xyz\r\n")
        assert read_all(client) in {b"", b"begun"}

    assert [(line.http_path, line.http_status) for line in lines()] == [("/streams", 499)]


def test_refusal_of_an_app_without_an_edge_is_logged(port, lines):
    """A refused request is logged with its method, path and reason, even without the middleware of an edge."""
    response = ask(port, head_of(20_000))

    assert response.startswith(b"HTTP/1.1 431 ")
    [line] = lines()
    assert (line.http_method, line.http_path, line.reason) == (
        "GET",
        "/",
        "head larger than LIMITS_MAX_HEAD_SIZE=10000",
    )
