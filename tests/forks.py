"""Run code in a separate process without its import time: in a fork of a process that has imported the modules."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["Forks", "Outcome"]

TIMEOUT = 120  # seconds

# Reads a task from each line, runs it in a fork, and writes the exit code.
_SERVER = """
import atexit, importlib, json, os, signal, sys, threading, traceback
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass

def run(task):
    for number, path in enumerate((os.devnull, task["stdout"], task["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(task["directory"])
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.argv = ["-c", *task["arguments"]]
    signal.alarm(task["timeout"])
    code = 0
    try:
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():  # as the interpreter ends: it waits for these, and then calls those
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    return code

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Outcome(NamedTuple):
    """Exit code and output of a run."""

    code: int
    stdout: str
    stderr: str


class Forks:
    """A process whose forks run code.

    Args:
        options: Of the interpreter, such as -I.
        loaded: Modules that it imports first, where they are installed.
    """

    def __init__(self, *options: str, loaded: Iterable[str] = ()) -> None:
        command = [sys.executable, *options, "-c", _SERVER, *sorted(loaded)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, code: str, *arguments: str, directory: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Outcome:
        """Run code as `python -c code arguments` does, in the directory and with these variables only.

        What takes longer than TIMEOUT ends with the code -14, by SIGALRM.
        """
        with TemporaryDirectory() as folder:
            files = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
            task = {"code": code, "arguments": arguments, "directory": str(directory), "timeout": TIMEOUT, **files}
            self._process.stdin.write(json.dumps({**task, "environment": dict(environment)}) + "\n")
            self._process.stdin.flush()
            ended = self._process.stdout.readline()
            assert ended, "the process whose forks run code has ended"
            return Outcome(int(ended), *(Path(file).read_text(encoding="utf-8") for file in files.values()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
