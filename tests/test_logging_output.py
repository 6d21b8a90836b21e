"""Log lines are written completely, or counted as lost."""

import http.client
import io
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from processes import free_port, listens

from fastapi_prodkit.logging import output
from fastapi_prodkit.logging.output import LineWriter

LINE = b"x" * 9_000 + b"\n"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes that do not block, under POSIX only")


@contextmanager
def pipe(monkeypatch, *, unbuffered=False):
    """Make standard output a non-blocking pipe, and yield its read end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    raw = io.FileIO(writing, "w")
    with os.fdopen(reading, "rb") as reader, io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw)) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield reader
        monkeypatch.undo()


@pytest.fixture
def writers():
    """Make writers whose threads end with the test."""
    made = []

    def make(capacity):
        made.append(LineWriter(capacity))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_full_non_blocking_pipe_blocks_the_caller(monkeypatch, unbuffered):
    """Lines arrive in one piece."""
    writer, read = LineWriter(), []

    with pipe(monkeypatch, unbuffered=unbuffered) as reader:
        writing = threading.Thread(target=lambda: [writer.write(LINE) for _ in range(30)])  # a pipe holds 7 of them
        writing.start()
        read = [reader.readline() for _ in range(30)]
        writing.join()

    assert read == [LINE] * 30
    assert (writer.failed, writer.dropped) == (0, 0)


def test_closed_reader_ends_the_wait(monkeypatch):
    """The line is counted as lost."""
    writer = LineWriter()
    with pipe(monkeypatch) as reader:
        writing = threading.Thread(target=lambda: [writer.write(LINE) for _ in range(8)])
        writing.start()
        select.select([reader], [], [], 10)

        reader.close()
        writing.join(10)

        assert not writing.is_alive()
    assert writer.failed > 0


def test_missing_standard_output_counts_lines_as_lost(monkeypatch):
    """A line written while `sys.stdout` is None increases the counter of failed lines."""
    writer = LineWriter()
    monkeypatch.setattr(sys, "stdout", None)

    writer.write(LINE)

    assert writer.failed == 1


class Gate(io.StringIO):
    """A standard output that blocks until it is opened."""

    def __init__(self):
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def write(self, text):
        self.entered.set()
        self.opened.wait()
        return super().write(text)


def test_full_queue_drops_and_counts_lines(monkeypatch, writers):
    """The caller never waits; the others arrive in order."""
    gate = Gate()
    monkeypatch.setattr(sys, "stdout", gate)
    writer = writers(2)
    writer.write(b"0")
    assert gate.entered.wait(10)

    for number in range(1, 6):
        writer.write(str(number).encode())
    gate.opened.set()
    writer.close()

    assert gate.getvalue() == "012"
    assert (writer.dropped, writer.failed) == (3, 0)


def test_closed_queue_writes_lines_at_once(monkeypatch, writers):
    """A line logged after the queue was closed is written by the calling thread, after the queued lines."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    writer = writers(2)
    writer.write(b"queued ")
    writer.close()

    writer.write(b"direct")

    assert stream.getvalue() == "queued direct"


def test_blocked_queue_is_closed_within_a_bound(monkeypatch, writers):
    """Later lines do not wait."""
    gate = Gate()
    monkeypatch.setattr(sys, "stdout", gate)
    monkeypatch.setattr(output, "CLOSE_TIME", 0.01)
    writer = writers(1)
    writer.write(b"0")
    assert gate.entered.wait(10)

    writer.close()
    writer.write(b"1")
    gate.opened.set()

    assert writer.dropped == 1  # the item that closes the queue takes one place


def test_waits_for_several_blocked_queues_run_concurrently(monkeypatch, writers):
    """The close time counts from the start of the blocked write, so a second blocked queue adds no wait."""
    gate = Gate()
    monkeypatch.setattr(sys, "stdout", gate)
    monkeypatch.setattr(output, "CLOSE_TIME", 0.3)
    both = [writers(2), writers(2)]
    for writer in both:
        writer.write(b"0")
    assert gate.entered.wait(10)
    while None in [writer._writing_since for writer in both]:
        time.sleep(0.01)

    started = time.monotonic()
    both[0].close()
    between = time.monotonic()
    both[1].close()
    gate.opened.set()

    assert between - started >= 0.1
    assert time.monotonic() - between < 0.3


def test_forked_process_has_its_own_queue(monkeypatch, writers):
    """Lines that the parent has queued are written once."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    writer = writers(2)
    writer.write(b"parent ")
    writer.close()
    writer.write = writer._queue
    monkeypatch.setattr(writer._thread, "is_alive", lambda: False)

    writer.write(b"child")
    writer.close()

    assert stream.getvalue() == "parent child"


SERVICE = """
from fastapi_prodkit import create_app

app = create_app()
"""


@pytest.mark.system
def test_service_with_a_blocked_log_serves(tmp_path):
    """A metric counts the lost lines."""
    (tmp_path / "service.py").write_text(SERVICE)
    port = free_port()
    environment = {"ENVIRONMENT": "test", "LOG_QUEUE": "10", "PYTHONPATH": str(tmp_path), "RATE_LIMIT_ENABLED": "false"}
    command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ, **environment}) as server:
        deadline = time.monotonic() + 20
        while not listens(port):
            assert time.monotonic() < deadline
            time.sleep(0.05)

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)

        def get(path):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

        for _ in range(150):  # a pipe holds 64 KiB
            get(f"/{'x' * 1_000}")

        assert json.loads(get("/health")) == {"status": "pass"}
        lost = next(
            line for line in get("/metrics").splitlines() if line.startswith('log_lines_lost_total{reason="queue_')
        )
        assert float(lost.split()[1]) > 50
        connection.close()
        server.terminate()
        assert server.wait(15) == 0
