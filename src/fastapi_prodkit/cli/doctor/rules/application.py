"""Rules about the app: what it is made of, in which order, and what it shows to everybody."""

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Host, Mount, Router

from fastapi_prodkit import _scope
from fastapi_prodkit._config import production_rules
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.cli.doctor.loading import unwrap
from fastapi_prodkit.sections import CorsSettings

__all__ = ["ORDER", "RULES"]

# The order of the edge, outermost first, by the names of the classes: others' middleware has them, too.
ORDER = (
    ("ProxyHeadersMiddleware",),
    ("RequestIDMiddleware", "CorrelationIdMiddleware"),
    ("AccessLogMiddleware",),
    ("ErrorBoundaryMiddleware",),
    ("MetricsMiddleware", "PrometheusMiddleware", "PrometheusInstrumentatorMiddleware"),
    ("SecurityHeadersMiddleware",),
    ("CORSMiddleware",),
    ("HeadLimitMiddleware",),
    ("AllowedHostsMiddleware", "TrustedHostMiddleware"),
    ("ConcurrencyLimitMiddleware",),
    ("RateLimitMiddleware", "SlowAPIMiddleware", "SlowAPIASGIMiddleware"),
    ("DeadlineMiddleware",),
    ("DisconnectMiddleware",),
    ("BodyLimitMiddleware",),
)
_PLACES = {name: place for place, names in enumerate(ORDER) for name in names}


@rule("app-not-loaded", "error", "The app cannot be loaded")
def not_loaded(facts: Facts) -> Iterator[Fault]:
    """Tell what the app raised when it was made; a server would end with the same."""
    if facts.failure is not None:
        yield Fault(
            f"{facts.failure.rstrip('.')}.",
            "FASTAPI_PRODKIT_TRACEBACK=1 fastapi-prodkit serve MODULE:APP shows where it comes from.",
        )


@rule("app-debug", "error", "Debug mode is on")
def debug(facts: Facts) -> Iterator[Fault]:
    """Tell of an app that shows its source to whoever provokes an error."""
    for prefix, app in _apps(facts):
        if app.debug and not (app is facts.app and getattr(facts.settings, "debug", False)):
            yield Fault(
                f"Errors{_below(prefix)} show tracebacks and source to every client.",
                "Leave debug=True out of FastAPI(...).",
            )


@rule("app-base-http-middleware", "warning", "BaseHTTPMiddleware is in use")
def base_http(facts: Facts) -> Iterator[Fault]:
    """Tell of middleware that costs more than all pieces together, and breaks context variables."""
    names = [
        getattr(each.kwargs.get("dispatch"), "__name__", each.cls.__name__) + _below(prefix)
        for prefix, each in _middleware(facts)
        if isinstance(each.cls, type) and issubclass(each.cls, BaseHTTPMiddleware) and not _is_slowapi(each.cls)
    ]
    if names:
        yield Fault(
            f"{', '.join(names)}: each costs about 140 microseconds a request, loses context variables, and hides "
            'failures in the middle of a response. @app.middleware("http") makes one, too.',
            "Write it as pure ASGI middleware, or as a dependency.",
        )


@rule("app-slowapi-middleware", "error", "slowapi's middleware is in use")
def slowapi_middleware(facts: Facts) -> Iterator[Fault]:
    """Tell of limits that are not applied, and of streams that break."""
    for prefix, each in _middleware(facts):
        if _is_slowapi(each.cls):
            yield Fault(
                f"{each.cls.__name__}{_below(prefix)} applies no default limit to routes of included routers, to "
                "mounted apps and to WebSockets; the ASGI one breaks streaming.",
                "Remove it: RATE_LIMIT_DEFAULT, or RateLimitMiddleware, counts every request.",
            )


@rule("app-slowapi-limiter", "warning", "slowapi's own limiter is in use")
def slowapi_limiter(facts: Facts) -> Iterator[Fault]:
    """Tell of a limiter that stops the event loop while its store is slow."""
    if any(_is_slowapi(type(getattr(app.state, "limiter", None))) for _, app in _apps(facts)):
        yield Fault(
            "Its client is synchronous: while the store is slow every request waits, and an outage is a 500.",
            "Take Limiter from fastapi_prodkit.rate_limit.slowapi; the decorators stay.",
        )


@rule("app-docs-public", "warning", "The documentation is public")
def docs_public(facts: Facts) -> Iterator[Fault]:
    """Tell where everybody can read which operations there are."""
    for prefix, app in _apps(facts):
        if isinstance(app, FastAPI) and app.openapi_url is not None:
            ours = "/docs" if getattr(_settings(facts, app), "docs", None) is not None else None
            pages = [path for path in (app.docs_url or ours, app.redoc_url, app.openapi_url) if path]
            yield Fault(
                f"{', '.join(prefix + path for path in pages)}: everybody can read which operations there are.",
                "Leave DOCS_ENABLED out, or pass openapi_url=None to FastAPI(...); keep them if the API is public.",
            )


@rule("app-metrics-public", "warning", "The metrics are public")
def metrics_public(facts: Facts) -> Iterator[Fault]:
    """Tell where everybody can read routes, load and errors."""
    of_mounted = [(prefix, _settings(facts, app)) for prefix, app in _apps(facts) if app is not facts.app]
    for prefix, settings in [("", facts.settings), *of_mounted]:
        if getattr(getattr(settings, "metrics", None), "public", False):
            yield Fault(
                f"METRICS_PUBLIC opens {prefix}/metrics to everybody.",
                "Set METRICS_TOKEN instead, and tell it to Prometheus.",
            )
    for prefix, app in _apps(facts):
        for path, endpoint in _endpoints(app):
            if path.rstrip("/") == "/metrics" and not _module(endpoint).startswith("fastapi_prodkit."):
                yield Fault(
                    f"{prefix}/metrics is a route of the app's own: nothing asks for a token.",
                    "Use metrics_router(), or guard it.",
                )


@rule("app-cors", "error", "Any web site may act for its visitors")
def cors(facts: Facts) -> Iterator[Fault]:
    """Tell of CORS middleware that was added by hand and lets strangers in."""
    for prefix, each in _middleware(facts):
        if getattr(each.cls, "__name__", "") == "CORSMiddleware":
            for _, text in production_rules.refusals("cors", _cors_settings(each), {}):
                reason, _, remedy = text.partition(": ")
                yield Fault(f"CORSMiddleware{_below(prefix)}: {reason}.", f"Here: {remedy}.")


@rule("app-duplicate-middleware", "warning", "A middleware runs twice")
def duplicate(facts: Facts) -> Iterator[Fault]:
    """Tell what was added twice, or by hand to an app that has it already."""
    names = Counter(name for name in _names(facts) if name != "BaseHTTPMiddleware")
    edge = _edge_names(facts)
    for name, count in names.items():
        if count > 1:
            yield Fault(f"{name} was added {count} times.", "Add it once.")
        if name in _PLACES and (twin := next((each for each in edge if _PLACES[each] == _PLACES[name]), None)):
            yield Fault(
                f"{name} was added, and {twin} stands around the app already.",
                "Remove it, and set what it was told in the settings.",
            )


@rule("app-middleware-order", "warning", "Middleware is in the wrong order")
def order(facts: Facts) -> Iterator[Fault]:
    """Tell which middleware stands outside one that it needs around it."""
    placed = [name for name in _names(facts) if name in _PLACES]
    for outer, inner in pairwise(placed):
        if _PLACES[outer] > _PLACES[inner]:
            yield Fault(
                f"{outer} stands outside {inner}: what it answers itself goes without it.",
                f"Call add_middleware({inner}, ...) after that of {outer}: what is added last is outermost.",
            )


@rule("app-mounted-lifespan", "warning", "The lifespan of a mounted app does not run")
def mounted_lifespan(facts: Facts) -> Iterator[Fault]:
    """Tell which mounted apps are never started; Starlette starts the outermost one only."""
    if facts.app is None or hasattr(facts.app.state, _scope.INSTALLED):  # ours starts them
        return
    for prefix, app in list(_apps(facts))[1:]:
        if _is_own(app.router.lifespan_context):
            yield Fault(
                f"{prefix}: Starlette starts the outermost app only.",
                "Use create_app or install, which start them too; if the app's own lifespan runs it, all is well.",
            )


def _middleware(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield what was added to the app, outermost first, and to those that are mounted in it, with their paths."""
    for prefix, app in _apps(facts):
        yield from ((prefix, each) for each in app.user_middleware)


def _names(facts: Facts) -> list[str]:
    return [getattr(each.cls, "__name__", "") for each in getattr(facts.app, "user_middleware", ())]


def _below(prefix: str) -> str:
    return prefix and f" below {prefix}"


def _settings(facts: Facts, app: Starlette) -> Any:
    """Return our settings of the app, or of the one mounted in it; None if it was not made with them."""
    if app is facts.app:
        return facts.settings
    return app.state.settings if hasattr(app.state, _scope.INSTALLED) else None


def _edge_names(facts: Facts) -> list[str]:
    """Return the names of what stands around an app of ours."""
    if facts.app is None or not hasattr(facts.app.state, _scope.INSTALLED):
        return []
    layers = getattr(facts.app.middleware_stack, "layers", ())
    return [name for layer in layers if (name := type(layer).__name__) in _PLACES]


def _is_slowapi(kind: Any) -> bool:
    return _module(kind).partition(".")[0] == "slowapi"


def _module(thing: Any) -> str:
    return getattr(thing, "__module__", None) or ""


def _apps(facts: Facts) -> Iterator[tuple[str, Starlette]]:
    """Yield the app and those that are mounted in it, with their paths."""
    if facts.app is not None:
        yield from _walk(facts.app, "")


def _walk(app: Starlette, prefix: str) -> Iterator[tuple[str, Starlette]]:
    yield prefix, app
    for path, endpoint in _endpoints(app):
        if isinstance(endpoint, Starlette):
            yield from _walk(endpoint, prefix + path)


def _endpoints(app: Starlette | Router, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what the routes lead to, with their paths: those of routers that are mounted, too."""
    for context in iter_route_contexts(app.routes):
        route: Any = context.original_route
        path = f"{prefix}{context.path or ''}"
        mounted = unwrap(route.app) if isinstance(route, Mount | Host) else None
        if isinstance(mounted, Router):
            yield from _endpoints(mounted, path)
        else:
            yield path, mounted or getattr(route, "endpoint", None)


def _is_own(lifespan: Any) -> bool:
    """Say whether it is somebody's own: FastAPI wraps it for each router that is included."""
    if not _module(lifespan).startswith(("starlette.", "fastapi.")):
        return True
    wrapped = getattr(inspect.unwrap(lifespan), "__closure__", None) or ()
    return any(callable(cell.cell_contents) and _is_own(cell.cell_contents) for cell in wrapped)


def _cors_settings(middleware: Middleware) -> CorsSettings | None:
    """Return what Starlette's CORSMiddleware or ours was told, as our section; None if it does not fit."""
    starlettes = {"allow_origins": "origins", "allow_origin_regex": "origin_regex"}
    given = {starlettes.get(name, name): value for name, value in middleware.kwargs.items()}
    sections = [each for each in (given.get("settings"), *middleware.args) if isinstance(each, CorsSettings)]
    values = {name: given[name] for name in ("origins", "origin_regex", "allow_credentials") if name in given}
    try:
        return CorsSettings.model_validate({**dict(*sections[:1]), **values})
    except ValidationError:
        return None


RULES = (
    not_loaded,
    debug,
    base_http,
    slowapi_middleware,
    slowapi_limiter,
    docs_public,
    metrics_public,
    cors,
    duplicate,
    order,
    mounted_lifespan,
)
