"""The monitor of the event loop: its delay, and the stack of a callback that blocks it."""

import asyncio
import json
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from clock import Clock
from fastapi import FastAPI
from fastapi.testclient import TestClient
from processes import free_port, running
from prometheus_client import CollectorRegistry

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.event_loop import EventLoop
from fastapi_prodkit.health import health_router
from fastapi_prodkit.sections import EventLoopSettings, HealthSettings

QUICK = EventLoopSettings(limit=0.05)
PATIENCE = 20.0  # seconds


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def lines(caplog):
    """Return the lines that were logged so far."""
    caplog.set_level(logging.WARNING, "fastapi_prodkit.event_loop")
    return lambda word: [record for record in caplog.records if f"event loop {word} blocked" in record.getMessage()]


def wait_for(condition):
    """Block the event loop until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


async def until(condition):
    """Run the event loop until the condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


# A blocked loop


async def test_stack_is_logged_while_the_loop_is_blocked(lines, registry):
    """The record with the stack is logged before the blocking callback ends, so an endless block is visible."""
    event_loop = EventLoop(QUICK, registry=registry)

    def in_the_way():
        wait_for(lambda: lines("is"))

    async with event_loop.lifespan(None):
        await asyncio.sleep(0)
        in_the_way()

    record = lines("is")[0]
    calls = [line.rpartition(" in ")[2] for line in record.stack_info.splitlines() if line.startswith("  File ")]
    assert "for more than 0.05 s already, in " in record.getMessage()
    assert calls[:3] == ["test_stack_is_logged_while_the_loop_is_blocked", "in_the_way", "wait_for"]
    assert "    wait_for(lambda: lines(" in record.stack_info
    assert record.pathname == __file__


async def test_block_is_logged_once_while_it_lasts_and_once_after_it(lines, registry):
    """Each block of the event loop logs one line while the block lasts and one line after its end."""
    event_loop = EventLoop(QUICK, registry=registry)
    counts = []

    async with event_loop.lifespan(None):
        for number in (1, 2):
            wait_for(lambda: len(lines("is")) == number)  # noqa: B023 - called within the turn
            time.sleep(0.3)  # six limits more
            await until(lambda: len(lines("was")) == number)  # noqa: B023 - called within the turn
            counts.append((len(lines("is")), len(lines("was"))))

    assert counts == [(1, 1), (2, 2)]
    assert registry.get_sample_value("event_loop_blocks_total") == 2


async def test_code_that_holds_the_gil_is_logged_afterwards(lines, registry):
    """And counted."""
    event_loop = EventLoop(QUICK, registry=registry)

    async with event_loop.lifespan(None):
        used = time.thread_time()
        while time.thread_time() - used < 0.2:
            sum(range(10_000_000))
        await until(lambda: lines("was"))

    assert event_loop.warning() is not None
    assert registry.get_sample_value("event_loop_blocks_total") == 1


async def test_running_loop_logs_nothing(lines, registry):
    """The metric still shows the delay."""
    event_loop = EventLoop(EventLoopSettings(limit=2), registry=registry)

    async with event_loop.lifespan(None):
        await asyncio.sleep(0.1)
        time.sleep(0.6)
        await until(lambda: registry.get_sample_value("event_loop_lag_seconds") > 0)

    assert registry.get_sample_value("event_loop_lag_seconds") < 2
    assert registry.get_sample_value("event_loop_blocks_total") == 0
    assert event_loop.warning() is None
    assert lines("is") == lines("was") == []


async def test_metric_shows_the_longest_delay_of_a_minute(registry):
    """event_loop_lag_seconds keeps the longest delay for a minute, so that a scrape does not miss the delay."""
    clock = Clock()
    event_loop = EventLoop(EventLoopSettings(limit=0.4), registry=registry, clock=clock)

    def lag(after=0):
        clock.now += after
        return registry.get_sample_value("event_loop_lag_seconds")

    async with event_loop.lifespan(None):
        time.sleep(0.6)
        await until(lambda: lag() >= 0.3)
        clock.now += 60
        await asyncio.sleep(0.3)
        after_a_minute = lag()
        await until(lambda: lag(after=1) < 0.3)

    assert after_a_minute >= 0.3


async def test_liveness_warns_of_a_block_for_a_minute(lines, registry):
    """With 200; the duration is in the details."""
    clock = Clock()
    event_loop = EventLoop(QUICK, registry=registry, clock=clock)
    app = FastAPI()
    app.include_router(health_router(HealthSettings(details=True), warning=event_loop.warning))
    async with event_loop.lifespan(None):
        wait_for(lambda: lines("is"))
        await until(lambda: lines("was"))
    client = TestClient(app)

    soon = client.get("/health")
    clock.now += 60
    later = client.get("/health")

    assert (soon.status_code, soon.json()["status"]) == (200, "warn")
    assert soon.json()["output"].startswith("the event loop was blocked for ")
    assert later.json() == {"status": "pass"}


# Lifespan


async def test_lifespan_ends_thread_and_timer(registry):
    """The end of a lifespan stops the watch thread and the timer, and the next lifespan starts new ones."""
    event_loop = EventLoop(QUICK, registry=registry)
    during = []

    for _ in range(2):
        async with event_loop.lifespan(None):
            during += [thread.daemon for thread in threading.enumerate() if thread.name == "event loop watch"]

    assert during == [True, True]
    assert "event loop watch" not in {thread.name for thread in threading.enumerate()}
    assert [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()] == []


def test_monitor_ends_with_the_thread_of_the_loop(registry):
    """Even if the lifespan has not ended."""
    event_loop = EventLoop(QUICK, registry=registry)
    loop = asyncio.new_event_loop()
    lifespan = event_loop.lifespan(None)
    thread = threading.Thread(target=lambda: loop.run_until_complete(lifespan.__aenter__()))

    thread.start()
    thread.join()

    wait_for(lambda: "event loop watch" not in {thread.name for thread in threading.enumerate()})
    loop.run_until_complete(lifespan.__aexit__(None, None, None))
    loop.close()


async def test_disabled_logger_takes_no_stack(caplog, registry):
    """The block is counted."""
    caplog.set_level(logging.ERROR, "fastapi_prodkit.event_loop")
    event_loop = EventLoop(QUICK, registry=registry)

    async with event_loop.lifespan(None):
        time.sleep(0.5)
        await until(lambda: event_loop.warning() is not None)

    assert caplog.records == []


async def test_two_apps_share_the_metrics(registry):
    """Two EventLoop objects can use one registry, which registers each metric only once."""
    first, second = EventLoop(registry=registry), EventLoop(registry=registry)

    async with first.lifespan(None), second.lifespan(None):
        await asyncio.sleep(0)

    assert registry.get_sample_value("event_loop_lag_seconds") >= 0


# In the whole app


def test_create_app_monitors_the_loop():
    """Unless EVENT_LOOP_ENABLED=false."""
    settings = Settings(_env_file=None, environment="test", rate_limit=None)
    watches = []

    for event_loop in (settings.event_loop, None):
        with TestClient(create_app(settings.model_copy(update={"event_loop": event_loop}))) as client:
            watches.append([thread.name for thread in threading.enumerate() if thread.name == "event loop watch"])
            assert client.get("/health").json() == {"status": "pass"}

    assert watches == [["event loop watch"], []]


# Real processes

SERVICE = """
import time
from fastapi_prodkit import create_app

app = create_app()

@app.get("/hang")
async def hang():
    block_for_ever()

def block_for_ever():
    while True:
        time.sleep(0.01)

@app.get("/block")
async def block(seconds: float):
    time.sleep(seconds)
"""


@contextmanager
def service(directory, *arguments, **environment):
    pytest.importorskip("uvicorn")
    (directory / "service.py").write_text(SERVICE)
    port = free_port()
    command = ("uvicorn", "service:app", "--port", str(port), *arguments)
    with running(*command, directory=directory, port=port, ENVIRONMENT="test", **environment) as server:
        yield server


def get(server, path, timeout=10.0):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=timeout) as response:
        return json.load(response)


def logged(server, word):
    events = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    return [event for event in events if f"event loop {word} blocked" in event["event"]]


@pytest.mark.system
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_hanging_process_logs_its_stack(tmp_path, loop):
    """Liveness does not answer."""
    pytest.importorskip(loop)
    with service(tmp_path, "--loop", loop, EVENT_LOOP_LIMIT="0.3") as server:
        with pytest.raises(TimeoutError):
            get(server, "/hang", timeout=0.5)

        wait_for(lambda: logged(server, "is"))
        with pytest.raises(TimeoutError):
            get(server, "/health", timeout=0.5)

        [event] = logged(server, "is")
        assert event["level"] == "warning"
        assert "in hang\n    block_for_ever()" in event["stack"]
        assert "in block_for_ever\n" in event["stack"]
        assert "run_until_complete" not in event["stack"]


@pytest.mark.system
def test_service_warns_after_a_block(tmp_path):
    """In liveness, with 200, and in the metrics."""
    with service(tmp_path, EVENT_LOOP_LIMIT="0.3") as server:
        before = get(server, "/health")

        get(server, "/block?seconds=1")
        wait_for(lambda: logged(server, "was"))

        after = get(server, "/health")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
            metrics = response.read().decode()
        assert before == {"status": "pass"}
        assert after["status"] == "warn"
        assert "event_loop_blocks_total 1.0" in metrics
        lag = next(line for line in metrics.splitlines() if line.startswith("event_loop_lag_seconds "))
        assert float(lag.split()[1]) > 0.3


@pytest.mark.system
def test_paused_process_was_not_blocked(tmp_path):
    """By SIGSTOP, a suspended machine, or lack of CPU time."""
    with service(tmp_path, EVENT_LOOP_LIMIT="0.4") as server:
        assert get(server, "/health") == {"status": "pass"}

        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(1.2)  # three limits; nothing could tell that they are over
        os.kill(server.pid, signal.SIGCONT)

        assert get(server, "/health") == {"status": "pass"}
        time.sleep(0.3)  # three beats
        assert logged(server, "is") == logged(server, "was") == []
