"""End a process without losing a request: readiness fails first, the port closes last.

On SIGTERM a server closes its port at once, but load balancers keep sending requests until they notice. So `Shutdown`
handles the signal first: for `drain` seconds `/ready` returns 503, every response has `Connection: close`, and requests
are still accepted. Then the server stops, and requests in flight have `grace` seconds. Lifespans and `atexit`
hooks have two seconds more each. Then the process exits, even if, for example, a `def` handler still runs.

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
_REPEAT_TIME = 0.05  # seconds between two checks for requests that still run when the grace is over
STOP_TIMEOUT = 30.0  # seconds; the default of `stopTimeout` in an ECS task definition

_logger = logging.getLogger(__name__)


class Shutdown:
    """Handle the signals that end the process, and pass them to the server when the drain is over.

    It works in the main thread of a server that handles signals with Python's `signal` module: uvicorn, with or without
    workers, `fastapi run`, and gunicorn with uvicorn's workers. Under another server, call `drain()`.

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
        """Return whether the drain has started: `health_router(draining=shutdown.draining)`."""
        return self._draining

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Register a callback that is called, in the event loop, when the drain starts."""
        self._callbacks.append(callback)

    @contextmanager
    def at_stop(self, callback: Callable[[], None]) -> Iterator[None]:
        """Register a callback that is called, in the event loop, if the drain ends before this context does."""
        self._stop_callbacks[id(callback)] = callback
        try:
            yield
        finally:
            del self._stop_callbacks[id(callback)]

    def stop(self) -> None:
        """Call the callbacks of `at_stop`, which end streams. Called when the drain is over; the process continues."""
        for callback in list(self._stop_callbacks.values()):
            callback()

    def drain(self) -> None:
        """Start the drain without a signal. The process continues until it is stopped."""
        if not self._draining:
            self._draining = True
            _logger.info(
                "shutting down: /ready returns 503, accepting requests for %g more seconds", self._settings.drain
            )
            for callback in self._callbacks:
                callback()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:  # noqa: ARG002 - the signature of a lifespan
        """Handle the signals while the app runs: `FastAPI(lifespan=shutdown.lifespan)`.

        It must be the first of several lifespans, so that a signal during the start of the others cancels their start.
        """
        self._draining = False
        signals = _Signals(self, self._settings)
        signals.install()
        try:
            yield
        except asyncio.CancelledError:
            if not signals.forced:
                raise
        finally:
            signals.restore()


class _Signals:
    """The signal handlers of one run of the app: the first signal starts the drain, the second ends the server."""

    def __init__(self, shutdown: Shutdown, settings: ShutdownSettings) -> None:
        self._shutdown = shutdown
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.current_task()
        self._replaced: dict[int, MethodType] = {}
        self._repeated = False
        self._termination: Termination | None = None
        self._cancelling: asyncio.TimerHandle | None = None
        self.forced = False  # a second signal has ended the server, which then cancels the lifespan

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # only that thread can handle signals
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if isinstance(handler, MethodType):  # a server's; handlers of Python and the event loop are functions
                self._replaced[number] = handler
                signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        if self._cancelling is not None:
            self._cancelling.cancel()
        if self._termination is not None:
            self._termination.lifespan_ended()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Let the event loop do the work, because a signal handler interrupts the main thread at any instruction."""
        # In an empty context: the current context has the id of the interrupted request.
        self._loop.call_soon_threadsafe(self._force if self._repeated else self._begin, number, context=Context())
        self._limit_exit_time(self._server(number))
        self._repeated = True

    def _limit_exit_time(self, server: Any) -> None:
        """Limit the time that uvicorn takes to end, even if the event loop is blocked."""
        if not hasattr(server, "should_exit"):
            return
        if self._termination is not None:
            self._termination.end_grace()
            return
        grace = server.config.timeout_graceful_shutdown
        grace = self._settings.grace if grace is None else grace
        code, time = (0, self._settings.drain + grace) if server.started else (FAILED_START, 0)
        self._termination = Termination(self._loop, exit_code=code, time=time)
        self._termination.start()

    def _begin(self, number: int) -> None:
        if self._starting is not None and not getattr(self._server(number), "started", True):
            _logger.warning("%s during start-up: cancelling the start-up", signal.Signals(number).name)
            self._starting.cancel()
            self._end(number)
            return
        self._shutdown.drain()
        self._loop.call_later(self._settings.drain, self._stop, number)

    def _stop(self, number: int) -> None:
        """Tell the server to end; set uvicorn's time-out for requests to the grace, unless uvicorn has one."""
        self._shutdown.stop()
        server = self._server(number)
        if not hasattr(server, "should_exit"):  # it is not uvicorn
            self._replaced[number](number, None)
            return
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = self._settings.grace
        # uvicorn cancels the requests as well, a moment later and without an answer.
        self._cancel_requests_in(server.config.timeout_graceful_shutdown)
        server.should_exit = True  # its handler would raise the signal again at the end: exit code 143

    def _force(self, number: int) -> None:
        """End the server and all requests. Called for the second signal."""
        self.forced = getattr(self._server(number), "started", True)
        self._end(number)

    def _end(self, number: int) -> None:
        """Tell the server to end without waiting for requests."""
        self._stop(number)
        if hasattr(server := self._server(number), "force_exit"):
            server.force_exit = True
            self._cancel_requests()

    def _cancel_requests(self) -> None:
        """Cancel all requests; repeat it for those that arrive before the server has closed its port."""
        if count := cut_requests(self._loop):
            _logger.warning("cancelling %d request(s), which have not ended in time", count)
        self._cancel_requests_in(_REPEAT_TIME)

    def _cancel_requests_in(self, seconds: float) -> None:
        if self._cancelling is not None:
            self._cancelling.cancel()
        self._cancelling = self._loop.call_later(seconds, self._cancel_requests)

    def _server(self, number: int) -> Any:
        return self._replaced[number].__self__
