"""What importing fastapi-prodkit costs, as a share of importing FastAPI, measured in fresh interpreters.

    python benchmarks/imports.py [--rounds 15] [--limit 1]

Rounds are interleaved, and the table shows medians of what an import adds to `import fastapi` in the same round. The
budget of the assembly is 37 % (110 ms where FastAPI takes 300), that of a single middleware 3.5 % (10 ms). With --limit
the exit code is 1 if an import adds more times its budget.
"""

import importlib.util
import os
import statistics
import subprocess
import sys

from tables import Table, parser_of, show

BASE = "import fastapi, fastapi.exception_handlers"
ASSEMBLY = "from fastapi_prodkit import Settings, create_app"
BUDGETS = {
    ASSEMBLY: 0.37,
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

# By the module that they import, where that is installed; what a service would import of it.
PEERS = {
    "lite_bootstrap": "from lite_bootstrap.bootstrappers.fastapi_bootstrapper import FastAPIBootstrapper",
    "microbootstrap": "from microbootstrap.bootstrappers.fastapi import FastApiBootstrapper",
    "prometheus_fastapi_instrumentator": "import prometheus_fastapi_instrumentator",
    "starlette_exporter": "import starlette_exporter",
    "slowapi": "import slowapi",
    "asgi_correlation_id": "import asgi_correlation_id",
    "secure": "import secure.middleware",
    "guard": "import guard",
}
INSTEAD_OF = {
    "lite_bootstrap": ASSEMBLY,
    "microbootstrap": ASSEMBLY,
    "prometheus_fastapi_instrumentator": "import fastapi_prodkit.metrics",
    "starlette_exporter": "import fastapi_prodkit.metrics",
    "slowapi": "import fastapi_prodkit.rate_limit",
    "asgi_correlation_id": "import fastapi_prodkit.request_id",
    "secure": "import fastapi_prodkit.security_headers",
    "guard": "import fastapi_prodkit.rate_limit",
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
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, help="fail if an import adds more than this many times its budget")
    options = parser.parse_args()

    peers = {} if options.limit else {name: PEERS[name] for name in PEERS if importlib.util.find_spec(name)}
    times: dict[str, list[tuple[float, float]]] = {statement: [] for statement in (*BUDGETS, *peers.values())}
    seconds("; ".join(times))  # once for the file cache and the compiled modules
    for number in range(options.rounds):
        print(f"\rround {number + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        for statement, measured in times.items():
            measured.append(seconds(statement))
    print(file=sys.stderr)

    rows = {
        f"`{statement}`": {
            "CPU ms": statistics.median(added for _, added in measured) * 1000,
            "% of FastAPI": statistics.median(added / base for base, added in measured) * 100,
            "budget, %": BUDGETS[statement] * 100 if statement in BUDGETS else None,
        }
        for statement, measured in times.items()
    }
    instead_of = {f"`{statement}`": f"`{INSTEAD_OF[name]}`" for name, statement in peers.items()}
    show([Table("imports", "What an import adds", "to `import fastapi`", rows, instead_of)], options.json)
    worst = max(rows[f"`{statement}`"]["% of FastAPI"] / budget / 100 for statement, budget in BUDGETS.items())
    return int(options.limit is not None and worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
