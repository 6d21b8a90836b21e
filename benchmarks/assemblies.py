"""What is put together of other packages: with care, as tutorials do it, and with the built-ins of Litestar."""

import logging
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from candidates import CAREFUL, LITESTAR, ORIGIN, PROXIES, TUTORIAL, UNLIMITED, Candidate
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ours import WHOLE, Item, add_routes, chunks
from prometheus_fastapi_instrumentator import Instrumentator
from secure import Secure
from secure.middleware import SecureASGIMiddleware
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_remote_address
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

LARGEST_BODY = 1_000_000  # bytes


class AccessLog:
    """One line per request, by a structlog logger that renders with orjson and writes bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.log = structlog.get_logger("access")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            self.log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration=round(time.perf_counter() - started, 6),
                client=scope["client"][0],
                request_id=correlation_id.get(),
            )


class BodyLimit:
    """413 for a body that is announced as larger than allowed, or that turns out to be."""

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self.app = app
        self.largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(announced) > self.largest:
            await JSONResponse({"detail": "too large"}, status_code=413)(scope, receive, send)
            return
        received = 0

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= self.largest else {"type": "http.disconnect"}

        await self.app(scope, receive_counting, send)


def limiter(limit: str) -> Limiter:
    return Limiter(key_func=get_remote_address, default_limits=[limit])


def careful_assembly(limit: str = UNLIMITED) -> FastAPI:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(),
        cache_logger_on_first_use=True,
    )
    app = FastAPI()
    app.state.limiter = limiter(limit)
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
    app.add_middleware(BodyLimit, largest=LARGEST_BODY)
    app.add_middleware(SlowAPIASGIMiddleware)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["api.example.com"])
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])
    app.add_middleware(SecureASGIMiddleware, secure=Secure.with_default_headers())
    Instrumentator().instrument(app).expose(app)
    app.add_middleware(AccessLog)
    app.add_middleware(CorrelationIdMiddleware)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=PROXIES)
    return app


Next = Callable[[Request], Awaitable[Response]]


def tutorial_assembly(limit: str = UNLIMITED) -> FastAPI:
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    log = structlog.stdlib.get_logger("access")
    app = FastAPI()
    app.state.limiter = limiter(limit)
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
    app.add_middleware(SlowAPIMiddleware)
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])
    Instrumentator().instrument(app).expose(app)

    @app.middleware("http")
    async def security_headers(request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Content-Security-Policy"] = "default-src 'self'"
        return response

    @app.middleware("http")
    async def access_log(request: Request, call_next: Next) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        log.info(
            "request",
            method=request.method,
            path=request.url.path,
            status=response.status_code,
            duration=time.perf_counter() - started,
            client=request.client.host if request.client else None,
        )
        return response

    @app.middleware("http")
    async def request_id(request: Request, call_next: Next) -> Response:
        chosen = request.headers.get("X-Request-ID") or str(uuid.uuid4())
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=chosen)
        response = await call_next(request)
        response.headers["X-Request-ID"] = chosen
        return response

    return app


def starlette(_limit: str) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def read(request: Any) -> Response:
        return JSONResponse({"item_id": int(request.path_params["item_id"])})

    async def create(request: Any) -> Response:
        try:
            item = Item.model_validate_json(await request.body())
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, status_code=422)
        return JSONResponse(item.model_dump())

    def read_in_thread(request: Any) -> Response:
        return JSONResponse({"item_id": int(request.path_params["item_id"])})

    async def stream(_request: Any) -> Response:
        return StreamingResponse(chunks(), media_type="text/plain")

    return Starlette(
        routes=[
            Route("/items/{item_id:int}", read),
            Route("/items", create, methods=["POST"]),
            Route("/sync/{item_id:int}", read_in_thread),
            Route("/stream", stream),
        ]
    )


def litestar_with(*handlers: Any, limit: str = UNLIMITED) -> Any:
    """Return an app with the built-ins of Litestar that do what `create_app` does."""
    from litestar import Litestar
    from litestar.config.allowed_hosts import AllowedHostsConfig
    from litestar.config.cors import CORSConfig
    from litestar.middleware.rate_limit import RateLimitConfig
    from litestar.plugins.prometheus import PrometheusConfig, PrometheusController
    from litestar.plugins.structlog import StructlogPlugin

    requests, unit = limit.split("/")
    return Litestar(
        [*handlers, PrometheusController],
        allowed_hosts=AllowedHostsConfig(["api.example.com"]),
        cors_config=CORSConfig(allow_origins=[ORIGIN]),
        middleware=[RateLimitConfig((unit, int(requests))).middleware, PrometheusConfig().middleware],
        plugins=[StructlogPlugin()],
        request_max_body_size=LARGEST_BODY,
    )


def litestar(limit: str) -> Any:
    from litestar import get, post
    from litestar.response import Stream

    @get("/items/{item_id:int}")
    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    @post("/items", status_code=200)
    async def create(data: Item) -> Item:
        return data

    @get("/sync/{item_id:int}", sync_to_thread=True)
    def read_in_thread(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    @get("/stream")
    async def stream() -> Stream:
        return Stream(chunks(), media_type="text/plain")

    return litestar_with(read, create, read_in_thread, stream, limit=limit)


ASSEMBLED = ("request id", "access log", "metrics", "security headers", "CORS", "rate limit")
ASSEMBLIES = {
    "bare Starlette()": Candidate(starlette),
    CAREFUL: Candidate(
        lambda limit: add_routes(careful_assembly(limit)),
        (*ASSEMBLED, "client address", "allowed hosts", "body size"),
        WHOLE,
    ),
    TUTORIAL: Candidate(lambda limit: add_routes(tutorial_assembly(limit)), ASSEMBLED, WHOLE),
    LITESTAR: Candidate(litestar, ("access log", "metrics", "CORS", "rate limit", "allowed hosts", "body size"), WHOLE),
}
