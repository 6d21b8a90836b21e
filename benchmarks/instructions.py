"""What fastapi-prodkit costs in instructions of one request, counted by valgrind: the check of a change in CI.

    python benchmarks/instructions.py [--update]

The ratio to bare `FastAPI()` in the same run must not be 10 % above the figure that is committed in instructions.json
for this version of Python. It is the ratio, because another build of the same Python executes 12 % fewer instructions,
but has ratios within 2 % (3 % for an unknown path). Two runs of one build differ by less than 0.01 %. A run takes a
minute; with --update its ratios become the figures.
"""

import argparse
import asyncio
import gc
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import auth
import in_process
import routing
from fastapi import FastAPI

FIGURES = Path(__file__).with_suffix(".json")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TOLERANCE = 1.10

CALLS = 60
WARM_UP_CALLS = 20
READY = "ready\n"
VALGRIND = ("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null")
APPS = {
    "bare": (in_process.bare, routing.bare, in_process.bare),
    "whole": (in_process.whole, routing.whole, auth.whole_with_secret),
}
ROUTED = ((3, "last"), (20, "last"), (100, "last"), (100, "first"), (300, "last"), (300, "unknown"))


def candidates(name: str) -> dict[str, tuple[FastAPI, in_process.Request]]:
    """Return for each measurement an app and a request: with the routes and the tokens of the other benchmarks."""
    make, make_with_routes, make_with_auth = APPS[name]
    app = make()
    measured = {kind: (app, in_process.REQUESTS[kind]) for kind in ("GET", "POST")}
    for number, kind in ROUTED:
        path, _ = routing.requests(number)[kind]
        measured[f"{number} routes, {kind}"] = (make_with_routes(number), ("GET", path, b""))
    measured["known token"] = (make_with_auth(), auth.bearer(auth.token_of_secret()))
    return measured


async def serve(name: str, lines: io.TextIOBase) -> None:
    """Serve the requests of each measurement; write its name before and after them, and wait while they are counted."""

    def pause(line: str) -> None:
        lines.write(line)
        lines.flush()
        sys.stdin.readline()

    measured = candidates(name)
    for app, request in measured.values():
        for _ in range(WARM_UP_CALLS):
            await in_process.call(app, *request)
    pause(READY)
    for kind, (app, request) in measured.items():
        gc.collect()
        gc.freeze()  # so that collections, whose number varies with any change, look at the objects of the calls only
        pause(f"{kind}\n")
        for _ in range(CALLS):
            await in_process.call(app, *request)
        pause(f"{kind}\n")


def count(name: str) -> dict[str, float]:
    """Return the instructions of one request for each measurement, of a process in which no hash is random."""
    server = subprocess.Popen(
        [*VALGRIND, sys.executable, __file__, "--serve", name],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    executed: dict[str, list[int]] = {}
    with server:
        for line in server.stdout:
            if line == READY:
                vgdb(server.pid, "instrumentation", "on")
            else:
                status = vgdb(server.pid, "status", "internal")
                executed.setdefault(line.strip(), []).append(int(re.findall(r"(?m)^events-1: (\d+)", status)[0]))
            server.stdin.write("\n")
            server.stdin.flush()
    if server.returncode:
        raise SystemExit(server.returncode)
    return {kind: (after - before) / CALLS for kind, (before, after) in executed.items()}


def vgdb(process_id: int, *command: str) -> str:
    """Give the valgrind that runs a process a command, and return its answer."""
    asked = ["vgdb", f"--pid={process_id}", *command]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def compare() -> dict[str, float]:
    """Print a table, and return the ratios."""
    with ThreadPoolExecutor(len(APPS)) as threads:
        bare, whole = threads.map(count, APPS)
    ratios = {kind: round(whole[kind] / bare[kind], 4) for kind in bare}
    figures = read_figures().get(PYTHON, {})
    print(f"{'instructions of a request':25}{'bare FastAPI()':>16}{'create_app':>12}{'ratio':>9}{'committed':>11}")
    for kind, ratio in ratios.items():
        print(f"{kind:25}{bare[kind]:16,.0f}{whole[kind]:12,.0f}{ratio:9.4f}{figures.get(kind, '-'):>11}")
    return ratios


def read_figures() -> dict[str, dict[str, float]]:
    return json.loads(FIGURES.read_text())


def check(ratios: dict[str, float]) -> int:
    """Return the exit code: 1 if a ratio is too far above its figure."""
    figures = read_figures().get(PYTHON)
    if figures is None:
        print(f"there are no figures for Python {PYTHON}: nothing is checked")
        return 0
    over = [kind for kind, figure in figures.items() if ratios[kind] > figure * TOLERANCE]
    for kind in over:
        print(f"{kind}: {ratios[kind]:.4f} is more than 10 % above {figures[kind]:.4f}")
    return int(bool(over))


def update(ratios: dict[str, float]) -> int:
    figures = dict(sorted({**read_figures(), PYTHON: ratios}.items()))
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the ratios to instructions.json")
    parser.add_argument("--serve", choices=APPS, help="serve the requests with one app, under valgrind")
    options = parser.parse_args()

    if options.serve is None:
        ratios = compare()
        return update(ratios) if options.update else check(ratios)
    lines = sys.stdout
    sys.stdout = io.TextIOWrapper(open(os.devnull, "wb"), write_through=True)  # noqa: PTH123, SIM115 - lives as long as main
    asyncio.run(serve(options.serve, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
