"""End the process within a bounded time after a signal, whatever keeps it alive.

A server that ends waits for more than its requests: the event loop waits for the threads of `def` handlers, a lifespan
for whatever it awaits, the interpreter for threads and `atexit` hooks. None of these waits has a time-out, and a second
signal ends none of them. So a separate thread waits for a deadline: if the process still runs then, the thread logs
which threads and tasks are left, runs the `atexit` hooks, flushes the standard streams and exits.
"""

import _thread
import asyncio
import atexit
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from types import FrameType
from typing import Any

from fastapi_prodkit._asgi import route_template
from fastapi_prodkit._pipeline.in_flight import abandon, exchanges_in, frames_of

__all__ = ["EXIT_TIME", "FAILED_START", "Termination"]

LIFESPAN_TIME = 2.0  # seconds that lifespans may take to end when the grace is over
FAILED_START = 3  # uvicorn's exit code after a failed start; a parent of workers stops if one exits with this code
EXIT_TIME = 2.0  # seconds that the `atexit` hooks may take
_SETTLE_TIME = 0.5  # seconds that server and interpreter may take when the lifespans have ended
_SECOND_SIGNAL_TIME = 1.0  # seconds that the server may take to end when it no longer waits for requests

_logger = logging.getLogger("fastapi_prodkit.shutdown")


class Termination:
    """Exit the process at a deadline, unless it has ended by itself, or continues without its server.

    Its methods may be called in any thread and in a signal handler: they take no lock.

    Args:
        loop: The event loop of the server.
        exit_code: The exit code of the process at the deadline.
        time: Time until the grace of requests in flight is over, seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, exit_code: int, time: float) -> None:
        self._loop = loop
        self._exit_code = exit_code
        self._grace_end = monotonic() + time
        self._deadlines: SimpleQueue[float] = SimpleQueue()
        self._ready_to_exit = threading.Event()
        self._cleaned_up = threading.Event()
        self._in_hooks = False  # the interpreter has begun to call the `atexit` hooks by itself

    def start(self) -> None:
        """Start the thread that waits for the deadline."""
        # Not Thread.start, which takes a lock that the interrupted code may hold.
        _thread.start_new_thread(self._watch, ())

    def end_grace(self) -> None:
        """Set the deadline as if the grace of requests were over. Called at the second signal."""
        self._grace_end = monotonic()
        self._deadlines.put(self._grace_end + _SECOND_SIGNAL_TIME)

    def lifespan_ended(self) -> None:
        """Set the deadline to the end of the grace, for threads. Called when the lifespans have ended."""
        self._deadlines.put(max(self._grace_end, monotonic() + _SETTLE_TIME))

    def _exiting(self) -> None:
        """Set the deadline for the `atexit` hooks. Called by the interpreter, before the other hooks."""
        self._in_hooks = True
        self._deadlines.put(monotonic() + EXIT_TIME)

    def _watch(self) -> None:
        # Started now, because no thread can be started while the interpreter exits.
        threading.Thread(target=self._clean_up, name="fastapi_prodkit.termination", daemon=True).start()
        atexit.register(self._exiting)
        deadline = self._grace_end + LIFESPAN_TIME
        with suppress(Empty):
            while True:
                deadline = self._deadlines.get(timeout=max(0.0, deadline - monotonic()))
        if self._loop.is_closed() and threading.main_thread().is_alive():
            atexit.unregister(self._exiting)
            return  # the program continues without its server
        self._ready_to_exit.set()
        self._cleaned_up.wait(EXIT_TIME)
        os._exit(self._exit_code)

    def _clean_up(self) -> None:
        self._ready_to_exit.wait()
        try:
            self._log_what_is_left()
            self._abandon()
            if not self._in_hooks:
                atexit.unregister(self._exiting)
                atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way to run them
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            self._cleaned_up.set()

    def _log_what_is_left(self) -> None:
        if self._in_hooks:
            _logger.warning("exiting before all atexit hooks have ended")
            return
        threads, tasks = dict(_places()), asyncio.all_tasks(self._loop)
        counts = {"thread": sum(each is not threading.main_thread() for each in threads), "task": len(tasks)}
        left = " and ".join(f"{count} {kind}(s)" for kind, count in counts.items() if count)
        fields = {"threads": list(threads.values()), "tasks": [_describe(task) for task in tasks]}
        text = f"with {left} left, which have not ended in time" if left else "before the server has returned"
        _logger.warning("exiting %s", text, extra=fields)

    def _abandon(self) -> None:
        """Finish each request whose handler has not ended, so that its access line is written."""
        running = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - see _places
        for frames in (_stack(running), *map(frames_of, asyncio.all_tasks(self._loop))):
            for exchange in exchanges_in(frames):
                abandon(exchange)


def _places() -> Iterator[tuple[threading.Thread, str]]:
    """Yield each thread for which the interpreter would wait, with its name and its current line of code."""
    frames = sys._current_frames()  # noqa: SLF001 - documented, for debuggers and profilers
    for thread in threading.enumerate():
        if not thread.daemon and thread.ident in frames:
            place = traceback.extract_stack(frames[thread.ident])[-1]
            yield thread, f"{thread.name} in {place.name} ({place.filename}:{place.lineno})"


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(task: "asyncio.Task[Any]") -> str:
    """Return the name of a task, or the request that it serves, with its current line of code."""
    frames = list(frames_of(task))
    served = next(exchanges_in(frames), None)
    name = task.get_name()
    if served is not None:
        name = f"{served.scope.get('method', 'WebSocket')} {route_template(served.scope, served.root_path)}"
    places = (f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})" for frame in frames[-1:])
    return name + "".join(places)
