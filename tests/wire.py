"""Run a real uvicorn in a thread, for tests at the level of HTTP messages."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn


@contextmanager
def serving(app, http="auto", header_timeout=10.0, certificate=None, limits=None) -> Iterator[int]:
    """Serve the app on a free port of 127.0.0.1, over TLS if there is a certificate, and yield the port."""
    if http == "httptools":
        pytest.importorskip("httptools", reason="needs the extra: pip install 'fastapi-prodkit[standard]'")
    quiet = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    tls = {"ssl_certfile": certificate, "ssl_keyfile": certificate}
    config = uvicorn.Config(app, port=0, ws="websockets-sansio", http=http, **quiet, **tls)
    config.header_timeout, config.limits = header_timeout, limits  # of our own protocol
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        started = threading.Event()
        original = server.startup

        async def startup(sockets=None):
            await original(sockets)
            started.set()

        server.startup = startup
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert started.wait(10), "uvicorn did not start"
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def connection(port: int) -> Iterator[socket.socket]:
    """Open a plain connection to the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        yield client


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """Return an HTTP/1.1 request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: testserver", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_response(client: socket.socket) -> bytes:
    """Read one response with a Content-Length, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(client)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += _more(client)
    return head + b"\r\n\r\n" + body


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    data = b""
    while chunk := client.recv(65536):
        data += chunk
    return data


def _more(client: socket.socket) -> bytes:
    chunk = client.recv(65536)
    assert chunk, "the server closed the connection in mid-response"
    return chunk
