"""What fastapi-prodkit costs per request, as a ratio to bare `FastAPI()`, measured in one process.

    python benchmarks/in_process.py [--rounds 300] [--limit 1.25]

Every app is called through its ASGI interface, without a server. The rounds are interleaved and short, and the fastest
third of each is compared, in CPU time: what else runs on the machine spoils the others. With --limit only bare
`FastAPI()` and the whole assembly are measured, and the exit code is 1 if that costs more.
"""

import argparse
import asyncio
import io
import math
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

CALLS_PER_ROUND = 30


class Item(BaseModel):
    name: str
    price: float


def add_routes(app: FastAPI) -> FastAPI:
    @app.get("/items/{item_id}")
    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    @app.post("/items")
    async def create(item: Item) -> Item:
        return item

    @app.get("/sync/{item_id}")
    def read_in_thread(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    return app


def bare() -> FastAPI:
    return add_routes(FastAPI())


# As in an app that has started, if nothing takes what it records.
NO_TELEMETRY: dict[str, Any] = {"telemetry": {"tracing": False, "metrics": False, "logs": False}}


def silent() -> FastAPI:
    return add_routes(FastAPI(**NO_TELEMETRY))


def with_middleware(module: str, name: str, section: Any = None) -> Callable[[], FastAPI]:
    def make() -> FastAPI:
        middleware = getattr(__import__(f"fastapi_prodkit.{module}", fromlist=[name]), name)
        app = add_routes(FastAPI())
        app.add_middleware(middleware, *([section] if section is not None else []))
        return app

    return make


def assembly() -> FastAPI:
    """Return `create_app` with everything on, without routes."""
    from fastapi_prodkit import Settings, create_app

    settings = Settings(
        environment="prod",
        hosts={"allowed": ["api.example.com"]},
        cors={"origins": ["https://app.example.com"]},
        proxy={"trusted": ["10.0.0.0/8"]},
        metrics={"token": "a-token-for-the-benchmark"},
        rate_limit={"default": "100000000/minute"},
        docs={},
        database={"url": "sqlite://"},
    )
    return create_app(settings, **NO_TELEMETRY)


def whole() -> FastAPI:
    return add_routes(assembly())


def apps() -> dict[str, Callable[[], FastAPI]]:
    from fastapi_prodkit import sections

    proxy = sections.ProxySettings(trusted=("10.0.0.0/8",))
    cors = sections.CorsSettings(origins=("https://app.example.com",))
    hosts = sections.HostsSettings(allowed=("api.example.com",))
    limit = sections.RateLimitSettings(default="100000000/minute")
    return {
        "bare FastAPI()": bare,
        "FastAPI(telemetry off)": silent,
        "proxy_headers": with_middleware("proxy_headers", "ProxyHeadersMiddleware", proxy),
        "request_id": with_middleware("request_id", "RequestIDMiddleware"),
        "access_log": with_middleware("access_log", "AccessLogMiddleware"),
        "metrics": with_middleware("metrics", "MetricsMiddleware"),
        "security_headers": with_middleware("security_headers", "SecurityHeadersMiddleware"),
        "cors": with_middleware("cors", "CORSMiddleware", cors),
        "allowed_hosts": with_middleware("allowed_hosts", "AllowedHostsMiddleware", hosts),
        "rate_limit": with_middleware("rate_limit", "RateLimitMiddleware", limit),
        "head_limit": with_middleware("head_limit", "HeadLimitMiddleware"),
        "body_limit": with_middleware("body_limit", "BodyLimitMiddleware"),
        "create_app(settings)": whole,
    }


Request = tuple[str, str, bytes]  # method, path, body
REQUESTS: dict[str, Request] = {
    "GET": ("GET", "/items/42", b""),
    "POST": ("POST", "/items", b'{"name": "lamp", "price": 9.5}'),
    "sync": ("GET", "/sync/42", b""),
}


def scope_of(method: str, path: str, body: bytes) -> dict[str, Any]:
    """Return what uvicorn hands over for a request that a browser sent through a load balancer."""
    headers = [
        (b"host", b"api.example.com"),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64)"),
        (b"accept", b"application/json"),
        (b"accept-encoding", b"gzip, deflate, br"),
        (b"origin", b"https://app.example.com"),
        (b"x-forwarded-for", b"198.51.100.7"),
        (b"x-forwarded-proto", b"https"),
    ]
    if body:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("10.0.0.5", 40000),
        "server": ("10.0.0.9", 8000),
        "state": {},
    }


async def call(app: Callable[..., Awaitable[None]], method: str, path: str, body: bytes) -> int:
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]

    await app(scope_of(method, path, body), receive, send)
    return status


async def time_calls(
    app: FastAPI, request: Request, calls: int = CALLS_PER_ROUND, clock: Callable[[], float] = time.process_time
) -> float:
    """Return seconds per call."""
    start = clock()
    for _ in range(calls):
        await call(app, *request)
    return (clock() - start) / calls


async def measure(candidates: dict[str, FastAPI], rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return for each kind of request and each app: the ratio to the first app, and microseconds of CPU time."""
    results = {}
    for kind, request in REQUESTS.items():
        for name, app in candidates.items():
            status = await call(app, *request)
            if status != 200:
                raise SystemExit(f"{name}: {kind} answered {status}")
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, app in candidates.items():
                times[name].append(await time_calls(app, request))
        fast = {name: fastest_third(own) for name, own in times.items()}
        base = next(iter(fast.values()))
        results[kind] = {name: (seconds / base, seconds * 1e6) for name, seconds in fast.items()}
    return results


def fastest_third(seconds: list[float]) -> float:
    """Return the mean of the rounds that nothing else on the machine has slowed down."""
    return statistics.mean(sorted(seconds)[: math.ceil(len(seconds) / 3)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="rounds per kind of request")
    parser.add_argument("--limit", type=float, help="fail if create_app costs more than this many times bare FastAPI()")
    options = parser.parse_args()

    lines = io.TextIOWrapper(open(os.devnull, "wb"), write_through=True)  # noqa: PTH123, SIM115 - lives as long as main
    stdout, sys.stdout = sys.stdout, lines
    try:
        # The whole first: it configures logging, as it would in a service, and the pieces are measured with that.
        compared = ("bare FastAPI()", "create_app(settings)")
        candidates = {name: make for name, make in apps().items() if options.limit is None or name in compared}
        made = {name: make() for name, make in reversed(candidates.items())}
        made = dict(reversed(made.items()))  # and bare FastAPI() first, to which the others are compared
        results = asyncio.run(measure(made, options.rounds))
    finally:
        sys.stdout = stdout

    print(f"{'':24}" + "".join(f"{kind:>18}" for kind in results))
    for name in made:
        cells = (results[kind][name] for kind in results)
        print(f"{name:24}" + "".join(f"{ratio:9.2f} {micros:5.0f} us" for ratio, micros in cells))
    worst = max(results[kind]["create_app(settings)"][0] for kind in results)
    print(f"\ncreate_app(settings) costs at most {worst:.2f} times bare FastAPI()")
    return int(options.limit is not None and worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
