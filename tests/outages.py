"""Freeze, stop and restart a PostgreSQL server of `postgres()`. Linux only: it reads /proc."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from postgres import Server

PATIENCE = 20.0


class Outages:
    """Freeze and restart a server; at the end of the `with` block it runs again."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.pid = server.pid
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(PATIENCE)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop every process of the server: the kernel still accepts connections, but nothing responds."""
        stopped: list[int] = []
        try:
            while fresh := [pid for pid in self._family() if pid not in stopped]:  # the postmaster first: it forks
                for pid in fresh:
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Shut the server down, and start it again at the end, with the same port and data."""
        command = Path(f"/proc/{self.pid}/cmdline").read_text().rstrip("\0").split("\0")
        data = Path(f"/proc/{self.pid}/cwd").resolve()
        os.kill(self.pid, signal.SIGINT)
        self._wait_until(lambda: not (data / "postmaster.pid").exists() and not self._listens())
        try:
            yield
        finally:
            self._start(command, data)

    def _start(self, command: list[str], data: Path) -> None:
        if self.process is not None:
            self.process.wait(PATIENCE)
        owner = data.stat()
        identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        with (data / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"LC_ALL": "C"},
                start_new_session=True,
                **identity,
            )
        self.pid = self.process.pid
        file = data / "postmaster.pid"
        self._wait_until(lambda: file.exists() and "ready" in file.read_text())

    def _family(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.server.host, self.server.port)) == 0

    def _wait_until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "the server does not do as it is told"
            time.sleep(0.01)
