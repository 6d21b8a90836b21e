"""What counting costs per request, ours against slowapi's, in memory and on a real Redis, as ratios to bare FastAPI.

    python benchmarks/rate_limit.py [--rounds 15] [--check]

Every app is called through its ASGI interface, in interleaved rounds; the table shows the median of each round's ratio
to bare `FastAPI()`. Then, for ours alone: whether the cost grows with the number of routes or of clients. With --check
the exit code is 1 if ours costs more than slowapi's, or grows. Redis comes from tests/redis_servers.py.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slowapi
from asgi import call, time_calls
from fastapi import Depends, FastAPI, Request
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware

from fastapi_prodkit.rate_limit import MemoryStore, RateLimit, RateLimitMiddleware, SharedStore
from fastapi_prodkit.rate_limit.slowapi import Limiter
from fastapi_prodkit.sections import RateLimitSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from redis_servers import redis_server
from tables import Table, parser_of, show

LIMIT = "1000000000/minute"
PATH = "/items/42"
PATIENCE = 1.3  # what waiting without stopping the event loop may cost more than stopping it: slowapi's client blocks
GROWTH = 1.3  # what 50 000 clients or 1000 routes may cost more than ten


def app_of(routes: int = 1) -> FastAPI:
    app = FastAPI()

    @app.get("/items/{item_id}")
    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    for number in range(routes - 1):
        app.add_api_route(f"/other/{number}", read)
    return app


def middleware(url: str, routes: int = 1) -> FastAPI:
    app = app_of(routes)
    settings = RateLimitSettings(default=LIMIT, storage_url=url, storage_timeout=5)
    app.add_middleware(RateLimitMiddleware, settings, store=SharedStore(settings) if settings.shared else MemoryStore())
    return app


def dependency(url: str) -> FastAPI:
    settings = RateLimitSettings(storage_url=url, storage_timeout=5)
    app = FastAPI()
    app.state.rate_limit = SharedStore(settings) if settings.shared else MemoryStore()

    @app.get("/items/{item_id}", dependencies=[Depends(RateLimit(LIMIT))])
    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    return app


def decorated(limiter: Any) -> FastAPI:
    app = FastAPI()
    app.state.limiter = limiter

    @app.get("/items/{item_id}")
    @limiter.limit(LIMIT)
    async def read(request: Request, item_id: int) -> dict[str, int]:  # noqa: ARG001 - slowapi asks for it
        return {"item_id": item_id}

    return app


def ours_decorated(url: str) -> FastAPI:
    settings = RateLimitSettings(storage_url=url, storage_timeout=5)
    app = decorated(Limiter())
    app.state.rate_limit = SharedStore(settings) if settings.shared else MemoryStore()
    return app


def slowapi_limiter(url: str, **options: Any) -> slowapi.Limiter:
    return slowapi.Limiter(key_func=lambda request: request.client.host, storage_uri=url, **options)


def slowapi_middleware(kind: Any) -> Callable[[str], FastAPI]:
    def make(url: str) -> FastAPI:
        app = app_of()
        app.state.limiter = slowapi_limiter(url, default_limits=[LIMIT])
        app.add_middleware(kind)
        return app

    return make


OURS: dict[str, Callable[[str], FastAPI]] = {
    "RateLimitMiddleware": middleware,
    "Depends(RateLimit)": dependency,
    "our Limiter's decorator": ours_decorated,
}
THEIRS: dict[str, Callable[[str], FastAPI]] = {
    "SlowAPIASGIMiddleware": slowapi_middleware(SlowAPIASGIMiddleware),
    "slowapi's decorator": lambda url: decorated(slowapi_limiter(url)),
    "SlowAPIMiddleware": slowapi_middleware(SlowAPIMiddleware),
}

INSTEAD_OF = {
    "SlowAPIASGIMiddleware": "RateLimitMiddleware",
    "slowapi's decorator": "our Limiter's decorator",
    "SlowAPIMiddleware": "RateLimitMiddleware",
}


async def measure(apps: dict[str, FastAPI], rounds: int) -> dict[str, float]:
    """Return for each app the median ratio to the first one."""
    for name, app in apps.items():
        status = await call(app, "GET", PATH, b"")
        if status != 200:
            raise SystemExit(f"{name} answered {status}")
    times: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds):
        for name, app in apps.items():
            times[name].append(await time_calls(app, ("GET", PATH, b""), calls=300, clock=time.perf_counter))
    base = next(iter(times.values()))
    return {name: statistics.median(a / b for a, b in zip(own, base, strict=True)) for name, own in times.items()}


async def growth(rounds: int) -> dict[str, float]:
    """Return what many routes and many clients cost, as a ratio to few, without what FastAPI itself takes for them."""
    crowded = middleware("memory://")
    busy = MemoryStore()
    crowded.user_middleware[0].kwargs["store"] = busy
    await call(crowded, "GET", PATH, b"")
    window = next(iter(busy._windows.values()))  # noqa: SLF001 - nothing public fills it as fast
    for number in range(50_000):
        window.hit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1, busy.clock())
    few = await measure({"few": middleware("memory://"), "many": crowded}, rounds)
    bare = await measure({"few": app_of(), "many": app_of(1000)}, rounds)
    routes = await measure({"few": middleware("memory://"), "many": middleware("memory://", 1000)}, rounds)
    return {"50 000 clients against one": few["many"], "1000 routes against one": routes["many"] / bare["many"]}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument("--check", action="store_true", help="fail if ours costs more than slowapi's, or grows")
    options = parser.parse_args()

    failed, rows = False, {}
    with redis_server() as server:
        for title, url in {"in memory": "memory://", "on Redis": server.url()}.items():
            made = {"bare FastAPI()": app_of(), **{name: make(url) for name, make in {**OURS, **THEIRS}.items()}}
            ratios = asyncio.run(measure(made, options.rounds))
            for name, ratio in ratios.items():
                rows.setdefault(name, {})[title] = ratio
            allowed = 1.0 if url == "memory://" else PATIENCE
            failed |= ratios["RateLimitMiddleware"] > ratios["SlowAPIASGIMiddleware"] * allowed
            failed |= ratios["our Limiter's decorator"] > ratios["slowapi's decorator"] * allowed
    title, unit = "Counting in memory and on Redis", "seconds of a request, times bare FastAPI()"
    show([Table("rate-limit", title, unit, rows, INSTEAD_OF)], options.json)
    grown = asyncio.run(growth(options.rounds))
    print("\nRateLimitMiddleware in memory, how its cost grows")
    for name, ratio in grown.items():
        print(f"  {name:26}{ratio:8.2f}")
    failed |= max(grown.values()) > GROWTH
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
