"""The routes that every app of the benchmarks serves, bare `FastAPI()`, each of our pieces alone, and `create_app`."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from candidates import ORIGIN, PROXIES, UNLIMITED, Candidate
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

CHUNKS = 1000

# As in an app that has started, if nothing takes what it records.
NO_TELEMETRY: dict[str, Any] = {"telemetry": {"tracing": False, "metrics": False, "logs": False}}


class Item(BaseModel):
    name: str
    price: float


async def chunks() -> AsyncIterator[bytes]:
    for _ in range(CHUNKS):
        yield b"0123456789" * 10


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

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(chunks(), media_type="text/plain")

    return app


def bare() -> FastAPI:
    return add_routes(FastAPI())


def silent() -> FastAPI:
    return add_routes(FastAPI(**NO_TELEMETRY))


def assembly(limit: str = UNLIMITED, **objects: Any) -> FastAPI:
    """Return `create_app` with everything on and these objects, without routes."""
    from fastapi_prodkit import Settings, create_app

    settings = Settings(
        environment="prod",
        hosts={"allowed": ["api.example.com"]},
        cors={"origins": [ORIGIN]},
        proxy={"trusted": [PROXIES]},
        metrics={"token": "a-token-for-the-benchmark"},
        rate_limit={"default": limit},
        docs={},
        database={"url": "sqlite://"},
    )
    return create_app(settings, **objects, **NO_TELEMETRY)


def whole(limit: str = UNLIMITED) -> FastAPI:
    return add_routes(assembly(limit))


def piece(module: str, name: str, **fields: Any) -> Callable[[str], FastAPI]:
    def make(_limit: str) -> FastAPI:
        app = bare()
        app.add_middleware(getattr(__import__(f"fastapi_prodkit.{module}", fromlist=[name]), name), **fields)
        return app

    return make


def access_log(limit: str) -> FastAPI:
    from fastapi_prodkit.logging import configure_logging

    configure_logging(environment="prod")
    return piece("access_log", "AccessLogMiddleware")(limit)


def rate_limit(limit: str) -> FastAPI:
    return piece("rate_limit", "RateLimitMiddleware", default=limit)(limit)


BARE = "bare FastAPI()"
WHOLE = "create_app(settings)"
OURS = {
    BARE: Candidate(lambda _: bare()),
    "FastAPI(telemetry off)": Candidate(lambda _: silent()),
    "proxy_headers": Candidate(
        piece("proxy_headers", "ProxyHeadersMiddleware", trusted=(PROXIES,)), ("client address",)
    ),
    "request_id": Candidate(piece("request_id", "RequestIDMiddleware"), ("request id",)),
    "access_log": Candidate(access_log, ("access log",)),
    "metrics": Candidate(piece("metrics", "MetricsMiddleware"), ("metrics",)),
    "security_headers": Candidate(piece("security_headers", "SecurityHeadersMiddleware"), ("security headers",)),
    "cors": Candidate(piece("cors", "CORSMiddleware", origins=(ORIGIN,)), ("CORS",)),
    "allowed_hosts": Candidate(
        piece("allowed_hosts", "AllowedHostsMiddleware", allowed=("api.example.com",)), ("allowed hosts",)
    ),
    "rate_limit": Candidate(rate_limit, ("rate limit",)),
    "head_limit": Candidate(piece("head_limit", "HeadLimitMiddleware"), ("head size",)),
    "body_limit": Candidate(piece("body_limit", "BodyLimitMiddleware"), ("body size",)),
    WHOLE: Candidate(
        whole,
        (
            "client address",
            "request id",
            "access log",
            "metrics",
            "security headers",
            "CORS",
            "allowed hosts",
            "rate limit",
            "head size",
            "body size",
        ),
    ),
}
