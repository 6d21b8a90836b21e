"""What the number of routes costs: bare `FastAPI()`, the index of routes alone, and the whole assembly.

    python benchmarks/routing.py [--rounds 100]

The routes are behind APIRouters of ten, as in services. Each cell has microseconds of CPU time, and the ratio to bare
`FastAPI()`; the rounds are interleaved, and the fastest third of each is compared.
"""

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from in_process import assembly, call, fastest_third, time_calls

NUMBERS = (3, 20, 100, 300, 1000)
ROUTES_PER_ROUTER = 10


def add_routes(app: FastAPI, number: int) -> FastAPI:
    for first in range(0, number, ROUTES_PER_ROUTER):
        router = APIRouter(prefix=f"/resource{first // ROUTES_PER_ROUTER}")
        for sub in range(min(ROUTES_PER_ROUTER, number - first)):

            async def read(item_id: int) -> dict[str, int]:
                return {"item_id": item_id}

            router.add_api_route(f"/sub{sub}/{{item_id}}", read)
        app.include_router(router, prefix="/v1")
    return app


def bare(number: int) -> FastAPI:
    return add_routes(FastAPI(), number)


def indexed(number: int) -> FastAPI:
    from fastapi_prodkit.routing import index_routes

    app = bare(number)
    index_routes(app)
    return app


def whole(number: int) -> FastAPI:
    return add_routes(assembly(), number)


APPS: dict[str, Callable[[int], FastAPI]] = {"bare FastAPI()": bare, "index_routes": indexed, "create_app": whole}


def requests(number: int) -> dict[str, tuple[str, int]]:
    """Return path and expected status of each kind of request."""
    last = number - 1
    return {
        "last": (f"/v1/resource{last // ROUTES_PER_ROUTER}/sub{last % ROUTES_PER_ROUTER}/42", 200),
        "first": ("/v1/resource0/sub0/42", 200),
        "unknown": ("/wp-login.php", 404),
    }


async def measure(number: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each kind of request the microseconds of each app."""
    apps = {name: make(number) for name, make in reversed(APPS.items())}  # create_app first: it configures logging
    results = {}
    for kind, (path, expected) in requests(number).items():
        times: dict[str, list[float]] = {name: [] for name in APPS}
        for name, app in apps.items():
            if (status := await call(app, "GET", path, b"")) != expected:
                raise SystemExit(f"{name}: {path} answered {status}")
        for _ in range(rounds):
            for name in APPS:
                times[name].append(await time_calls(apps[name], ("GET", path, b"")))
        results[kind] = {name: fastest_third(own) * 1e6 for name, own in times.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="rounds per kind of request")
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="how many routes")
    options = parser.parse_args()

    stdout = sys.stdout
    sys.stdout = io.TextIOWrapper(open(os.devnull, "wb"), write_through=True)  # noqa: PTH123, SIM115 - lives as long as main
    print(f"{'routes':>6} {'':8}" + "".join(f"{name:>20}" for name in APPS), file=stdout)
    for number in options.numbers:
        for kind, own in asyncio.run(measure(number, options.rounds)).items():
            base = own["bare FastAPI()"]
            cells = "".join(f"{micros:12.0f} us {micros / base:4.2f}" for micros in own.values())
            print(f"{number:6} {kind:8}{cells}", file=stdout, flush=True)


if __name__ == "__main__":
    main()
