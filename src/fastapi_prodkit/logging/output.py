"""How lines of the log reach standard output: each of them whole, or counted as lost.

A line is one system call, so that lines of several workers on one pipe do not mix. A pipe that is full makes the caller
wait, also where it is non-blocking, which it is for every process that shares it as soon as one of them has made it so.
With a queue a thread waits instead, and lines for which the queue has no place are dropped.
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

CLOSE_TIME = 2.0  # seconds that the lines of a queue may take to be written when the process ends
_LOOK_TIME = 0.05  # seconds between two looks at a queue that is being written


class LineWriter:
    """Write lines to standard output, whatever that is at the time. Never raises.

    Args:
        capacity: How many lines may wait for a thread to write them; None writes in the calling thread.

    Attributes:
        write: Write a line, or queue it. To be called by one thread at a time.
        failed: Lines that could not be written, or not as a whole.
        dropped: Lines for which the queue had no place.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.failed = self.dropped = 0
        self._capacity = capacity or 0
        self._lines: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._writing_since: float | None = None  # the thread has begun a line, on the clock of `monotonic`
        self._stream: Any = None  # the standard output of the last line, and the short way to it
        self._write_bytes = _raw_writer(None)
        self.write: Callable[[bytes], None] = self._write if capacity is None else self._queue

    def _queue(self, line: bytes) -> None:
        if self._lines.qsize() >= self._capacity:
            self.dropped += 1
        else:
            if self._thread is None or not self._thread.is_alive():  # as in a process that was forked
                self._start()
            self._lines.put(line)

    def close(self) -> None:
        """Wait until the queue has been written, for two seconds at most; later lines are written without a queue.

        The time counts from the beginning of the line that is being written: queues of one process, or of workers and
        their parent, that wait for the same reader wait at the same time, and not one after the other.
        """
        if self._thread is not None and self._thread.is_alive():
            written, closing = threading.Event(), monotonic()
            self._lines.put(written)
            while not written.wait(_LOOK_TIME):
                if monotonic() >= min(closing, self._writing_since or closing) + CLOSE_TIME:
                    return  # nobody reads standard output: a line without the queue would stop its thread for ever
        self.write = self._write

    def _start(self) -> None:
        self._lines = SimpleQueue()  # what the parent of a forked process has queued is the parent's to write
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
        except Exception:  # noqa: BLE001 - closed, or gone, or a full disk: there is no place to say so
            self.failed += 1


def _raw_writer(stream: Any) -> Callable[[bytes], int | None]:
    """Return what writes to a stream, at once, and says how much of a line it has written."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer in between
    if isinstance(raw, FileIO):
        return raw.write  # a file or pipe: one system call, where a buffer that is flushed takes three times as long

    def write(line: bytes) -> int:
        if buffer is None:  # a stream of text only, as tests put there
            stream.write(line.decode())
        else:
            buffer.write(line)
        stream.flush()
        return len(line)

    return write


def _write_rest(buffer: Any, line: bytes, count: int | None) -> None:
    """Write what is left of the line, and wait for the reader of a non-blocking pipe as a blocking one does."""
    raw: FileIO = getattr(buffer, "raw", buffer)
    while count != len(line):
        if count is None:
            writable = select.poll()
            writable.register(raw, select.POLLOUT)
            writable.poll()
        else:
            line = line[count:]
        count = raw.write(line)
