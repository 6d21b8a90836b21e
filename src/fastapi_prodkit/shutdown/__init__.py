"""End a process without losing a request: readiness fails first, the port closes last.

On SIGTERM a server closes its port at once, while load balancers go on sending for as long as they have not noticed.
So the signal is taken here first: for `drain` seconds `/ready` says 503, every response says `Connection: close`, and
the port keeps answering. Then the server is told to end; it has `grace` seconds for the requests in flight. What has
not ended by then, such as a `def` handler that hangs, or lifespans and `atexit` hooks two seconds later, is left.

ECS, like Docker and Kubernetes, sends SIGKILL some time after SIGTERM: 30 seconds unless `stopTimeout` says otherwise.
"""

import asyncio
import logging
import signal
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from types import FrameType, MethodType
from typing import Any

from fastapi_prodkit._pipeline.in_flight import cut_requests
from fastapi_prodkit.exceptions import SettingsWarning
from fastapi_prodkit.sections import ShutdownSettings
from fastapi_prodkit.shutdown.termination import FAILED_START, Termination

__all__ = ["STOP_TIMEOUT", "Shutdown"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CUT_TIME = 0.05  # seconds between two looks at requests that are left when the grace is over
STOP_TIMEOUT = 30.0  # seconds; the default of `stopTimeout` in an ECS task definition

_logger = logging.getLogger(__name__)


class Shutdown:
    """Take the signals that end the process, and let the server have them when the drain is over.

    It works in the main thread of a server that takes signals with Python's `signal` module, as uvicorn does, by
    itself, in its workers, under `fastapi run` and in gunicorn's uvicorn workers. Elsewhere `drain()` begins the same.

    Args:
        settings: How long to drain, and how long requests in flight may take after that.
    """

    def __init__(self, settings: ShutdownSettings | None = None) -> None:
        self._settings = settings or ShutdownSettings()
        self._callbacks: list[Callable[[], None]] = []
        self._stop_callbacks: dict[int, Callable[[], None]] = {}
        self._draining = False
        total = self._settings.drain + self._settings.grace
        if total > STOP_TIMEOUT:
            warnings.warn(
                f"SHUTDOWN_DRAIN and SHUTDOWN_GRACE are {total:g} s together: ECS kills a task after "
                f"{STOP_TIMEOUT:g} s unless stopTimeout says otherwise; shorten them, or raise it (Fargate: to 120 s)",
                SettingsWarning,
                stacklevel=2,
            )

    def draining(self) -> bool:
        """Say whether the process is about to end: `health_router(draining=shutdown.draining)`."""
        return self._draining

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Have the callback called, in the event loop, when the drain begins."""
        self._callbacks.append(callback)

    @contextmanager
    def at_stop(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have the callback called, in the event loop, if the drain is over before the context ends."""
        self._stop_callbacks[id(callback)] = callback
        try:
            yield
        finally:
            del self._stop_callbacks[id(callback)]

    def stop(self) -> None:
        """Say that the drain is over: streams end as their routes want it. The process goes on."""
        for callback in list(self._stop_callbacks.values()):
            callback()

    def drain(self) -> None:
        """Begin to drain without a signal; the process goes on until it is told to end."""
        if not self._draining:
            self._draining = True
            _logger.info(
                "shutting down: /ready returns 503, accepting requests for %g more seconds", self._settings.drain
            )
            for callback in self._callbacks:
                callback()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Take the signals while the app runs: `FastAPI(lifespan=shutdown.lifespan)`.

        It has to be the first of several lifespans: a signal during the start of the others ends that start.
        """
        self._draining = False
        signals = _Signals(self, self._settings)
        signals.take()
        try:
            yield
        except asyncio.CancelledError:
            if not signals.forced:
                raise
        finally:
            signals.give_back()


class _Signals:
    """The signals of one run of the app: the first begins the drain, the second ends it."""

    def __init__(self, shutdown: Shutdown, settings: ShutdownSettings) -> None:
        self._shutdown = shutdown
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.current_task()
        self._taken: dict[int, MethodType] = {}
        self._repeated = False
        self._termination: Termination | None = None
        self._cutting: asyncio.TimerHandle | None = None
        self.forced = False  # a second signal has ended the server, which then cancels the lifespan

    def take(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to no other
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if isinstance(handler, MethodType):  # a server's, not one of Python's or of the event loop's own
                self._taken[number] = handler
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        for number, handler in self._taken.items():
            signal.signal(number, handler)
        if self._cutting is not None:
            self._cutting.cancel()
        if self._termination is not None:
            self._termination.lifespan_ended()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Run between any two instructions of the main thread: leave the work to the event loop."""
        # In a context of its own: this one is of the request that was interrupted, and has its id.
        self._loop.call_soon_threadsafe(self._force if self._repeated else self._begin, number, context=Context())
        self._bound(self._server(number))
        self._repeated = True

    def _bound(self, server: Any) -> None:
        """Bound the time that uvicorn takes to end; the event loop, which may be blocked, is not needed for that."""
        if not hasattr(server, "should_exit"):
            return
        if self._termination is not None:
            self._termination.hurry()
            return
        grace = server.config.timeout_graceful_shutdown
        grace = self._settings.grace if grace is None else grace
        code, time = (0, self._settings.drain + grace) if server.started else (FAILED_START, 0)
        self._termination = Termination(self._loop, exit_code=code, time=time)
        self._termination.start()

    def _begin(self, number: int) -> None:
        if self._starting is not None and not getattr(self._server(number), "started", True):
            _logger.warning("%s during the start: giving it up", signal.Signals(number).name)
            self._starting.cancel()
            self._end(number)
            return
        self._shutdown.drain()
        self._loop.call_later(self._settings.drain, self._stop, number)

    def _stop(self, number: int) -> None:
        """Have the server finish: within the grace if it is uvicorn and was not told otherwise."""
        self._shutdown.stop()
        server = self._server(number)
        if not hasattr(server, "should_exit"):  # it is another one than uvicorn's
            self._taken[number](number, None)
            return
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = self._settings.grace
        # The server does it, too, a moment later, and answers nothing.
        self._cut_in(server.config.timeout_graceful_shutdown)
        server.should_exit = True  # not through its handler, which raises the signal again in the end: exit code 143

    def _force(self, number: int) -> None:
        """End the server, and with it what still runs: called for the second signal."""
        self.forced = getattr(self._server(number), "started", True)
        self._end(number)

    def _end(self, number: int) -> None:
        """Have the server end without waiting for anybody."""
        self._stop(number)
        if hasattr(server := self._server(number), "force_exit"):
            server.force_exit = True
            self._cut()

    def _cut(self) -> None:
        """Cancel the requests that have not ended, and those that come until the server has closed its port."""
        if count := cut_requests(self._loop):
            _logger.warning("cancelling %d request(s), which have not ended in time", count)
        self._cut_in(_CUT_TIME)

    def _cut_in(self, seconds: float) -> None:
        if self._cutting is not None:
            self._cutting.cancel()
        self._cutting = self._loop.call_later(seconds, self._cut)

    def _server(self, number: int) -> Any:
        return self._taken[number].__self__
