"""What fastapi-prodkit costs in instructions of one request, counted by valgrind: the check of a change in CI.

    python benchmarks/instructions.py [--update]

The ratio to bare `FastAPI()` in the same run must not be 10 % above the figure that is committed in instructions.json
for this version of Python. It is the ratio, because another build of the same Python executes 12 % fewer instructions,
but has ratios within 1 % (4 % for an unknown path); those of two runs of one build differ by at most 0.7 %. A run takes
a minute. With --update its ratios become the figures.
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

import in_process
import routing
from fastapi import FastAPI

FIGURES = Path(__file__).with_suffix(".json")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TOLERANCE = 1.10

CALLS = 60
WARM_UP_CALLS = 20
VALGRIND = ("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null")
APPS = {"bare": (in_process.bare, routing.bare), "whole": (in_process.whole, routing.whole)}
ROUTED = ((3, "last"), (20, "last"), (100, "last"), (100, "first"), (300, "last"), (300, "unknown"))


def candidates(name: str) -> dict[str, tuple[FastAPI, in_process.Request]]:
    """Return for each measurement an app and a request: with the routes of both other benchmarks."""
    make, make_with_routes = APPS[name]
    app = make()
    measured = {kind: (app, in_process.REQUESTS[kind]) for kind in ("GET", "POST")}
    for number, kind in ROUTED:
        path, _ = routing.requests(number)[kind]
        measured[f"{number} routes, {kind}"] = (make_with_routes(number), ("GET", path, b""))
    return measured


async def count(name: str) -> dict[str, float]:
    """Return the instructions of one request for each measurement. Valgrind has to run this process."""
    measured = candidates(name)
    for app, request in measured.values():
        for _ in range(WARM_UP_CALLS):
            await in_process.call(app, *request)
    vgdb("instrumentation", "on")
    return {kind: await count_calls(*candidate) for kind, candidate in measured.items()}


async def count_calls(app: FastAPI, request: in_process.Request) -> float:
    gc.collect()  # so that the collections during the calls are the same in each run
    before = executed()
    start = executed()
    for _ in range(CALLS):
        await in_process.call(app, *request)
    return (executed() - start - (start - before)) / CALLS  # asking for the number takes instructions, too


def executed() -> int:
    """Return how many instructions this process has executed."""
    return int(re.findall(r"^events-1: (\d+)", vgdb("status", "internal"), re.MULTILINE)[0])


def vgdb(*command: str) -> str:
    """Give the valgrind that runs this process a command."""
    asked = ["vgdb", f"--pid={os.getpid()}", *command]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def count_in_valgrind(name: str) -> dict[str, float]:
    """Run `count` in a process of its own, in which no hash is random."""
    asked = [*VALGRIND, sys.executable, __file__, "--count", name]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    counted = subprocess.run(asked, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(counted.stdout)


def compare() -> dict[str, float]:
    """Print a table, and return the ratios."""
    with ThreadPoolExecutor(len(APPS)) as threads:
        bare, whole = threads.map(count_in_valgrind, APPS)
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
    parser.add_argument("--count", choices=APPS, help="print the instructions of one app as JSON, under valgrind")
    options = parser.parse_args()

    if options.count is None:
        ratios = compare()
        return update(ratios) if options.update else check(ratios)
    stdout = sys.stdout
    sys.stdout = io.TextIOWrapper(open(os.devnull, "wb"), write_through=True)  # noqa: PTH123, SIM115 - lives as long as main
    counted = asyncio.run(count(options.count))
    print(json.dumps(counted), file=stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
