"""The number of workers, from the parent process, the command line and variables."""

import multiprocessing
import sys

import pytest

from fastapi_prodkit._config.worker_count import is_one_of_several_workers


@pytest.fixture
def start(monkeypatch):
    """Let this process look like one that a server has started with these arguments and variables."""

    def started(arguments: str, *, command: str = "server", child: bool = True, **environment: str) -> None:
        for name in ("WEB_CONCURRENCY", "SERVER_SOFTWARE", "GUNICORN_CMD_ARGS", "GRANIAN_WORKERS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [command, *arguments.split()])
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a parent" if child else None)

    return started


@pytest.mark.parametrize(
    ("arguments", "several"),
    [
        ("shop:app --workers 2", True),
        ("shop:app --workers=2 --port 80", True),
        ("shop:app -w2 -b :80", True),
        ("shop:app -w 1 -w 4", True),
        ("shop:app --workers 1", False),
        ("shop:app -w 1", False),
        ("shop:app --reload", False),
        ("dev shop.py", False),
        ("shop:app --window 1", True),
        ("shop:app -w 1x", True),
        ("shop:app", True),
    ],
)
def test_worker_count_of_a_child_process(start, arguments, several):
    """Without a number on the command line, it is one of several."""
    start(arguments)

    assert is_one_of_several_workers() is several


def test_worker_count_from_web_concurrency(start):
    """Used if the command line has no number."""
    start("shop:app", WEB_CONCURRENCY="1")
    assert is_one_of_several_workers() is False

    start("shop:app --reload", WEB_CONCURRENCY="2")
    assert is_one_of_several_workers() is True

    start("shop:app --workers 2", WEB_CONCURRENCY="1")
    assert is_one_of_several_workers() is True


def test_worker_count_of_a_process_without_a_parent(start):
    """It is the parent of the workers, or a command such as `migrate`."""
    start("shop:app --workers 2", child=False, WEB_CONCURRENCY="2")

    assert is_one_of_several_workers() is False


def test_worker_count_under_gunicorn(start):
    """gunicorn's workers have no parent for multiprocessing; a variable has its arguments."""
    gunicorn = {"child": False, "SERVER_SOFTWARE": "gunicorn/25.0"}

    start("shop:app", **gunicorn)
    assert is_one_of_several_workers() is True

    start("shop:app", **gunicorn, GUNICORN_CMD_ARGS="--workers 1")
    assert is_one_of_several_workers() is False

    start("shop:app -w 2", **gunicorn, GUNICORN_CMD_ARGS="--workers 1")
    assert is_one_of_several_workers() is True


@pytest.mark.parametrize("command", ["/venv/bin/gunicorn", "hypercorn", "/venv/granian/__main__.py"])
def test_worker_count_of_a_command_without_a_number(start, command, tmp_path, monkeypatch):
    """It starts one worker, unless a file or a variable of the server may set another number."""
    monkeypatch.chdir(tmp_path)
    start("shop:app", command=command)
    assert is_one_of_several_workers() is False

    start("shop:app", command=command, GRANIAN_WORKERS="2")
    assert is_one_of_several_workers() is True

    start("shop:app -c server.toml", command=command)
    assert is_one_of_several_workers() is True

    (tmp_path / "gunicorn.conf.py").touch()
    start("shop:app", command=command)
    assert is_one_of_several_workers() is True
