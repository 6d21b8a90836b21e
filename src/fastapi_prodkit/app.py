"""The assembly: `create_app(settings)`, `install(app, settings)`, and the edge.

Starlette keeps its ServerErrorMiddleware outside all user middleware, so what user middleware adds is missing from
exactly the responses where it matters: the 500s. The edge is wrapped around what the app's
`build_middleware_stack()` returns, so that no response escapes it, whatever is added to the app later.

This is the only module that knows order. It is a list to be read, and to be copied by whoever needs another one.
"""

import logging
from collections import ChainMap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from fastapi_prodkit import _lifespan
from fastapi_prodkit._asgi import ExactRoutes
from fastapi_prodkit._exchange import Piece, Stack
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.client_address import ProxyHeadersMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.health import Check, health_router
from fastapi_prodkit.logging import configure_logging
from fastapi_prodkit.metrics import MetricsMiddleware, metrics_router
from fastapi_prodkit.openapi import add_problem_schemas, docs_router, operation_id
from fastapi_prodkit.rate_limit import MemoryStore, RateLimitMiddleware
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.security_headers import SecurityHeadersMiddleware
from fastapi_prodkit.settings import Settings

__all__ = ["create_app", "install"]

_PIECES = "fastapi_prodkit"  # scope key and app.state attribute: what dependencies find
_EXEMPT = frozenset({"/health", "/ready", "/metrics"})


def create_app(
    settings: Settings | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    checks: Mapping[str, Check] | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
    middleware: Sequence[Middleware] = (),
    **fastapi_kwargs: Any,
) -> FastAPI:
    """Return a FastAPI app with every piece that the settings switch on.

    Args:
        settings: Read from the environment unless given.
        routers: Included in this order.
        checks: Further readiness checks by name; each raises to fail.
        lifespan: The app's own; it starts after the database's and ends before it.
        middleware: The app's own, inside the edge.
        fastapi_kwargs: Whatever `FastAPI()` takes; they win over what the settings imply.

    Raises:
        SettingsError: The environment cannot be used; all that is wrong with it.
        MissingExtraError: A piece is switched on whose optional dependency is not installed.
    """
    settings = settings or Settings()
    _configure_logging(settings)
    app = FastAPI(
        lifespan=lifespan, middleware=list(middleware), **{**_constructor_arguments(settings), **fastapi_kwargs}
    )
    _assemble(app, settings, checks)
    for router in routers:
        app.include_router(router)
    return app


def install(app: FastAPI, settings: Settings | None = None, *, checks: Mapping[str, Check] | None = None) -> None:
    """Put every piece that the settings switch on into an app that already exists.

    What only FastAPI's constructor can set is left as it is, and a log line says so: telemetry, operation ids, and
    the docs pages of an app that has FastAPI's own.

    Raises:
        ConfigurationError: The app has started, or has been installed before; the edge would do nothing, or all twice.
        SettingsError: The environment cannot be used; all that is wrong with it.
        MissingExtraError: A piece is switched on whose optional dependency is not installed.
    """
    settings = settings or Settings()
    _configure_logging(settings)
    left = ["generate_unique_id_function=fastapi_prodkit.openapi.operation_id", "telemetry={...}"]
    if app.docs_url is not None or app.redoc_url is not None:
        left.append("docs_url=None, redoc_url=None")
    logging.getLogger("fastapi_prodkit").info("install leaves to FastAPI(...): %s", "; ".join(left))
    app.debug = app.debug or settings.debug
    _assemble(app, settings, checks)


def _configure_logging(settings: Settings) -> None:
    if settings.log is not None:
        service = settings.service
        configure_logging(settings.log, service=service.name, version=service.version, environment=settings.environment)


def _constructor_arguments(settings: Settings) -> dict[str, Any]:
    return {
        "title": settings.service.name,
        "version": settings.service.version,
        "debug": settings.debug,
        "docs_url": None,  # FastAPI's own pages load their scripts from a CDN, which our CSP forbids
        "redoc_url": None,
        "openapi_url": "/openapi.json" if settings.docs is not None else None,
        "generate_unique_id_function": operation_id,
        "telemetry": {"tracing": False, "metrics": False, "logs": False},  # costs 10 us a request even when idle
    }


def _assemble(app: FastAPI, settings: Settings, checks: Mapping[str, Check] | None) -> None:
    if app.middleware_stack is not None:
        raise ConfigurationError("install(app) came too late: the app has already started; call it where app is made")
    if hasattr(app.state, _PIECES):
        raise ConfigurationError("install(app) was called before on this app; call it once")

    pieces = _pieces(settings)
    app.state.settings = settings
    setattr(app.state, _PIECES, pieces)
    for name, piece in pieces.items():
        setattr(app.state, name, piece)

    add_problem_handlers(app)
    add_problem_schemas(app)
    # In front of the app's own routes, so that a catch-all does not hide them; and not through include_router, so that
    # the app's own dependencies, such as authentication, do not apply to a load balancer.
    routes = _routes(app, settings, pieces, checks)
    exact = [route for route in routes if "{" not in route.path]
    app.router.routes[:0] = [ExactRoutes(exact), *(route for route in routes if route not in exact)]
    database = pieces.get("database")
    _lifespan.compose(app, [database.lifespan] if database is not None else [])

    build = app.build_middleware_stack

    def build_with_edge() -> ASGIApp:
        stack = build()
        return _Edge(stack, _edge(stack, settings, pieces), pieces)

    app.build_middleware_stack = build_with_edge  # type: ignore[method-assign]  # the one seam outside everything


def _pieces(settings: Settings) -> dict[str, Any]:
    """Make the objects that dependencies look for."""
    pieces: dict[str, Any] = {}
    if settings.rate_limit is not None:
        pieces["rate_limit"] = MemoryStore()
    if settings.database is not None:
        from fastapi_prodkit.database import Database  # noqa: PLC0415 - needs an extra

        pieces["database"] = Database(settings.database)
    return pieces


def _routes(
    app: FastAPI, settings: Settings, pieces: Mapping[str, Any], checks: Mapping[str, Check] | None
) -> list[Any]:
    routers = []
    if settings.health is not None:
        database = pieces.get("database")
        ours = {"database": database.check} if database is not None else {}
        routers.append(health_router(settings.health, checks=ChainMap(cast("dict[str, Check]", checks or {}), ours)))
    if settings.metrics is not None:
        routers.append(metrics_router(settings.metrics))
    if settings.docs is not None and app.openapi_url is not None and app.docs_url is None:
        routers.append(docs_router(app))
    return [route for router in routers for route in router.routes]


def _edge(app: ASGIApp, settings: Settings, pieces: Mapping[str, Any]) -> list[Piece]:
    """Return the layers of the edge, outermost first; a section that is None has no layer."""
    proxy = settings.proxy if settings.proxy is not None and settings.proxy.trusted else None
    cors = settings.cors if settings.cors is not None and settings.cors.configured else None
    propagate = settings.environment == "test"
    layers: list[tuple[Callable[..., Piece], Any, dict[str, Any]]] = [
        # The real client and scheme, which everything below reads.
        (ProxyHeadersMiddleware, proxy, {}),
        # Opens the request context, so that everything below can log with the id.
        (RequestIDMiddleware, settings.request_id, {}),
        # Sees every response with its final status. The boundary of exceptions.
        (AccessLogMiddleware, settings.access_log, {"exempt": _EXEMPT, "propagate": propagate}),
        (MetricsMiddleware, settings.metrics, {"exempt": _EXEMPT}),
        # On every answer, those of the layers below included.
        (SecurityHeadersMiddleware, settings.headers, {}),
        # Answers preflights: never limited, never authenticated. Its headers are on every refusal below, too.
        (CORSMiddleware, cors, {}),
        (AllowedHostsMiddleware, settings.hosts, {"exempt": _EXEMPT}),
        # Only a request that is otherwise in order uses up quota.
        (RateLimitMiddleware, settings.rate_limit, {"exempt": _EXEMPT, "store": pieces.get("rate_limit")}),
        (BodyLimitMiddleware, settings.limits, {}),
    ]
    return [layer(app, section, **seams) for layer, section, seams in layers if section is not None]


class _Edge:
    """Let a request through the edge once, and let its dependencies find the pieces.

    A prodkit app that is mounted in another finds the key in the scope and serves without an edge of its own; its
    dependencies find its own pieces first.
    """

    def __init__(self, app: ASGIApp, layers: Sequence[Piece], pieces: Mapping[str, Any]) -> None:
        self.app = app
        self.layers = layers
        self._stacks = {
            kind: Stack([layer for layer in layers if kind in layer.scope_types], app) for kind in ("http", "websocket")
        }
        self._pieces = pieces

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = self.app
        if scope["type"] != "lifespan":
            outer = scope.get(_PIECES)
            if outer is None:
                app = self._stacks[scope["type"]]
            scope[_PIECES] = self._pieces if outer is None else {**outer, **self._pieces}
        return app(scope, receive, send)
