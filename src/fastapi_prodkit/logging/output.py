"""Write log lines to standard output, each one completely or counted as lost.

A line is written by one system call, so that lines of several workers on one pipe do not mix. If the pipe is full, the
caller waits. This also holds for a non-blocking pipe: one process can make a pipe non-blocking for all that share it.
With a queue, a thread waits instead of the caller, and lines are dropped while the queue is full.
"""

import select
import sys
import threading
from collections.abc import Callable
from io import FileIO
from queue import SimpleQueue
from time import monotonic
from typing import Any

__all__ = ["LineWriter"]

CLOSE_TIME = 2.0  # seconds, longest wait for the queue when the process ends
_POLL_INTERVAL = 0.05  # seconds between two checks whether the queue was written


class LineWriter:
    """Write lines to the current `sys.stdout`. Never raises.

    Args:
        capacity: Maximum number of lines in the queue; None for no queue: the calling thread writes.

    Attributes:
        write: Function that writes or queues a line; only one thread may call it at a time.
        failed: Number of lines that were not written, or not completely.
        dropped: Number of lines that were dropped because the queue was full.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.failed = self.dropped = 0
        self._capacity = capacity or 0
        self._lines: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._writing_since: float | None = None  # when the thread began to write the current line, by `monotonic`
        self._stream: Any = None  # standard output of the last line, for which `_write_bytes` was made
        self._write_bytes = _raw_writer(None)
        self.write: Callable[[bytes], None] = self._write if capacity is None else self._queue

    def _queue(self, line: bytes) -> None:
        if self._lines.qsize() >= self._capacity:
            self.dropped += 1
        else:
            if self._thread is None or not self._thread.is_alive():  # for example after a fork
                self._start()
            self._lines.put(line)

    def close(self) -> None:
        """Wait up to two seconds until the queue has been written; later lines are written without a queue.

        The time counts from the start of the line that is being written. So if one reader blocks several queues, in one
        process or in workers and their parent, their waits run concurrently.
        """
        if self._thread is not None and self._thread.is_alive():
            written, closing = threading.Event(), monotonic()
            self._lines.put(written)
            while not written.wait(_POLL_INTERVAL):
                if monotonic() >= min(closing, self._writing_since or closing) + CLOSE_TIME:
                    return  # standard output is blocked: writing without the queue would block the calling thread
        self.write = self._write

    def _start(self) -> None:
        self._lines = SimpleQueue()  # after a fork, the parent writes the lines of the old queue
        self._thread = threading.Thread(target=self._work, name="fastapi_prodkit.log", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, bytes):
                self._writing_since = monotonic()
                self._write(line)
                self._writing_since = None
            else:
                line.set()

    def _write(self, line: bytes) -> None:
        if sys.stdout is not self._stream:
            self._stream = sys.stdout
            self._write_bytes = _raw_writer(sys.stdout)
        try:
            if (count := self._write_bytes(line)) != len(line):
                _write_rest(sys.stdout.buffer, line, count)
        except Exception:  # noqa: BLE001 - closed, or a full disk: it cannot be reported anywhere
            self.failed += 1


def _raw_writer(stream: Any) -> Callable[[bytes], int | None]:
    """Return a function that writes bytes to a stream at once and returns the number written."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer
    if isinstance(raw, FileIO):
        return raw.write  # a file or pipe: one system call, three times as fast as a buffer with flush()

    def write(line: bytes) -> int:
        if buffer is None:  # a text stream, as in tests
            stream.write(line.decode())
        else:
            buffer.write(line)
        stream.flush()
        return len(line)

    return write


def _write_rest(buffer: Any, line: bytes, count: int | None) -> None:
    """Write the rest of the line; if the pipe is non-blocking and full, wait as a blocking pipe does."""
    raw: FileIO = getattr(buffer, "raw", buffer)
    while count != len(line):
        if count is None:
            writable = select.poll()
            writable.register(raw, select.POLLOUT)
            writable.poll()
        else:
            line = line[count:]
        count = raw.write(line)
