"""What importing fastapi-prodkit costs, as a share of importing FastAPI, measured in fresh interpreters.

    python benchmarks/imports.py [--rounds 15] [--check]

Rounds are interleaved, and the table shows medians of what an import adds to `import fastapi` in the same round. With
--check the exit code is 1 beyond the budget: the assembly may add 37 % (110 ms where FastAPI takes 300), a single
middleware 3.5 % (10 ms).
"""

import argparse
import os
import statistics
import subprocess
import sys

BASE = "import fastapi, fastapi.exception_handlers"
BUDGETS = {
    "from fastapi_prodkit import Settings, create_app": 0.37,
    "import fastapi_prodkit.request_id": 0.035,
    "import fastapi_prodkit.access_log": 0.035,
    "import fastapi_prodkit.metrics": 0.035,
    "import fastapi_prodkit.security_headers": 0.035,
    "import fastapi_prodkit.cors": 0.035,
    "import fastapi_prodkit.allowed_hosts": 0.035,
    "import fastapi_prodkit.proxy_headers": 0.035,
    "import fastapi_prodkit.rate_limit": 0.035,
    "import fastapi_prodkit.errors": 0.035,
    "import fastapi_prodkit.health": 0.035,
}


def seconds(statement: str) -> tuple[float, float]:
    """Return the CPU time that FastAPI and then the statement take to import, in one fresh interpreter."""
    program = f"from time import process_time as t; a = t(); {BASE}; b = t(); {statement}; c = t(); print(b - a, c - b)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    ).stdout
    base, added = map(float, output.split())
    return base, added


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="fail if an import is over its budget")
    options = parser.parse_args()

    times: dict[str, list[tuple[float, float]]] = {statement: [] for statement in BUDGETS}
    for statement in times:
        seconds(statement)  # once for the file cache and the compiled modules
    for number in range(options.rounds):
        print(f"\rround {number + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        for statement, measured in times.items():
            measured.append(seconds(statement))
    print(file=sys.stderr)

    over = False
    for statement, measured in times.items():
        share = statistics.median(added / base for base, added in measured)
        added = statistics.median(added for _, added in measured)
        over |= share > BUDGETS[statement]
        print(f"{statement:50} +{added * 1000:6.1f} ms  {share:7.1%} of FastAPI (budget {BUDGETS[statement]:.1%})")
    return int(options.check and over)


if __name__ == "__main__":
    sys.exit(main())
