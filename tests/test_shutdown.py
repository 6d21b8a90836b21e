"""How a process ends, seen from outside: real servers, real signals."""

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
    """Return status and headers; each call has a connection of its own."""
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
def test_a_signal_begins_the_drain(directory, number, workers):
    """Readiness fails within half a second, the port still answers and says that it closes, and the end is 0."""
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
    """Nothing that was accepted is lost, and the app's own lifespan ends after it."""
    with uvicorn(directory) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request("GET", "/slow"))
        wait_for(lambda: "request begun" in server.output())

        server.terminate()

        assert b'"slow"' in read_response(client)
        assert server.wait() == 0
        lines = server.output()
        assert lines.index("background task finished") < lines.index("disposed")


@pytest.mark.system
def test_an_endless_stream_is_cut_when_the_grace_is_over(directory):
    """Without a limit one open stream keeps the process until it is killed; that it is cut is no error to be traced."""
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
def test_requests_that_the_end_of_the_process_cuts_are_answered(directory):
    """Their clients are told to try again, and the log says why, also where a handler ignores its cancellation."""
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
        assert all("before the end of the process" in line["reason"] for line in lines)
        assert left(server) == ["exiting with 1 task(s) left, which have not ended in time"]
        assert "GET /deaf in sleep" in server.output()


@pytest.mark.system
def test_the_grace_that_the_server_was_given_stays(directory):
    """`--timeout-graceful-shutdown` is the user's word."""
    with uvicorn(directory, "--timeout-graceful-shutdown", "0", SHUTDOWN_GRACE="15") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request("GET", "/endless"))
            client.recv(1024)
            started = time.monotonic()

            server.terminate()

            assert server.wait() == 0
        assert time.monotonic() - started < 6


@pytest.mark.system
def test_a_websocket_is_closed_with_1012(directory):
    """The client is told to come back: service restart (RFC 6455, IANA registry)."""
    websockets = pytest.importorskip("websockets.sync.client", reason="needs websockets")
    from websockets.exceptions import ConnectionClosed

    with uvicorn(directory) as server, websockets.connect(f"ws://127.0.0.1:{server.port}/ws") as client:
        server.terminate()

        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)

        assert closed.value.rcvd.code == 1012
        assert server.wait() == 0


@pytest.mark.system
def test_a_connection_that_was_idle_is_still_served(directory):
    """A balancer's pooled connection carries a request in the drain, and is told that it was the last."""
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
def test_a_second_signal_ends_it_quickly(directory):
    """Who presses Ctrl+C twice does not want to wait for anybody; requests are told, and none of it is an error."""
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
def test_a_signal_during_the_start_ends_it(directory):
    """A task that is stopped before it is up does not first come up."""
    port = free_port()
    command = ("uvicorn", "service:app", "--port", str(port))
    with running(*command, directory=directory, port=port, listening=False, START="30", **QUICK) as server:
        wait_for(lambda: "started" in server.output())
        started = time.monotonic()

        server.terminate()
        server.wait()

        assert time.monotonic() - started < 8
        assert "SIGTERM during the start" in server.output()


def left(server):
    """Return what the process said of threads when it ended by itself."""
    return [event["event"] for event in events(server) if event["event"].startswith("exiting")]


@pytest.mark.system
def test_a_handler_that_hangs_is_left_when_the_grace_is_over(directory):
    """A thread cannot be cancelled, and neither the event loop nor the interpreter would end without it."""
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
def test_a_second_signal_leaves_a_handler_that_hangs(directory, path):
    """It is at once, also where the event loop is blocked."""
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
def test_a_lifespan_that_hangs_at_its_end_is_left(directory):
    """It has two seconds more than requests have."""
    with uvicorn(directory, SHUTDOWN_DRAIN="0", SHUTDOWN_GRACE="0.1", END="60") as server:
        server.terminate()

        assert server.wait(10) == 0
        assert "atexit hook called" in server.output()


@pytest.mark.system
def test_atexit_hooks_that_hang_are_left(directory):
    """They have two seconds, too."""
    with uvicorn(directory, SHUTDOWN_DRAIN="0", SHUTDOWN_GRACE="0.1") as server:
        get(server.port, "/exit-slowly")

        server.terminate()

        assert server.wait(10) == 0
        assert left(server) == ["exiting before all atexit hooks have ended"]


@pytest.mark.system
def test_twenty_requests_a_second_through_a_roll_lose_none(directory):
    """Two instances behind a balancer that looks at /ready: one is ended under load, and no client notices."""
    with uvicorn(directory, SHUTDOWN_DRAIN="1") as first, uvicorn(directory) as second:
        failures, served = [], []
        stop = threading.Event()

        def probe_and_send():
            ready = {first.port: True, second.port: True}
            number = 0
            while not stop.wait(0.05):
                if number % 4 == 0:  # the balancer's probe, five times a second
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
    """Its workers take signals as uvicorn does."""
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


def test_drain_without_a_signal():
    """A pre-stop hook, or a server that keeps its signals to itself, begins the drain with a call."""
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


def test_an_app_that_starts_again_is_ready_again():
    """Tests start one app many times."""
    shutdown = Shutdown()
    app = FastAPI(lifespan=shutdown.lifespan)
    shutdown.drain()

    with TestClient(app):
        assert not shutdown.draining()


def test_more_time_than_ecs_gives_is_warned_about():
    """A drain and a grace that end after SIGKILL protect nobody."""
    with pytest.warns(SettingsWarning, match="stopTimeout"):
        Shutdown(ShutdownSettings(drain=15, grace=20))


class Server:
    """A server that takes signals with a method of its own, and is not uvicorn."""

    def __init__(self):
        self.signals = []

    def handle(self, number, frame):
        self.signals.append(number)


@pytest.fixture
def server():
    """The process's own handler while a server runs."""
    server = Server()
    previous = signal.signal(signal.SIGTERM, server.handle)
    yield server
    signal.signal(signal.SIGTERM, previous)


async def test_another_server_gets_its_signal_when_the_drain_is_over(server):
    """Whoever took the signal before us has it in the end, and has its handler back."""
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


async def test_a_second_signal_reaches_another_server_at_once(server):
    """It can then end as quickly as it knows how."""
    shutdown = Shutdown(ShutdownSettings(drain=9))

    async with shutdown.lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        while not server.signals:
            await asyncio.sleep(0)

    assert server.signals == [signal.SIGTERM]


async def test_a_drain_is_no_part_of_the_request_that_the_signal_interrupts(server):
    """What is logged about it does not carry that request's id."""
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


async def test_a_signal_that_no_server_takes_is_left_alone():
    """Python's own handlers end a script as they always did."""
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
    """A uvicorn whose handler has the signal, without its socket."""
    import uvicorn

    monkeypatch.setattr("fastapi_prodkit.shutdown.Termination", FakeTermination)
    server = uvicorn.Server(uvicorn.Config(None, log_config=None))
    server.started = True
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    yield server
    signal.signal(signal.SIGTERM, previous)


async def test_stop_ends_uvicorn_within_the_grace(uvicorn_server):
    """It is not given the signal, which it would raise again in the end: that is exit code 143."""
    shutdown = Shutdown(ShutdownSettings(drain=0, grace=7))

    async with shutdown.lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        while not uvicorn_server.should_exit:
            await asyncio.sleep(0)

    assert uvicorn_server.config.timeout_graceful_shutdown == 7
    assert uvicorn_server._captured_signals == []
    assert not uvicorn_server.force_exit
    assert FakeTermination.calls == [(0, 7), "start", "lifespan ended"]


async def test_a_second_signal_forces_uvicorn(uvicorn_server):
    """It stops waiting for connections and tasks."""
    uvicorn_server.config.timeout_graceful_shutdown = 3

    async with Shutdown(ShutdownSettings(drain=9)).lifespan(None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        while not uvicorn_server.force_exit:
            await asyncio.sleep(0)

    assert uvicorn_server.config.timeout_graceful_shutdown == 3
    assert FakeTermination.calls == [(0, 12), "start", "end grace", "lifespan ended"]


async def test_requests_are_cancelled_when_the_grace_is_over(uvicorn_server, caplog):
    """The client has an answer, and the log their number."""

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
async def test_a_server_that_was_forced_cancels_the_lifespan(uvicorn_server, signals):
    """That is how it ends after a second signal, and no error; at another time it is one."""

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


async def test_a_signal_during_the_start_cancels_it(uvicorn_server):
    """The lifespan that is under way is given up."""
    uvicorn_server.started = False

    async def start():
        async with Shutdown().lifespan(None):
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(30)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(start())

    assert uvicorn_server.should_exit
    assert FakeTermination.calls == [(3, 0), "start", "lifespan ended"]
