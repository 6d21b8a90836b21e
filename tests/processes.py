"""Run real servers in separate processes, for tests of their start and end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds that a process may take on a busy machine


class Process:
    """A running server: its port, its process and its output."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, output: Path) -> None:
        self.process = process
        self.port = port
        self._output = output

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self._output.read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code."""
        return self.process.wait(timeout)

    def wait_until_listening(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not listens(self.port):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.output()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the server does not listen:\n{self.output()}")
            time.sleep(0.02)


@contextmanager
def running(*command: str, directory: Path, port: int, listening: bool = True, **environment: str) -> Iterator[Process]:
    """Run `python -m <command>` in the directory, and end it and its children afterwards.

    Args:
        command: A module and its arguments.
        directory: Where it runs; modules are found there.
        port: Where it is told to listen.
        listening: Wait until it does.
        environment: Variables beside PATH and HOME.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONPATH": str(directory), **environment}
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=directory,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Process(process, port, Path(output.name))
        try:
            if listening:
                server.wait_until_listening()
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
