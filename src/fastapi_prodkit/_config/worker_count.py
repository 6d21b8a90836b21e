"""Find the number of worker processes: from WEB_CONCURRENCY and from the server's command line.

`fastapi-prodkit serve` sets WEB_CONCURRENCY for its workers. Other servers set no variable: their workers know the
command line that started them, and that they have a parent. A command without a number and without a configuration file
starts one worker. Not seen is a number in gunicorn.conf.py, in another file of the server or in a call such as
`uvicorn.run(workers=4)`. A worker whose number is not seen counts as one of several; WEB_CONCURRENCY=1 says that it is
the only one.
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
    """Say whether this process is one of several workers of a server.

    A child of `multiprocessing` is a worker, and so is a process with gunicorn's SERVER_SOFTWARE.
    """
    if multiprocessing.parent_process() is None and "gunicorn" not in os.environ.get("SERVER_SOFTWARE", ""):
        return False
    arguments = " ".join([os.environ.get("GUNICORN_CMD_ARGS", ""), *sys.argv[1:]])
    options = _OPTION.findall(arguments)
    number = int(options[-1]) if options else configured_workers()
    return number != 1 and not (number is None and (_reloads() or _has_default(arguments)))


def _has_default(arguments: str) -> bool:
    """Say whether a server's command, which starts one worker by default, has nothing that could say another number."""
    elsewhere = _FILE.search(arguments) or Path("gunicorn.conf.py").exists() or "GRANIAN_WORKERS" in os.environ
    return _COMMAND.search(sys.argv[0]) is not None and not elsewhere


def _reloads() -> bool:
    """Say whether the server starts its one worker anew whenever a file changes: `--reload`, or `fastapi dev`."""
    return "--reload" in sys.argv or sys.argv[1:2] == ["dev"]
