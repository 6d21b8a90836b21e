"""What importing fastapi-prodkit costs, as a share of importing FastAPI, measured in fresh interpreters.

    python benchmarks/imports.py [--rounds 15] [--limit 1]

Rounds are interleaved, and the table shows medians of what an import adds to `import fastapi` in the same round. The
budget of the assembly is 37 % (110 ms where FastAPI takes 300), that of a single middleware 3.5 % (10 ms). With --limit
the exit code is 1 if an import adds more times its budget.
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
    parser.add_argument("--limit", type=float, help="fail if an import adds more than this many times its budget")
    options = parser.parse_args()

    times: dict[str, list[tuple[float, float]]] = {statement: [] for statement in BUDGETS}
    seconds("; ".join(times))  # once for the file cache and the compiled modules
    for number in range(options.rounds):
        print(f"\rround {number + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        for statement, measured in times.items():
            measured.append(seconds(statement))
    print(file=sys.stderr)

    worst = 0.0
    for statement, measured in times.items():
        share = statistics.median(added / base for base, added in measured)
        added = statistics.median(added for _, added in measured)
        worst = max(worst, share / BUDGETS[statement])
        print(f"{statement:50} +{added * 1000:6.1f} ms  {share:7.1%} of FastAPI (budget {BUDGETS[statement]:.1%})")
    return int(options.limit is not None and worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
