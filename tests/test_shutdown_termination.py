"""The bounded end of a process, in this process; `test_shutdown.py` ends real ones."""

import asyncio
import atexit
import os
import threading
from time import monotonic
from unittest.mock import AsyncMock

import pytest

from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.shutdown import termination as module
from fastapi_prodkit.shutdown.termination import Termination


class Loop:
    """A fake event loop that can be closed."""

    def __init__(self, closed):
        self.closed = closed

    def is_closed(self):
        return self.closed


@pytest.fixture
def exits(monkeypatch):
    """Record exit codes; atexit hooks of other tests are not called."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: codes.append("hooks"))
    for name in ("LIFESPAN_TIME", "_SETTLE_TIME", "_SECOND_SIGNAL_TIME"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "EXIT_TIME", 5.0)
    return codes


def watch(termination):
    """Watch in a thread that the test joins."""
    watching = threading.Thread(target=termination._watch)
    watching.start()
    watching.join(10)
    assert not watching.is_alive()


def test_deadline_exits_the_process(exits, caplog):
    """The hooks are called first; remaining threads are logged with their line of code."""
    hanging = threading.Event()
    thread = threading.Thread(target=hanging.wait, name="hanging")
    thread.start()

    watch(Termination(Loop(closed=False), exit_code=3, time=0))
    hanging.set()
    thread.join()

    assert exits == ["hooks", 3]
    [record] = caplog.records
    assert record.getMessage().startswith("exiting with")
    assert any(place.startswith("hanging in wait (") for place in record.threads)


def test_server_that_has_not_returned_is_logged(exits, caplog, monkeypatch):
    """If neither a thread nor a task is left at the deadline, the server itself is late."""
    monkeypatch.setattr(module, "_places", list)

    watch(Termination(Loop(closed=False), exit_code=0, time=0))

    assert caplog.messages == ["exiting before the server has returned"]
    assert exits == ["hooks", 0]


def test_remaining_tasks_are_logged(exits, caplog):
    """A task of a request by its route, with its access line."""

    async def hang(scope=None, receive=None, send=None):
        await asyncio.get_running_loop().create_future()

    async def begin():
        app = AccessLogMiddleware(hang)
        scope = {"type": "http", "method": "GET", "path": "/hanging", "headers": []}
        return [asyncio.create_task(app(scope, None, None)), asyncio.create_task(hang(), name="own")]

    loop = asyncio.new_event_loop()
    tasks = loop.run_until_complete(begin())
    loop.run_until_complete(asyncio.sleep(0, loop))

    watch(Termination(loop, exit_code=0, time=0))
    loop.run_until_complete(cancel(tasks))
    loop.close()

    left, line, *_ = caplog.records
    assert left.getMessage().endswith("2 task(s) left, which have not ended in time")
    described = sorted(place.partition(" (")[0] for place in left.tasks)
    assert described == ["GET _unmatched in hang", "own in hang"]
    assert (line.http_path, line.http_status) == ("/hanging", 503)
    assert exits == ["hooks", 0]


async def cancel(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_request_that_blocks_the_event_loop_has_its_line(exits, caplog):
    """It is found in the frames of the main thread."""

    async def block(scope, receive, send):
        watch(Termination(asyncio.get_running_loop(), exit_code=0, time=0))
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    scope = {"type": "http", "method": "GET", "path": "/blocking", "headers": []}
    await AccessLogMiddleware(block)(scope, None, AsyncMock())

    line = next(record for record in caplog.records if hasattr(record, "http_path"))
    assert (line.http_path, line.reason) == ("/blocking", "no response: the process exited while the handler ran")


def test_threads_have_the_rest_of_the_grace(exits, monkeypatch):
    """After the lifespans have ended."""
    monkeypatch.setattr(module, "LIFESPAN_TIME", 30.0)
    termination = Termination(Loop(closed=False), exit_code=0, time=0.2)
    before = monotonic()
    termination.lifespan_ended()

    watch(termination)

    assert exits == ["hooks", 0]
    assert monotonic() - before >= 0.2


def test_end_grace_sets_an_earlier_deadline(exits):
    """After `end_grace` the process exits at once instead of at the end of its 60-second grace."""
    termination = Termination(Loop(closed=False), exit_code=0, time=60)
    termination.end_grace()

    watch(termination)

    assert exits == ["hooks", 0]


def test_program_that_continues_without_its_server_is_not_ended(exits):
    """Its event loop is closed, and its main thread runs."""
    watch(Termination(Loop(closed=True), exit_code=0, time=0))

    assert exits == []


def test_running_atexit_hooks_are_not_called_again(exits, caplog):
    """If atexit hooks still run at the deadline, the process logs a warning, skips the hooks and exits."""
    termination = Termination(Loop(closed=False), exit_code=0, time=60)
    module.EXIT_TIME = 0.01
    termination._exiting()
    module.EXIT_TIME = 5.0

    watch(termination)

    assert exits == [0]
    assert [record.getMessage() for record in caplog.records] == ["exiting before all atexit hooks have ended"]


def test_termination_starts_a_thread(exits):
    """It works while the event loop is blocked."""
    done = threading.Event()
    termination = Termination(Loop(closed=True), exit_code=0, time=60)
    termination._watch = done.set

    termination.start()

    assert done.wait(10)
