"""uvicorn's configuration and parent process of workers, with logged errors and exit codes."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

from fastapi_prodkit import _extras

_extras.require("uvicorn", extra="standard")

from uvicorn import Config  # noqa: E402 - after the check above
from uvicorn.supervisors import Multiprocess  # noqa: E402 - after the check above

from fastapi_prodkit.sections import LimitsSettings  # noqa: E402
from fastapi_prodkit.shutdown.termination import EXIT_TIME, FAILED_START  # noqa: E402

__all__ = ["ServeConfig", "Supervisor", "bound_exit"]

_JOIN_INTERVAL = 0.1  # seconds between two checks of workers that are stopping


_logger = logging.getLogger("fastapi_prodkit.serve")


class ServeConfig(Config):
    """uvicorn's configuration, which logs the error if a process cannot load the app.

    Attributes:
        header_timeout: Time-out for the head of a request, seconds.
        limits: Section with the maximum size and number of lines of a head; None without limits.
    """

    header_timeout: float
    limits: LimitsSettings | None

    def load(self) -> None:
        """Load the app in the process that serves it.

        Raises:
            SystemExit: The app cannot be loaded.
        """
        try:
            super().load()
        except (Exception, SystemExit):  # any error while the app is loaded ends the process
            _logger.critical("the app cannot be loaded", exc_info=True)
            sys.exit(FAILED_START)
        if multiprocessing.parent_process() is not None:
            threading.Thread(target=_end_with_parent, name="fastapi_prodkit.parent", daemon=True).start()


class Supervisor(Multiprocess):
    """uvicorn's parent process of several workers. After a second signal, workers stop without waiting for requests.

    Attributes:
        start_failed: Whether it stopped because a worker could not start.
    """

    start_failed = False
    _repeated = False

    def keep_subprocess_alive(self) -> None:
        """Replace a worker that has died; stop if that worker could not start."""
        stopping = self.should_exit.is_set()
        super().keep_subprocess_alive()
        self.start_failed = self.should_exit.is_set() and not stopping

    def handle_int(self) -> None:
        """Stop the workers; at the second signal without waiting for requests."""
        self._repeated = self.should_exit.is_set()
        super().handle_int()

    def handle_term(self) -> None:
        """Stop the workers; at the second signal without waiting for requests."""
        self._repeated = self.should_exit.is_set()
        super().handle_term()

    def join_all(self) -> None:
        """Wait for the workers, and forward a second signal to them."""
        processes: list[Any] = [each.process for each in self.processes]
        while running := [process for process in processes if process.is_alive()]:
            running[0].join(_JOIN_INTERVAL)
            self.signal_queue = [each for each in self.signal_queue if each in {signal.SIGINT, signal.SIGTERM}]
            self.handle_signals()
            for process in running if self._repeated else ():
                process.terminate()
            self._repeated = False


def bound_exit(code: int) -> None:
    """Exit within two seconds, even if threads of the app, which this process has loaded too, still run."""
    timer = threading.Timer(EXIT_TIME, _exit, (code,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    """Shut this worker down when its parent has been killed: nothing else would, and the worker keeps the port."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    _logger.error("the parent process has ended without its workers: this worker shuts down")
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(code: int) -> None:
    _logger.warning("exiting before all threads and atexit hooks have ended")
    os._exit(code)
