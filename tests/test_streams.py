"""The end of streams, for clients and on the access line."""

import asyncio
import json
import socket
import time
from contextlib import suppress

import pytest
import wire
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.testclient import TestClient
from processes import free_port, running
from wire import read_all, request

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.streams import Stream

SERVICE = """
import asyncio
from fastapi import Depends
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from fastapi_prodkit import create_app
from fastapi_prodkit.streams import Stream

app = create_app()

async def events():
    try:
        yield b"data: first\\n\\n"
        await asyncio.sleep(60)
    finally:
        print("generator stopped", flush=True)

def stream():
    return StreamingResponse(events(), media_type="text/event-stream")

last = b"event: end\\ndata:\\n\\n"
app.get("/end", dependencies=[Depends(Stream("end", last=last))])(stream)
@app.get("/native", response_class=EventSourceResponse, dependencies=[Depends(Stream("end", last=last))])
async def native():
    try:
        yield "first"
        await asyncio.sleep(60)
    finally:
        print("generator stopped", flush=True)

app.get("/cut", dependencies=[Depends(Stream("cut"))])(stream)
app.get("/finish", dependencies=[Depends(Stream("finish"))])(stream)
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "service.py").write_text(SERVICE)
    return tmp_path


def serving(directory, **environment):
    port = free_port()
    environment = {"ENVIRONMENT": "test", "SHUTDOWN_DRAIN": "0.3", "SHUTDOWN_GRACE": "15", **environment}
    return running("uvicorn", "service:app", "--port", str(port), directory=directory, port=port, **environment)


def opened(server, path):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=15)
    client.sendall(request("GET", path))
    data = b""
    while b"first" not in data:
        data += client.recv(4096)
    return client


def access_line(output, path):
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(line for line in lines if line.get("http_path") == path)


@pytest.mark.system
@pytest.mark.parametrize(
    ("path", "rest", "status"),
    [
        ("/native", b"12\r\nevent: end\ndata:\n\n\r\n0\r\n\r\n", 200),
        ("/end", b"12\r\nevent: end\ndata:\n\n\r\n0\r\n\r\n", 200),
        ("/cut", b"", 499),
    ],
)
def test_shutdown_ends_streams_after_the_drain(directory, path, rest, status):
    """With or without a last event."""
    with serving(directory) as server, opened(server, path) as client:
        started = time.monotonic()
        server.terminate()

        assert read_all(client) == rest
        assert server.wait() == 0
        assert 0.3 <= time.monotonic() - started < 0.3 + 2 + 4  # seconds for a busy machine
        line = access_line(server.output(), path)
        assert (line["http_status"], line["end_reason"]) == (status, "shutdown")
        assert "generator stopped" in server.output()
        assert "Traceback" not in server.output()
        assert "without completing" not in server.output()


@pytest.mark.system
def test_finish_gives_a_stream_the_grace(directory):
    """Then it is cut."""
    with serving(directory, SHUTDOWN_GRACE="0.5") as server, opened(server, "/finish") as client:
        server.terminate()

        assert not read_all(client).endswith(b"0\r\n\r\n")
        assert server.wait() == 0
        assert access_line(server.output(), "/finish")["end_reason"] == "cancelled"


@pytest.mark.system
def test_disconnect_stops_the_generator(directory):
    """Within a second; the access line says so."""
    with serving(directory) as server:
        opened(server, "/end").close()

        deadline = time.monotonic() + 5
        while '"http_path":"/end"' not in server.output():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        line = access_line(server.output(), "/end")
        assert "generator stopped" in server.output()
        assert (line["http_status"], line["end_reason"]) == (499, "client_disconnected")
        assert line["response_bytes"] == len(b"data: first\n\n")
        assert 0 < line["time_to_first_byte_ms"] <= line["duration_ms"]


def made(stream, **fields):
    """Make an app with a stream with this dependency, which sends two chunks."""
    app = create_app(Settings(environment="test", **fields))

    @app.get("/stream", dependencies=[Depends(stream)])
    async def read(pause: float = 0.0, *, length: bool = False):
        async def chunks():
            yield b"data: 1\n\n"
            await asyncio.sleep(pause)
            yield b"data: 2\n\n"

        headers = {"content-length": "18"} if length else {}
        return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)

    return app


def test_access_line_of_a_complete_stream(capsys):
    """The access line of a stream that ends normally has `end_reason` complete and the number of bytes."""
    with TestClient(made(Stream("end"))) as client:
        assert client.get("/stream").text == "data: 1\n\ndata: 2\n\n"

    line = access_line(capsys.readouterr().out, "/stream")
    assert (line["response_bytes"], line["end_reason"]) == (18, "complete")


def test_response_in_one_part_is_no_stream(capsys):
    """Its access line is unchanged."""
    app = made(Stream("end"))

    @app.get("/plain", dependencies=[Depends(Stream("end", heartbeat=60))])
    async def plain():
        return "plain"

    with TestClient(app) as client:
        client.get("/plain")

    assert "end_reason" not in access_line(capsys.readouterr().out, "/plain")


def test_heartbeats_are_sent_between_chunks():
    """Heartbeats are sent while the app pauses and do not split the app's own chunks."""
    with TestClient(made(Stream(heartbeat=0.05))) as client:
        text = client.get("/stream?pause=0.3").text

    assert text.startswith("data: 1\n\n: heartbeat\n\n")
    assert ": heartbeat\n\ndata: 2\n\n" in text


def test_idle_stream_is_ended(capsys):
    """Heartbeats do not count."""
    with TestClient(made(Stream(heartbeat=0.05, idle_timeout=0.2, last=b"data: bye\n\n"))) as client:
        text = client.get("/stream?pause=30").text

    assert text.startswith("data: 1\n\n: heartbeat\n\n")
    assert text.endswith("data: bye\n\n")
    assert "data: 2" not in text
    assert access_line(capsys.readouterr().out, "/stream")["end_reason"] == "idle_timeout"


def test_comments_of_the_app_do_not_count_as_activity():
    """FastAPI sends them in silent event streams."""
    app = made(Stream("end"))

    @app.get("/pings", dependencies=[Depends(Stream(idle_timeout=0.2))])
    async def read():
        async def chunks():
            while True:
                yield b": ping\n\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    with TestClient(app) as client:
        assert client.get("/pings").text.startswith(": ping")


def test_stream_with_a_content_length_gets_no_heartbeats():
    """A stream with Content-Length gets no heartbeats, because extra bytes would exceed that length."""
    with TestClient(made(Stream("end", heartbeat=0.02))) as client:
        assert client.get("/stream?pause=0.1&length=true").text == "data: 1\n\ndata: 2\n\n"


def test_stream_that_starts_after_the_drain_is_ended(capsys):
    """After its headers."""
    app = made(Stream("end"))

    @app.get("/late", dependencies=[Depends(Stream("end", last=b"bye"))])
    async def late():
        async def chunks():
            yield b"late "
            await asyncio.sleep(30)

        app.state.shutdown.stop()
        await asyncio.sleep(0.15)
        return StreamingResponse(chunks())

    with TestClient(app) as client:
        assert client.get("/late").text in {"bye", "late bye"}


def test_idle_stream_with_a_content_length_is_cut():
    """An idle stream with Content-Length is closed at its idle time-out, as no last chunk can complete it."""
    with wire.serving(made(Stream(idle_timeout=0.1), shutdown=None)) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/stream?pause=30&length=true"))

        assert read_all(client).endswith(b"\r\n\r\ndata: 1\n\n")


@pytest.mark.parametrize(("at_shutdown", "headers"), [("finish", {}), ("end", {"content-length": "2"})])
def test_finish_and_content_length_are_not_ended(at_shutdown, headers):
    """At shutdown a stream with `finish` or with Content-Length sends all its chunks and no last chunk."""
    app = made(Stream("end"))

    @app.get("/stopping", dependencies=[Depends(Stream(at_shutdown, last=b"last"))])
    async def read():
        async def chunks():
            yield b"1"
            app.state.shutdown.stop()
            await asyncio.sleep(0)
            yield b"2"

        return StreamingResponse(chunks(), headers=headers)

    with TestClient(app) as client:
        assert client.get("/stopping").text == "12"


class Swallowing(StreamingResponse):
    """A response that swallows its cancellation."""

    async def __call__(self, scope, receive, send):
        with suppress(asyncio.CancelledError):
            await super().__call__(scope, receive, send)


@pytest.mark.parametrize("response", [StreamingResponse, Swallowing])
@pytest.mark.parametrize("behind_middleware", [False, True])
def test_cut_stream_is_incomplete_and_no_error(response, behind_middleware, capsys):
    """Even if its cancellation is swallowed."""
    app = made(Stream("end"))
    if behind_middleware:

        @app.middleware("http")
        async def call(request, call_next):
            return await call_next(request)

    @app.get("/stopping", dependencies=[Depends(Stream("cut"))])
    async def read():
        async def chunks():
            yield b"1"
            app.state.shutdown.stop()
            await asyncio.sleep(30)

        return response(chunks())

    with wire.serving(app) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/stopping"))

        assert read_all(client).endswith(b"\r\n\r\n1\r\n1\r\n")
    output = capsys.readouterr().out
    line = access_line(output, "/stopping")
    assert (line["http_status"], line["end_reason"]) == (499, "shutdown")
    assert '"level":"error"' not in output


def silent(stop=None, **arguments):
    """Make an app with a stream that has headers and no chunk."""
    app = made(Stream("end"))

    @app.get("/silent", dependencies=[Depends(Stream(**arguments))])
    async def read():
        async def chunks():
            if arguments.get("at_shutdown"):
                app.state.shutdown.stop()
            await asyncio.sleep(30)
            yield b""

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


@pytest.mark.parametrize(
    ("arguments", "text", "reason"),
    [
        ({"at_shutdown": "end"}, "bye", "shutdown"),
        ({"heartbeat": 0.2, "heartbeat_chunk": b"beat ", "idle_timeout": 0.5}, "beat beat bye", "idle_timeout"),
    ],
)
def test_stream_without_a_chunk_has_heartbeats_and_an_end(arguments, text, reason, capsys):
    """A stream that has sent only headers gets heartbeats and ends at shutdown or at its idle time-out."""
    with TestClient(silent(last=b"bye", **arguments)) as client:
        assert client.get("/silent").text == text

    assert access_line(capsys.readouterr().out, "/silent")["end_reason"] == reason


def test_cut_stream_without_a_chunk_has_no_first_byte(capsys):
    """A stream that is cut before its first chunk is logged with status 499 and without a first-byte time."""
    with wire.serving(silent(at_shutdown="cut")) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/silent"))

        assert read_all(client).endswith(b"\r\n\r\n")
    line = access_line(capsys.readouterr().out, "/silent")
    assert (line["http_status"], line["end_reason"], line["response_bytes"]) == (499, "shutdown", 0)
    assert "time_to_first_byte_ms" not in line


@pytest.mark.parametrize("chunks", [0, 1])
def test_cancelled_error_of_a_body_is_an_error(chunks, capsys):
    """One record, and an incomplete response."""
    app = made(Stream("end"))

    @app.get("/failing")
    async def read():
        async def body():
            for _ in range(chunks):
                yield b"1"
            raise asyncio.CancelledError

        return StreamingResponse(body())

    with wire.serving(app) as port, wire.connection(port) as client:
        client.sendall(request("GET", "/failing"))

        assert not read_all(client).endswith(b"0\r\n\r\n")
    output = capsys.readouterr().out
    assert output.count('"level":"error"') == 1
    assert "has its body raised a CancelledError?" in output
    assert access_line(output, "/failing")["http_status"] == 200


def test_heartbeats_end_with_the_response():
    """Before the background tasks."""
    app = made(Stream("end"))

    @app.get("/background", dependencies=[Depends(Stream(heartbeat=0.01))])
    async def read(background: BackgroundTasks):
        background.add_task(asyncio.sleep, 0.1)
        return StreamingResponse(iter([b"1", b"2"]))

    with TestClient(app) as client:
        assert client.get("/background").text.replace(": heartbeat\n\n", "") == "12"


def test_websocket_is_not_affected():
    """A Stream dependency has no effect on a WebSocket route, so a router may contain both kinds of routes."""
    app = made(Stream("end"))

    @app.websocket("/ws", dependencies=[Depends(Stream("end"))])
    async def serve(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_text("open")
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        assert websocket.receive_text() == "open"


def test_heartbeats_work_without_shutdown():
    """Heartbeats are sent even if the shutdown section is None and the server handles signals alone."""
    with TestClient(made(Stream(heartbeat=0.05), shutdown=None)) as client:
        assert ": heartbeat" in client.get("/stream?pause=0.2").text


@pytest.mark.parametrize("arguments", [("stop",), ("end", 0), ("end", None, float("inf"))])
def test_invalid_option_is_refused(arguments):
    """Stream rejects an unknown `at_shutdown` value and a time that is zero or infinite at construction."""
    at_shutdown, *seconds = arguments

    with pytest.raises(ConfigurationError, match=r"^Stream\("):
        Stream(at_shutdown, **dict(zip(("heartbeat", "idle_timeout"), seconds, strict=False)))


def test_stream_without_middleware_is_an_error():
    """A Stream without DeadlineMiddleware raises ConfigurationError, because no layer can cancel the request."""
    app = FastAPI()

    @app.get("/stream", dependencies=[Depends(Stream(heartbeat=0.05))])
    async def read():
        async def chunks():
            yield b"1"
            await asyncio.sleep(0.2)

        return StreamingResponse(chunks())

    with pytest.raises(ConfigurationError, match="add DeadlineMiddleware"):
        TestClient(app).get("/stream")
    app.middleware_stack = None
    app.add_middleware(DeadlineMiddleware)
    assert ": heartbeat" in TestClient(app).get("/stream").text


def test_stream_without_limits_has_no_effect(tmp_path):
    """With `limits=None` a Stream dependency does not change the response, as no layer can cancel the request."""
    (tmp_path / "file").write_text("content")
    app = create_app(Settings(environment="test", limits=None))

    @app.get("/file", dependencies=[Depends(Stream("end", heartbeat=0.05))])
    async def read():
        return FileResponse(tmp_path / "file")

    with TestClient(app) as client:
        assert client.get("/file").text == "content"
