"""uvicorn's parent of several workers, which passes a second signal on to them."""

import signal
from typing import Any

from fastapi_prodkit import _extras

_extras.require("uvicorn", extra="standard")

from uvicorn.supervisors import Multiprocess  # noqa: E402 - a hint, not a traceback

__all__ = ["Supervisor"]

_JOIN_TIME = 0.1  # seconds between two looks at workers that are ending


class Supervisor(Multiprocess):
    """uvicorn's parent of several workers. At the second signal the workers wait for no request any more."""

    _repeated = False

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
