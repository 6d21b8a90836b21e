"""The limits of a head that uvicorn lacks, on the wire."""

import socket
import time

import pytest

pytest.importorskip("httptools", reason="needs the extra: pip install 'fastapi-prodkit[standard]'")

import wire
from wire import read_all, read_response, request

from fastapi_prodkit.cli import protocol
from fastapi_prodkit.cli.protocol import PatientProtocol
from fastapi_prodkit.sections import LimitsSettings

LIMITS = LimitsSettings(max_head_size=10_000, max_headers=20)
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


async def hello(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_head_that_does_not_come_is_not_waited_for():
    """A client that sends a byte now and then holds a connection for ten seconds, not for ever; so does an idle one."""
    with wire.serving(hello, http=PatientProtocol, header_timeout=0.5) as port:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: a\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(begun)
                assert read_all(client) == b""


def test_a_kept_connection_is_not_cut():
    """Between requests it is the keep-alive that counts; a later head has its time again."""
    with (
        wire.serving(hello, http=PatientProtocol, header_timeout=0.5) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        for _ in range(2):
            client.sendall(request("GET", "/"))
            assert b"200 OK" in read_response(client)
            time.sleep(0.8)
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert read_all(client) == b""


def test_a_client_that_leaves_after_its_request():
    """There is no head to wait for any more."""
    with wire.serving(hello, http=PatientProtocol, header_timeout=0.5) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/"))
        assert b"200 OK" in read_response(client)


# Size and lines


async def echo(scope, receive, send):
    """Answer with how many header lines and bytes of a body have come."""
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
    with wire.serving(echo, http=PatientProtocol, limits=LIMITS) as port:
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
def test_a_head_as_large_as_allowed(port, in_bytes):
    """It is served, however it comes, and one byte more is a 431."""
    allowed, beyond = head_of(10_000), head_of(10_001)

    def in_pieces(head):
        return [head[:9_000], *(bytes([byte]) for byte in head[9_000:])] if in_bytes else [head]

    served, refused = ask(port, *in_pieces(allowed)), ask(port, *in_pieces(beyond))

    assert served.endswith(b"\r\n\r\n2 0")
    assert refused.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"\r\nconnection: close\r\n" in refused
    assert b'"status": 431' in refused


@pytest.mark.parametrize(
    "start", [b"GET /" + b"x" * 9, b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"GET / HTTP/1.1\r\nX", b"\r\n"]
)
def test_a_head_that_does_not_end(port, start):
    """A target, a value, a name or empty lines without an end are refused as they come; the client can read why."""
    filling = b"\r\n" if start == b"\r\n" else b"x"

    response = ask(port, start, *[filling * 1000] * 30)

    assert response.startswith(b"HTTP/1.1 431 ")


def test_header_lines(port):
    """Twenty are served, Host included, and one more is a 431."""
    served = ask(port, request("GET", "/", *["a: b"] * 19))
    refused = ask(port, request("GET", "/", *["a: b"] * 20))

    assert served.endswith(b"\r\n\r\n20 0")
    assert refused.startswith(b"HTTP/1.1 431 ")


def test_what_is_no_http_is_no_head(port):
    """It is a 400, as uvicorn has it."""
    assert ask(port, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("first", "size"),
    [
        (request("POST", "/", body=b"x" * 300_000), b"300000"),
        (CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", b"20000"),
    ],
)
def test_bodies_are_not_heads(port, first, size):
    """A body of any size passes, announced or chunked, and a head right after it is counted anew."""
    answers = b""
    with wire.connection(port) as client:
        client.sendall(first + head_of(9_000))
        while not answers.endswith(b"\r\n\r\n2 0"):
            answers += client.recv(65_536)

    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert b" %b" % size in answers


@pytest.mark.parametrize("start", [b"1\r\nx\r\n0\r\nX: ", b"1\r\nx\r\n0\r\nX", b"1\r\nx\r\n5;x="])
def test_a_body_that_brings_nothing(port, start):
    """Trailers and extensions of a chunk without an end close the connection; the app sees a disconnect."""
    with wire.connection(port) as client:
        client.sendall(CHUNKED + start)
        client.sendall(b"x" * 30_000)

        assert read_all(client) == b""


def test_a_head_that_is_too_large_behind_an_unanswered_request():
    """The client would take a 431 for the answer of the earlier one, so there is none."""
    with wire.serving(echo, http=PatientProtocol, limits=LIMITS) as port, wire.connection(port) as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n")
        client.sendall(b"0\r\n" + b"X: y\r\n" * 10_000)

        assert read_all(client) == b""


def test_what_a_refused_client_still_sends_is_dropped(port, monkeypatch):
    """Up to a bound, and for a second."""
    monkeypatch.setattr(protocol, "_MOST_DROPPED", 20_000)
    monkeypatch.setattr(protocol, "_LINGER", 60)
    with wire.connection(port) as client:
        client.sendall(head_of(20_000))
        response = read_response(client)
        with pytest.raises(OSError):
            while True:
                client.sendall(b"x" * 10_000)

    assert response.startswith(b"HTTP/1.1 431 ")


def test_a_refused_client_that_stays_is_closed(port, monkeypatch):
    """It has read the answer by then."""
    monkeypatch.setattr(protocol, "_LINGER", 0.05)
    with wire.connection(port) as client:
        client.sendall(head_of(10_001))

        assert read_all(client).startswith(b"HTTP/1.1 431 ")


def test_an_endless_line_does_not_stop_the_event_loop(port):
    """A request beside twenty clients that send one is served at once."""
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


def test_without_limits():
    """What the settings switch off is off."""
    limits = LimitsSettings(max_head_size=None, max_headers=None)
    with wire.serving(echo, http=PatientProtocol, limits=limits) as port:
        assert ask(port, request("GET", "/", *["a: b"] * 200, "c: " + "d" * 100_000)).endswith(b"202 0")
