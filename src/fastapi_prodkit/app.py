"""The assembly: `create_app(settings)`, `install(app, settings)`, and the edge.

Starlette puts its ServerErrorMiddleware outside all user middleware, so the headers that user middleware adds are
missing on 500 responses, where they matter. The edge is outermost: every response passes it, whatever is added to the
app later.

Only this module decides the order of the layers, in `_layers`. Copy the list if you need another order.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import Lifespan

from fastapi_prodkit import _scope
from fastapi_prodkit._assembly import docs, lifespans, telemetry
from fastapi_prodkit._assembly.fastapi_keywords import FastAPIKeywords
from fastapi_prodkit._assembly.pieces import Given, cors_settings, make_management, make_pieces, make_probes
from fastapi_prodkit._config.production_rules import refuse_worker
from fastapi_prodkit._pipeline.edge import Edge
from fastapi_prodkit._pipeline.layers import Layer, LayerStack
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.body_limit import BodyLimitMiddleware, largest_limit
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.disconnect import DisconnectMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware, add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.head_limit import HeadLimitMiddleware
from fastapi_prodkit.health import Check
from fastapi_prodkit.log_level import log_level_router
from fastapi_prodkit.logging import configure_logging
from fastapi_prodkit.metrics import MetricsMiddleware
from fastapi_prodkit.metrics.multiprocess import make_directory
from fastapi_prodkit.openapi import add_problem_schemas, operation_id
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.rate_limit import MemoryStore, RateLimitMiddleware, Store
from fastapi_prodkit.rate_limit.endpoints import ExemptEndpoints
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.security_headers import PagePolicyMiddleware, SecurityHeadersMiddleware
from fastapi_prodkit.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fastapi_prodkit.auth import Auth
    from fastapi_prodkit.database import Database

__all__ = ["Edge", "Layer", "LayerStack", "create_app", "install"]

_LEFT_TO_CONSTRUCTOR = "generate_unique_id_function=fastapi_prodkit.openapi.operation_id"


def create_app(  # noqa: PLR0913 - keywords
    settings: Settings | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    checks: Mapping[str, Check] | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
    middleware: Sequence[Middleware] = (),
    mounted_lifespans: bool = True,
    auth: "Auth[Any] | None" = None,
    database: "Database | None" = None,
    store: Store | None = None,
    registry: "CollectorRegistry | None" = None,
    csp_policies: Mapping[str, str] | None = None,
    **fastapi_kwargs: Unpack[FastAPIKeywords],
) -> FastAPI:
    """Return a FastAPI app with every piece that the settings switch on.

        app = create_app(Settings(), routers=[router], title="Orders")

    Args:
        settings: Read from the environment unless given.
        routers: Included in this order.
        checks: Further readiness checks by name; each raises to fail.
        lifespan: The app's own lifespan; it starts after the database's and ends before it.
        middleware: The app's own middleware, inside the edge.
        mounted_lifespans: Run the lifespans of mounted apps (Starlette does not); False leaves them to `lifespan`.
        auth: Authenticates callers, in place of one from `settings.auth`; every route needs one unless it is `public`.
        database: Used in place of one from `settings.database`. The app's lifespan runs its lifespan, which closes it.
        store: Counts requests, in place of a store from `settings.rate_limit`. The app's lifespan runs the store's
            lifespan, if it has one.
        registry: The registry of all metrics, which /metrics shows; prometheus_client's default registry unless given.
            A database or store that is given keeps the registry with which it was created.
        csp_policies: Content-Security-Policy by path, in place of HEADERS_CSP: for a path and all paths below it.
        fastapi_kwargs: Further keywords of `FastAPI()`; they win over values from the settings.

    Raises:
        ConfigurationError: A setting or an argument cannot be used, such as a limit that cannot be parsed.
        SettingsError: The environment cannot be used; the error lists all problems.
        MissingExtraError: The optional dependency of a piece that is switched on is not installed.
    """
    settings = _start(settings, store)
    app = FastAPI(
        lifespan=lifespan, middleware=list(middleware), **{**_constructor_arguments(settings), **fastapi_kwargs}
    )
    _assemble(app, settings, Given(checks, mounted_lifespans, auth, database, store, registry, csp_policies))
    for router in routers:
        app.include_router(router)
    return app


def install(  # noqa: PLR0913 - keywords
    app: FastAPI,
    settings: Settings | None = None,
    *,
    checks: Mapping[str, Check] | None = None,
    mounted_lifespans: bool = True,
    auth: "Auth[Any] | None" = None,
    database: "Database | None" = None,
    store: Store | None = None,
    registry: "CollectorRegistry | None" = None,
    csp_policies: Mapping[str, str] | None = None,
) -> None:
    """Put every piece that the settings switch on into an app that already exists.

        install(app, Settings())

    FastAPI's own docs pages, which load their scripts from a CDN, are replaced by ours; without DOCS_ENABLED they are
    removed, and the schema with them. Operation ids, which only FastAPI's constructor can set, stay as they are; a log
    line says how to set them.

    Args:
        app: An app that has not started.
        settings: Read from the environment unless given.
        checks: Further readiness checks by name; each raises to fail.
        mounted_lifespans: Run the lifespans of mounted apps (Starlette does not); False leaves them to the app's.
        auth: Authenticates callers, in place of one from the settings; every route needs one unless it is `public`.
        database: Used in place of one from the settings; run and closed by the app's lifespan.
        store: Counts requests, in place of a store from the settings; run and closed by the app's lifespan.
        registry: The registry of all metrics, in place of prometheus_client's default registry.
        csp_policies: Content-Security-Policy by path, in place of HEADERS_CSP: for a path and all paths below it.

    Raises:
        ConfigurationError: The app has started, or `install` was called on it before. Or a setting or an argument
            cannot be used, such as a limit that cannot be parsed.
        SettingsError: The environment cannot be used; the error lists all problems.
        MissingExtraError: The optional dependency of a piece that is switched on is not installed.
    """
    settings = _start(settings, store)
    if app.middleware_stack is not None:
        raise ConfigurationError("the app has already started: call install(app) before that, where app is created")
    if hasattr(app.state, _scope.INSTALLED):
        raise ConfigurationError("install(app) was called before on this app; call it once")
    app.debug = app.debug or settings.debug
    docs.remove(app, settings)
    _assemble(app, settings, Given(checks, mounted_lifespans, auth, database, store, registry, csp_policies))
    logging.getLogger("fastapi_prodkit").info("install leaves to FastAPI(...): %s", _LEFT_TO_CONSTRUCTOR)


def _start(settings: Settings | None, store: Store | None) -> Settings:
    """Read the settings unless given, and configure logging before anything else is logged."""
    with warnings.catch_warnings(record=True) as caught:
        settings = settings or Settings()
        if store is None or isinstance(store, MemoryStore):
            refuse_worker(settings.rate_limit, settings.environment)
    if settings.log is not None:
        service = settings.service
        configure_logging(settings.log, service=service.name, version=service.version, environment=settings.environment)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return settings


def _constructor_arguments(settings: Settings) -> dict[str, Any]:
    return {
        "title": settings.service.name,
        "version": settings.service.version,
        "debug": settings.debug,
        "docs_url": None,  # FastAPI's own pages load their scripts from a CDN, which our CSP forbids
        "redoc_url": None,
        "openapi_url": "/openapi.json" if settings.docs is not None else None,
        "generate_unique_id_function": operation_id,
    }


def _assemble(app: FastAPI, settings: Settings, given: Given) -> None:
    pieces = _make_objects(app, settings, given)
    if settings.routing and settings.routing.index:
        index_routes(app)  # innermost, in place of the loop over all routes in FastAPI's router
    _guard(app)
    _add_handlers_and_docs(app, settings, pieces, given)
    probes = make_probes(settings, pieces, given)
    _compose_lifespans(app, pieces, probes, given)
    _put_edge_around(app, settings, pieces, probes, given)


def _make_objects(app: FastAPI, settings: Settings, given: Given) -> dict[str, Any]:
    """Create the objects that are not given, and set all on `app.state`, where dependencies look them up."""
    make_directory()
    pieces = make_pieces(settings, given)
    taken = next((name for name, piece in pieces.items() if getattr(app.state, name, piece) is not piece), None)
    if taken is not None:
        raise ConfigurationError(f"app.state.{taken} exists already, but dependencies look up ours there: rename yours")
    for name, piece in {"settings": settings, **pieces, _scope.INSTALLED: pieces}.items():
        if not hasattr(app.state, name):
            setattr(app.state, name, piece)
    return pieces


def _add_handlers_and_docs(app: FastAPI, settings: Settings, pieces: Mapping[str, Any], given: Given) -> None:
    add_problem_handlers(app)
    if "database" in pieces:
        from fastapi_prodkit.database import add_outage_handlers  # noqa: PLC0415 - needs an extra

        add_outage_handlers(app, client_errors=pieces["database"].client_errors)
    add_problem_schemas(app)
    docs.put_first(app, settings, pieces.get("auth"), given.registry)


def _compose_lifespans(app: FastAPI, pieces: Mapping[str, Any], probes: Sequence[APIRouter], given: Given) -> None:
    # Signals first, so that a signal is handled while the other lifespans start.
    living = (pieces[name] for name in ("shutdown", "event_loop", "auth", "database", "rate_limit") if name in pieces)
    ours = [piece.lifespan for piece in living if hasattr(piece, "lifespan")]
    ours += [router.lifespan_context for router in probes]
    lifespans.compose(app, ours, mounted=given.mounted_lifespans)
    telemetry.switch_off_if_unused(app)


def _guard(app: FastAPI) -> None:
    """Guard the routes of the app's router; called again when the app starts, because the router may be another one."""
    auth = getattr(app.state, _scope.INSTALLED).get("auth")
    if auth is not None:
        from fastapi_prodkit.auth import guard_routes  # noqa: PLC0415 - loaded where it is used

        guard_routes(app, auth)


def _put_edge_around(
    app: FastAPI, settings: Settings, pieces: Mapping[str, Any], probes: Sequence[APIRouter], given: Given
) -> None:
    probed = [cast("Route", route) for router in probes for route in router.routes]
    levels = log_level_router(settings.log, registry=given.registry).routes if settings.log else []
    exempt = frozenset(route.path.rstrip("/") or "/" for route in probed)
    layers = _layers(app, settings, pieces, exempt, given)
    edge = Edge(layers, management=make_management([*probed, *levels]), installed=pieces, before_start=_guard)
    edge.put_around(app)
    if "shutdown" in pieces:
        pieces["shutdown"].on_drain(edge.close_connections)


def _layers(
    app: FastAPI,
    settings: Settings,
    pieces: Mapping[str, Any],
    exempt: frozenset[str],
    given: Given,
) -> list[Layer]:
    """Return the layers of the edge, outermost first; a section that is None leaves its layer out."""
    limits, hosts, rate_limit = settings.limits, settings.hosts, settings.rate_limit
    cors, proxy, store = cors_settings(settings), settings.proxy, pieces.get("rate_limit")
    layers = [
        # Sets the client and the scheme that all layers below read.
        proxy and proxy.trusted and ProxyHeadersMiddleware(app, proxy),
        # Opens the request context, so that everything below can log with the id.
        settings.request_id and RequestIDMiddleware(app, settings.request_id),
        # Sees every response with its final status.
        settings.access_log and AccessLogMiddleware(app, exempt=exempt),
        # Logs an unhandled exception, and swallows it if the response is complete.
        settings.errors and ErrorBoundaryMiddleware(app, settings.errors, explain=settings.environment == "dev"),
        settings.metrics and MetricsMiddleware(app, exempt=exempt, registry=given.registry),
        # Outside of the security headers, to see the policy that is sent.
        settings.environment == "dev" and PagePolicyMiddleware(app),
        # On every response, including those of the layers below.
        settings.headers and SecurityHeadersMiddleware(app, settings.headers, policies=given.csp_policies),
        # Answers preflights: never limited, never authenticated. Its headers are on every refusal below, too.
        cors and cors.configured and CORSMiddleware(app, cors),
        # Before every layer that searches the header lines.
        limits and limits.max_headers and HeadLimitMiddleware(app, limits),
        hosts and AllowedHostsMiddleware(app, hosts, exempt=exempt),
        # Before every layer that costs time; a request that is refused here uses up no quota.
        limits
        and limits.max_concurrent
        and ConcurrencyLimitMiddleware(app, limits, exempt=exempt, registry=given.registry),
        # After the other checks, so that a request that they refuse uses up no quota.
        rate_limit
        and rate_limit.default
        and RateLimitMiddleware(app, rate_limit, exempt=exempt, store=store, uncounted=ExemptEndpoints(app)),
        # Limits the time of the app; without a general time-out, only of routes that have a time-out of their own.
        limits and DeadlineMiddleware(app, limits, exempt=exempt),
        # Cancels the app if the client disconnects; a route's own `cancel_on_disconnect` does not need this layer.
        limits and limits.cancel_on_disconnect and DisconnectMiddleware(app, limits, exempt=exempt),
        limits and BodyLimitMiddleware(app, limits, largest=lambda: largest_limit(app.routes)),
    ]
    return [layer for layer in layers if isinstance(layer, Layer)]
