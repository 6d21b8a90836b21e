"""Find the number of worker processes: from WEB_CONCURRENCY and from the server's command line.

`fastapi-prodkit serve` sets WEB_CONCURRENCY for its workers. Other servers set no variable, so a worker is recognised
by its parent process, and its number is read from the command line. A command without a number and without a
configuration file starts one worker. A number in gunicorn.conf.py, in another file of the server or in a call such as
`uvicorn.run(workers=4)` is not found; such a worker counts as one of several, unless WEB_CONCURRENCY is 1.
"""

import multiprocessing
import os
import re
import sys
from pathlib import Path

__all__ = ["configured_workers", "is_one_of_several_workers"]

_OPTION = re.compile(r"(?<!\S)(?:--workers|-w)[= ]?(\d+)(?!\S)")  # of uvicorn, fastapi, gunicorn, hypercorn, granian

_COMMAND = re.compile(r"(?:^|/)(?:gunicorn|hypercorn|granian)(?:/__main__\.py)?$")
_FILE = re.compile(r"(?<!\S)(?:--config\b|-c)")


def configured_workers() -> int | None:
    """Return the number of processes in WEB_CONCURRENCY, which servers read; None if there is no such number."""
    number = os.environ.get("WEB_CONCURRENCY", "")
    return int(number) if number.isdigit() and int(number) else None


def is_one_of_several_workers() -> bool:
    """Return whether this process is one of several workers of a server.

    A child of `multiprocessing` is a worker, and so is a process with gunicorn's SERVER_SOFTWARE.
    """
    if multiprocessing.parent_process() is None and "gunicorn" not in os.environ.get("SERVER_SOFTWARE", ""):
        return False
    arguments = " ".join([os.environ.get("GUNICORN_CMD_ARGS", ""), *sys.argv[1:]])
    options = _OPTION.findall(arguments)
    number = int(options[-1]) if options else configured_workers()
    return number != 1 and not (number is None and (_reloads() or _has_default(arguments)))


def _has_default(arguments: str) -> bool:
    """Return whether the server starts its default of one worker, as no file or variable can set another number."""
    elsewhere = _FILE.search(arguments) or Path("gunicorn.conf.py").exists() or "GRANIAN_WORKERS" in os.environ
    return _COMMAND.search(sys.argv[0]) is not None and not elsewhere


def _reloads() -> bool:
    """Return whether the server restarts its one worker when a file changes: `--reload`, or `fastapi dev`."""
    return "--reload" in sys.argv or sys.argv[1:2] == ["dev"]
