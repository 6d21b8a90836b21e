"""The end of a process: real servers and real signals."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from unittest.mock import AsyncMock

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from processes import free_port, listens, running
from wire import read_all, read_response, request

from fastapi_prodkit import _context
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.exceptions import SettingsWarning
from fastapi_prodkit.health import health_router
from fastapi_prodkit.sections import ShutdownSettings
from fastapi_prodkit.shutdown import Shutdown

SERVICE = """
import asyncio
import atexit
import time
from contextlib import asynccontextmanager
from fastapi import BackgroundTasks, WebSocket
from fastapi.responses import StreamingResponse
from fastapi_prodkit import Settings, create_app

@asynccontextmanager
async def lifespan(app):
    print("started", flush=True)
    await asyncio.sleep(app.state.settings.START if hasattr(app.state.settings, "START") else 0)
    yield
    print("disposed", flush=True)
    await asyncio.sleep(app.state.settings.END)

class Service(Settings):
    START: float = 0
    END: float = 0

atexit.register(print, "atexit hook called")

app = create_app(Service(), lifespan=lifespan)

@app.get("/quick")
async def quick():
    return "quick"

@app.get("/slow")
async def slow(background: BackgroundTasks):
    background.add_task(later)
    print("request begun", flush=True)
    await asyncio.sleep(1)
    return "slow"

async def later():
    await asyncio.sleep(0.3)
    print("background task finished", flush=True)

@app.get("/endless")
async def endless():
    async def forever():
        while True:
            yield b"x"
            await asyncio.sleep(0.05)
    return StreamingResponse(forever())

@app.get("/late")
async def late():
    print("request begun", flush=True)
    await asyncio.sleep(60)

@app.get("/deaf")
async def deaf():
    print("request begun", flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

@app.get("/hang")
def hang():
    print("request begun", flush=True)
    time.sleep(60)

@app.get("/block")
async def block():
    print("request begun", flush=True)
    time.sleep(60)

@app.get("/exit-slowly")
async def exit_slowly():
    atexit.register(time.sleep, 60)
    print("request begun", flush=True)

@app.websocket("/ws")
async def websocket(socket: WebSocket):
    await socket.accept()
    await socket.receive_text()
"""

QUICK = {"ENVIRONMENT": "test", "SHUTDOWN_DRAIN": "0.6", "SHUTDOWN_GRACE": "2"}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "service.py").write_text(SERVICE)
    return tmp_path


def uvicorn(directory, *arguments, **environment):
    port = free_port()
    command = ("uvicorn", "service:app", "--port", str(port), *arguments)
    return running(*command, directory=directory, port=port, **{**QUICK, **environment})


def get(port, path):
    """Return status and headers of a request on a new connection."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def events(server):
    return [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]


def wait_for(condition, timeout=15.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.system
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["one", "two-workers"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_starts_the_drain(directory, number, workers):
    """Readiness fails within half a second, requests are served with `Connection: close`, and the exit code is 0."""
    with uvicorn(directory, *workers, RATE_LIMIT_ENABLED="false", SHUTDOWN_DRAIN="1.5") as server:
        wait_for(lambda: get(server.port, "/ready")[0] == 200)

        os.kill(server.pid, number)
        wait_for(lambda: get(server.port, "/ready")[0] == 503, timeout=0.5 if not workers else 1.4)

        status, headers = get(server.port, "/quick")
        assert status == 200
        assert headers["connection"] == "close"
        assert get(server.port, "/health")[0] == 200
        assert server.wait() == 0
        assert not listens(server.port)
    assert server.process.returncode == 0


@pytest.mark.system
def test_requests_in_flight_and_their_background_tasks_finish(directory):
    """Then the app's lifespan ends."""
    with uvicorn(directory) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request("GET", "/slow"))
        wait_for(lambda: "request begun" in server.output())

        server.terminate()

        assert b'"slow"' in read_response(client)
        assert server.wait() == 0
        lines = server.output()
        assert lines.index("background task finished") < lines.index("disposed")


@pytest.mark.system
def test_endless_stream_is_cut_after_the_grace(directory):
    """Without a traceback."""
    with uvicorn(directory, SHUTDOWN_GRACE="0.5") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request("GET", "/endless"))
            client.recv(1024)
            started = time.monotonic()

            server.terminate()
            data = read_all(client)

        assert not data.endswith(b"0\r\n\r\n")
        assert server.wait() == 0
        assert 0.6 + 0.5 <= time.monotonic() - started < 6
        assert "disposed" in server.output()
        assert '"http_path":"/endless","http_status":499' in server.output()
        assert "Traceback" not in server.output()


@pytest.mark.system
def test_cut_requests_are_answered_with_503(directory):
    """Even if a handler ignores its cancellation; the log has the reason."""
    with uvicorn(directory, SHUTDOWN_DRAIN="0", SHUTDOWN_GRACE="0.3", LIMITS_ENABLED="false") as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=15) for _ in range(2)]
        for client, path in zip(clients, ("/late", "/deaf"), strict=True):
            client.sendall(request("GET", path))
        wait_for(lambda: server.output().count("request begun") == 2)

        server.terminate()

        for client in clients:
            response = read_all(client)
            client.close()
            assert response.startswith(b"HTTP/1.1 503 ")
            for header in (b"retry-after: 1", b"connection: close", b"application/problem+json", b'"request_id":"'):
                assert header in response
        assert server.wait() == 0
        lines = [event for event in events(server) if event["event"] == "request"]
        assert {(line["http_path"], line["http_status"], line["level"]) for line in lines} == {
            ("/late", 503, "warning"),
            ("/deaf", 503, "warning"),
        }
        assert all("before the process ended" in line["reason"] for line in lines)
        assert left(server) == ["exiting with 1 task(s) left, which have not ended in time"]
        assert "GET /deaf in sleep" in server.output()


@pytest.mark.system
def test_timeout_graceful_shutdown_of_uvicorn_wins(directory):
    """`--timeout-graceful-shutdown 0` of uvicorn takes precedence over SHUTDOWN_GRACE=15."""
    with uvicorn(directory, "--timeout-graceful-shutdown", "0", SHUTDOWN_GRACE="15") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request("GET", "/endless"))
            client.recv(1024)
            started = time.monotonic()

            server.terminate()

            assert server.wait() == 0
        assert time.monotonic() - started < 6


@pytest.mark.system
def test_websocket_is_closed_with_1012(directory):
    """Service restart (RFC 6455, IANA registry)."""
    websockets = pytest.importorskip("websockets.sync.client", reason="needs websockets")
    from websockets.exceptions import ConnectionClosed

    with uvicorn(directory) as server, websockets.connect(f"ws://127.0.0.1:{server.port}/ws") as client:
        server.terminate()

        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)

        assert closed.value.rcvd.code == 1012
        assert server.wait() == 0


@pytest.mark.system
def test_idle_connection_is_served_during_the_drain(directory):
    """And then closed."""
    with uvicorn(directory) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request("GET", "/quick"))
        assert b"connection: close" not in read_response(client)

        server.terminate()
        wait_for(lambda: get(server.port, "/ready")[0] == 503)
        client.sendall(request("GET", "/quick"))

        response = read_response(client)
        assert b"200 OK" in response
        assert b"connection: close" in response
        assert client.recv(1) == b""
        assert server.wait() == 0


@pytest.mark.system
def test_second_signal_ends_requests_at_once(directory):
    """They are answered, and nothing is logged as an error."""
    with (
        uvicorn(directory, SHUTDOWN_DRAIN="15") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=15) as client,
    ):
        client.sendall(request("GET", "/late"))
        started = time.monotonic()
        server.terminate()
        wait_for(lambda: get(server.port, "/ready")[0] == 503)

        server.terminate()

        assert read_all(client).startswith(b"HTTP/1.1 503 ")
        assert server.wait() == 0
        assert time.monotonic() - started < 8
        assert "Traceback" not in server.output()
        assert "error" not in {event["level"] for event in events(server)}


@pytest.mark.system
def test_signal_during_startup_ends_the_process(directory):
    """SIGTERM during a long start-up ends uvicorn within seconds, before the app has started."""
    port = free_port()
    command = ("uvicorn", "service:app", "--port", str(port))
    with running(*command, directory=directory, port=port, listening=False, START="30", **QUICK) as server:
        wait_for(lambda: "started" in server.output())
        started = time.monotonic()

        server.terminate()
        server.wait()

        assert time.monotonic() - started < 8
        assert "SIGTERM during start-up" in server.output()


def left(server):
    """Return what the process has logged about threads at its exit."""
    return [event["event"] for event in events(server) if event["event"].startswith("exiting")]


@pytest.mark.system
def test_process_exits_with_a_hanging_handler_after_the_grace(directory):
    """A thread cannot be cancelled."""
    with uvicorn(directory, SHUTDOWN_GRACE="0.3") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request("GET", "/hang"))
            wait_for(lambda: "request begun" in server.output())

            server.terminate()

            assert server.wait() == 0
        assert left(server) == ["exiting with 1 thread(s) left, which have not ended in time"]
        assert "AnyIO worker thread in hang" in server.output()
        assert "disposed" in server.output()
        assert "atexit hook called" in server.output()


@pytest.mark.system
@pytest.mark.parametrize("path", ["/hang", "/block"])
def test_second_signal_exits_with_a_hanging_handler(directory, path):
    """Even if the event loop is blocked."""
    with (
        uvicorn(directory, SHUTDOWN_DRAIN="15", SHUTDOWN_GRACE="15") as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.sendall(request("GET", path))
        wait_for(lambda: "request begun" in server.output())
        server.terminate()
        time.sleep(0.1)  # signals that come at the same time are one signal

        server.terminate()

        assert server.wait(8) == 0
        assert len(left(server)) == 1


@pytest.mark.system
def test_process_exits_with_a_hanging_lifespan(directory):
    """Two seconds after the grace."""
    with uvicorn(directory, SHUTDOWN_DRAIN="0", SHUTDOWN_GRACE="0.1", END="60") as server:
        server.terminate()

        assert server.wait(10) == 0
        assert "atexit hook called" in server.output()


@pytest.mark.system
def test_process_exits_with_hanging_atexit_hooks(directory):
    """After two seconds."""
    with uvicorn(directory, SHUTDOWN_DRAIN="0", SHUTDOWN_GRACE="3") as server:
        get(server.port, "/exit-slowly")

        server.terminate()

        assert server.wait(10) == 0
        assert left(server) == ["exiting before all atexit hooks have ended"]


@pytest.mark.system
def test_rolling_restart_loses_no_request(directory):
    """Two instances behind a load balancer that probes /ready."""
    with uvicorn(directory, SHUTDOWN_DRAIN="1") as first, uvicorn(directory) as second:
        failures, served = [], []
        stop = threading.Event()

        def probe_and_send():
            ready = {first.port: True, second.port: True}
            number = 0
            while not stop.wait(0.05):
                if number % 4 == 0:  # the load balancer probes five times a second
                    for port in ready:
                        with suppress(OSError):
                            ready[port] = get(port, "/ready")[0] == 200 if listens(port) else False
                number += 1
                chosen = [port for port, up in ready.items() if up]
                try:
                    status, _ = get(chosen[number % len(chosen)], "/quick")
                    served.append(status)
                except OSError as error:
                    failures.append(error)

        client = threading.Thread(target=probe_and_send)
        client.start()
        wait_for(lambda: len(served) > 10)

        first.terminate()
        assert first.wait() == 0
        count = len(served)
        wait_for(lambda: len(served) > count + 10)
        stop.set()
        client.join()

        assert not failures
        assert set(served) == {200}


@pytest.mark.system
def test_gunicorn_with_uvicorn_workers_drains(directory):
    """On SIGTERM gunicorn with uvicorn workers answers 503 on /ready and still serves requests in the drain."""
    pytest.importorskip("gunicorn", reason="needs gunicorn")
    pytest.importorskip("uvicorn_worker", reason="needs uvicorn-worker")
    port = free_port()
    command = (
        "gunicorn",
        "service:app",
        "--bind",
        f"127.0.0.1:{port}",
        "--worker-class",
        "uvicorn_worker.UvicornWorker",
    )
    with running(*command, directory=directory, port=port, **{**QUICK, "SHUTDOWN_DRAIN": "1.5"}) as server:
        wait_for(lambda: get(port, "/ready")[0] == 200)

        server.terminate()
        wait_for(lambda: get(port, "/ready")[0] == 503, timeout=1.4)

        assert get(port, "/quick")[0] == 200
        assert server.wait() == 0


def test_drain_starts_by_a_call():
    """From a pre-stop hook, or another server."""
    shutdown = Shutdown(ShutdownSettings(drain=0))
    app = FastAPI(lifespan=shutdown.lifespan)
    app.include_router(health_router(draining=shutdown.draining))
    told = []
    shutdown.on_drain(lambda: told.append(True))

    with TestClient(app) as client:
        before = client.get("/ready").status_code
        shutdown.drain()
        shutdown.drain()
        after = client.get("/ready").status_code

    assert (before, after, told) == (200, 503, [True])


def test_restarted_app_is_ready():
    """Tests start one app several times."""
    shutdown = Shutdown()
    app = FastAPI(lifespan=shutdown.lifespan)
    shutdown.drain()

    with TestClient(app):
        assert not shutdown.draining()


def test_drain_and_grace_above_30_seconds_warn():
    """Shutdown warns if drain plus grace exceed the 30 seconds after which ECS sends SIGKILL by default."""
    with pytest.warns(SettingsWarning, match="stopTimeout"):
        Shutdown(ShutdownSettings(drain=15, grace=20))


class Server:
    """A server other than uvicorn, whose signal handler is a method."""

    def __init__(self):
        self.signals = []

    def handle(self, number, frame):
        self.signals.append(number)


@pytest.fixture
def server():
    """The signal handler of the process while a server runs."""
    server = Server()
    previous = signal.signal(signal.SIGTERM, server.handle)
    yield server
    signal.signal(signal.SIGTERM, previous)


async def test_other_server_gets_the_signal_after_the_drain(server):
    """Its handler is restored."""
    shutdown = Shutdown(ShutdownSettings(drain=0.05))

    async with shutdown.lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        while not shutdown.draining():
            await asyncio.sleep(0)
        early = list(server.signals)
        while not server.signals:
            await asyncio.sleep(0.01)

    assert early == []
    assert server.signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == server.handle


async def test_second_signal_reaches_other_server_at_once(server):
    """A second SIGTERM during the drain reaches the handler of a server other than uvicorn without delay."""
    shutdown = Shutdown(ShutdownSettings(drain=9))

    async with shutdown.lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        while not server.signals:
            await asyncio.sleep(0)

    assert server.signals == [signal.SIGTERM]


async def test_drain_is_logged_without_a_request_id(server):
    """A drain callback runs without the context of the request that the signal interrupted."""
    contexts = []
    shutdown = Shutdown(ShutdownSettings(drain=0))
    shutdown.on_drain(lambda: contexts.append(_context.current()))

    async with shutdown.lifespan(None):
        token = _context.begin({"request_id": "interrupted"})
        signal.raise_signal(signal.SIGTERM)
        _context.end(token)
        while not contexts:
            await asyncio.sleep(0)

    assert contexts == [None]


async def test_signal_without_a_server_handler_is_unchanged():
    """Without a server's signal handler, Shutdown leaves Python's SIGTERM handler installed."""
    before = signal.getsignal(signal.SIGTERM)

    async with Shutdown().lifespan(None):
        assert signal.getsignal(signal.SIGTERM) == before


class FakeTermination:
    """Record the calls, and let this process continue."""

    calls: list[object]

    def __init__(self, loop, *, exit_code, time):
        FakeTermination.calls = [(exit_code, time)]

    def start(self):
        self.calls.append("start")

    def end_grace(self):
        self.calls.append("end grace")

    def lifespan_ended(self):
        self.calls.append("lifespan ended")


@pytest.fixture
def uvicorn_server(monkeypatch):
    """A uvicorn with its signal handler, without a socket."""
    import uvicorn

    monkeypatch.setattr("fastapi_prodkit.shutdown.Termination", FakeTermination)
    server = uvicorn.Server(uvicorn.Config(None, log_config=None))
    server.started = True
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    yield server
    signal.signal(signal.SIGTERM, previous)


async def test_stop_ends_uvicorn_within_the_grace(uvicorn_server):
    """Without the signal, which uvicorn would raise again at the end: exit code 143."""
    shutdown = Shutdown(ShutdownSettings(drain=0, grace=7))

    async with shutdown.lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        while not uvicorn_server.should_exit:
            await asyncio.sleep(0)

    assert uvicorn_server.config.timeout_graceful_shutdown == 7
    assert uvicorn_server._captured_signals == []
    assert not uvicorn_server.force_exit
    assert FakeTermination.calls == [(0, 7), "start", "lifespan ended"]


async def test_second_signal_forces_uvicorn(uvicorn_server):
    """It stops waiting for connections and tasks."""
    uvicorn_server.config.timeout_graceful_shutdown = 3

    async with Shutdown(ShutdownSettings(drain=9)).lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        while not uvicorn_server.force_exit:
            await asyncio.sleep(0)

    assert uvicorn_server.config.timeout_graceful_shutdown == 3
    assert FakeTermination.calls == [(0, 12), "start", "end grace", "lifespan ended"]


async def test_requests_are_cancelled_after_the_grace(uvicorn_server, caplog):
    """The log has their number."""

    async def app(scope, receive, send):
        await asyncio.sleep(30)

    sent = AsyncMock()
    async with Shutdown(ShutdownSettings(drain=0, grace=0.01)).lifespan(None):
        for each in range(2):  # the second one comes when the first one has been cancelled
            scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
            request = asyncio.create_task(AccessLogMiddleware(app)(scope, None, sent))
            await asyncio.sleep(0)
            if not each:
                signal.raise_signal(signal.SIGTERM)
            await asyncio.wait([request])

    assert [call.args[0].get("status") for call in sent.call_args_list] == [503, None] * 2
    assert caplog.messages.count("cancelling 1 request(s), which have not ended in time") == 2


@pytest.mark.parametrize("signals", [1, 2])
async def test_cancelled_lifespan_is_an_error_unless_forced(uvicorn_server, signals):
    """uvicorn cancels it after a second signal."""

    async def run():
        async with Shutdown(ShutdownSettings(drain=9)).lifespan(None):
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(30)

    running = asyncio.create_task(run())
    while not uvicorn_server.force_exit and signals == 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])

    assert running.cancelled() is (signals == 1)


async def test_signal_during_startup_cancels_the_lifespan(uvicorn_server):
    """SIGTERM before uvicorn has started cancels the lifespan's start-up and sets exit code 3."""
    uvicorn_server.started = False

    async def start():
        async with Shutdown().lifespan(None):
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(30)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(start())

    assert uvicorn_server.should_exit
    assert FakeTermination.calls == [(3, 0), "start", "lifespan ended"]
