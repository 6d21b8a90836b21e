"""What the number of routes costs, as a ratio to bare `FastAPI()` with as many: our index, `create_app`, and others.

    python benchmarks/routing.py [--rounds 30]

The routes are behind APIRouters of ten, as in services. Each app is measured in a process of its own, in turns with
bare `FastAPI()`, for its last and its first route and for an unknown path.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable
from typing import Any

from asgi import Request, call, in_another_process, interleave, output
from candidates import CAREFUL, LITESTAR, TUTORIAL
from fastapi import APIRouter, FastAPI
from ours import BARE, WHOLE, assembly
from tables import Table, parser_of, show

NUMBERS = (3, 20, 100, 300, 1000)
ROUTES_PER_ROUTER = 10
CALLS_PER_ROUND = 10
TITLES = {"last": "The last route", "first": "The first route", "unknown": "An unknown path"}


async def read(item_id: int) -> dict[str, int]:
    return {"item_id": item_id}


def paths(number: int) -> list[str]:
    return [f"/resource{each // ROUTES_PER_ROUTER}/sub{each % ROUTES_PER_ROUTER}" for each in range(number)]


def add_routes(app: FastAPI, number: int) -> FastAPI:
    every = paths(number)
    for first in range(0, number, ROUTES_PER_ROUTER):
        router = APIRouter()
        for path in every[first : first + ROUTES_PER_ROUTER]:
            router.add_api_route(f"{path}/{{item_id}}", read)
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


def careful(number: int) -> FastAPI:
    from assemblies import careful_assembly

    return add_routes(careful_assembly(), number)


def tutorial(number: int) -> FastAPI:
    from assemblies import tutorial_assembly

    return add_routes(tutorial_assembly(), number)


def litestar(number: int) -> Any:
    from assemblies import litestar_with
    from litestar import Router, get

    handlers = [get(f"{path}/{{item_id:int}}")(read) for path in paths(number)]
    return litestar_with(Router("/v1", route_handlers=handlers))


APPS: dict[str, Callable[[int], Any]] = {
    "index_routes": indexed,
    WHOLE: whole,
    CAREFUL: careful,
    TUTORIAL: tutorial,
    LITESTAR: litestar,
}


def requests(number: int) -> dict[str, tuple[str, int]]:
    """Return path and expected status of each kind of request."""
    first, last = paths(number)[0], paths(number)[-1]
    return {"last": (f"/v1{last}/42", 200), "first": (f"/v1{first}/42", 200), "unknown": ("/wp-login.php", 404)}


async def measure(name: str, number: int, rounds: int) -> dict[str, tuple[float, float]]:
    apps = {BARE: bare(number), name: APPS[name](number)}
    results = {}
    for kind, (path, expected) in requests(number).items():
        for each, app in apps.items():
            if (status := await call(app, "GET", path)) != expected:
                raise SystemExit(f"{each}: {path} answered {status}")
        seconds = await interleave(apps, Request("GET", path), rounds, CALLS_PER_ROUND)
        results[kind] = (seconds[BARE], seconds[name])
    return results


def measure_named(name: str, number: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return CPU seconds per request of each kind: of bare `FastAPI()`, and of the app with this name."""
    with output():
        return asyncio.run(measure(name, number, rounds))


def tables(names: Iterable[str], numbers: Iterable[int], rounds: int) -> list[Table]:
    """Return a table for each kind of request, with a column for each number of routes."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for number in numbers:
        turns = max(5, min(rounds, 20 * rounds // number))  # what takes longer needs fewer
        for name in names:
            for kind, (base, own) in in_another_process(measure_named, name, number, turns).items():
                apps = rows.setdefault(kind, {BARE: {}})
                apps[BARE][f"{number} routes"] = 1.0
                apps.setdefault(name, {})[f"{number} routes"] = own / base
    instead_of = {name: WHOLE for name in (CAREFUL, TUTORIAL, LITESTAR) if name in names}
    return [
        Table(f"routes-{kind}", TITLES[kind], "CPU time, times that of bare FastAPI()", apps, instead_of)
        for kind, apps in rows.items()
    ]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds per kind of request")
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="how many routes")
    parser.add_argument("--apps", nargs="+", default=list(APPS), help="those of the table that are measured")
    options = parser.parse_args()

    show(tables(options.apps, options.numbers, options.rounds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
