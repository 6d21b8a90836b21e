"""uvicorn's configuration and its parent of several workers: what fails is logged, and has an exit code."""

import logging
import os
import signal
import sys
import threading
from typing import Any

from fastapi_prodkit import _extras

_extras.require("uvicorn", extra="standard")

from uvicorn import Config  # noqa: E402 - a hint, not a traceback
from uvicorn.supervisors import Multiprocess  # noqa: E402 - likewise

from fastapi_prodkit.sections import LimitsSettings  # noqa: E402
from fastapi_prodkit.shutdown.termination import EXIT_TIME, FAILED_START  # noqa: E402

__all__ = ["ServeConfig", "Supervisor", "bound_exit"]

_JOIN_TIME = 0.1  # seconds between two looks at workers that are ending


_logger = logging.getLogger("fastapi_prodkit.serve")


class ServeConfig(Config):
    """uvicorn's configuration, which logs why a process cannot load the app.

    Attributes:
        header_timeout: Longest time for the head of a request, seconds.
        limits: Its size and its number of lines; None without limits.
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
        except (Exception, SystemExit):  # whatever the app raises while it is loaded: it ends the process
            _logger.critical("the app cannot be loaded", exc_info=True)
            sys.exit(FAILED_START)


class Supervisor(Multiprocess):
    """uvicorn's parent of several workers. At the second signal the workers wait for no request any more.

    Attributes:
        start_failed: It has stopped because a worker could not start.
    """

    start_failed = False
    _repeated = False

    def keep_subprocess_alive(self) -> None:
        """Start a worker in place of one that has died, or stop if that one could not start."""
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
        """Wait for the workers, and tell them of a second signal."""
        processes: list[Any] = [each.process for each in self.processes]
        while running := [process for process in processes if process.is_alive()]:
            running[0].join(_JOIN_TIME)
            self.signal_queue = [each for each in self.signal_queue if each in {signal.SIGINT, signal.SIGTERM}]
            self.handle_signals()
            for process in running if self._repeated else ():
                process.terminate()
            self._repeated = False


def bound_exit(code: int) -> None:
    """Exit in two seconds at the latest, whatever the app, which is loaded here as well, has left running."""
    timer = threading.Timer(EXIT_TIME, _leave, (code,))
    timer.daemon = True
    timer.start()


def _leave(code: int) -> None:
    _logger.warning("exiting before all threads and atexit hooks have ended")
    os._exit(code)
