"""Rules about the app: its middleware, their order, and public endpoints."""

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fastapi_prodkit import _scope
from fastapi_prodkit._config import production_rules
from fastapi_prodkit.cli.doctor.apps import apps, endpoints, module_of
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule
from fastapi_prodkit.sections import CorsSettings

__all__ = ["ORDER", "RULES"]

# Order of the edge's layers, outermost first, by class name: other packages' middleware may have the same names.
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
def not_loaded(facts: Facts) -> Iterator[Problem]:
    """Report the error that loading the app raises; a server would fail by the same error."""
    if facts.failure is not None:
        yield Problem(
            f"{facts.failure.rstrip('.')}.",
            "FASTAPI_PRODKIT_TRACEBACK=1 fastapi-prodkit serve MODULE:APP shows where it comes from.",
        )


@rule("app-debug", "error", "Debug mode is on")
def debug(facts: Facts) -> Iterator[Problem]:
    """Report an app that shows its source code in error responses."""
    for prefix, app in apps(facts.app):
        if app.debug and not (app is facts.app and getattr(facts.settings, "debug", False)):
            yield Problem(
                f"Errors{_below(prefix)} show tracebacks and source to every client.",
                "Leave debug=True out of FastAPI(...).",
            )


@rule("app-base-http-middleware", "warning", "BaseHTTPMiddleware is in use")
def base_http(facts: Facts) -> Iterator[Problem]:
    """Report slow middleware that breaks context variables."""
    names = [
        getattr(each.kwargs.get("dispatch"), "__name__", each.cls.__name__) + _below(prefix)
        for prefix, each in _middleware(facts)
        if isinstance(each.cls, type) and issubclass(each.cls, BaseHTTPMiddleware) and not _is_slowapi(each.cls)
    ]
    if names:
        yield Problem(
            f"{', '.join(names)}: each costs about 140 microseconds a request, loses context variables, and hides "
            'failures in the middle of a response. @app.middleware("http") makes one, too.',
            "Write it as pure ASGI middleware, or as a dependency.",
        )


@rule("app-slowapi-middleware", "error", "slowapi's middleware is in use")
def slowapi_middleware(facts: Facts) -> Iterator[Problem]:
    """Report middleware that skips limits and breaks streaming."""
    for prefix, each in _middleware(facts):
        if _is_slowapi(each.cls):
            yield Problem(
                f"{each.cls.__name__}{_below(prefix)} applies no default limit to routes of included routers, to "
                "mounted apps and to WebSockets; the ASGI one breaks streaming.",
                "Remove it: RATE_LIMIT_DEFAULT, or RateLimitMiddleware, counts every request.",
            )


@rule("app-slowapi-limiter", "warning", "slowapi's own limiter is in use")
def slowapi_limiter(facts: Facts) -> Iterator[Problem]:
    """Report a limiter that blocks the event loop while its store is slow."""
    if any(_is_slowapi(type(getattr(app.state, "limiter", None))) for _, app in apps(facts.app)):
        yield Problem(
            "Its client is synchronous: while the store is slow every request waits, and an outage is a 500.",
            "Use Limiter of fastapi_prodkit.rate_limit.slowapi; the decorators stay.",
        )


@rule("app-docs-public", "warning", "The documentation is public")
def docs_public(facts: Facts) -> Iterator[Problem]:
    """Report documentation pages that any client can read."""
    for prefix, app in apps(facts.app):
        docs = getattr(_settings(facts, app), "docs", None)
        if isinstance(app, FastAPI) and app.openapi_url is not None and getattr(docs, "token", None) is None:
            ours = "/docs" if docs is not None else None
            pages = [path for path in (app.docs_url or ours, app.redoc_url, app.openapi_url) if path]
            yield Problem(
                f"{', '.join(prefix + path for path in pages)}: every client can read the list of operations.",
                "Set DOCS_TOKEN, leave DOCS_ENABLED out, or pass FastAPI(openapi_url=None); keep them if they may be.",
            )


@rule("app-metrics-public", "warning", "The metrics are public")
def metrics_public(facts: Facts) -> Iterator[Problem]:
    """Report metrics that any client can read."""
    of_mounted = [(prefix, _settings(facts, app)) for prefix, app in apps(facts.app) if app is not facts.app]
    for prefix, settings in [("", facts.settings), *of_mounted]:
        if getattr(getattr(settings, "metrics", None), "public", False):
            yield Problem(
                f"METRICS_PUBLIC lets every client read {prefix}/metrics.",
                "Set METRICS_TOKEN instead, and configure it in Prometheus.",
            )
    for prefix, app in apps(facts.app):
        for path, endpoint, _ in endpoints(app):
            if path.rstrip("/") == "/metrics" and not module_of(endpoint).startswith("fastapi_prodkit."):
                yield Problem(
                    f"{prefix}/metrics is a route of the app itself, and requires no METRICS_TOKEN.",
                    "Use metrics_router(), or require a token.",
                )


@rule("app-cors", "error", "Any web site may act as its visitors")
def cors(facts: Facts) -> Iterator[Problem]:
    """Report unsafe CORS middleware that the app added itself."""
    for prefix, each in _middleware(facts):
        if getattr(each.cls, "__name__", "") == "CORSMiddleware":
            for _, text in production_rules.refusals("cors", _cors_settings(each), {}):
                reason, _, remedy = text.partition(": ")
                yield Problem(f"CORSMiddleware{_below(prefix)}: {reason}.", f"Here: {remedy}.")


@rule("app-duplicate-middleware", "warning", "A middleware runs twice")
def duplicate(facts: Facts) -> Iterator[Problem]:
    """Report middleware that was added twice, or that the app's edge already has."""
    names = Counter(name for name in _names(facts) if name != "BaseHTTPMiddleware")
    edge = _edge_names(facts)
    for name, count in names.items():
        if count > 1:
            yield Problem(f"{name} was added {count} times.", "Add it once.")
        if name in _PLACES and (twin := next((each for each in edge if _PLACES[each] == _PLACES[name]), None)):
            yield Problem(
                f"{name} was added, but the app already has {twin}.",
                "Remove it, and use the settings in place of its arguments.",
            )


@rule("app-middleware-order", "warning", "Middleware is in the wrong order")
def order(facts: Facts) -> Iterator[Problem]:
    """Report middleware that is outside of another one that should be around it."""
    placed = [name for name in _names(facts) if name in _PLACES]
    for outer, inner in pairwise(placed):
        if _PLACES[outer] > _PLACES[inner]:
            yield Problem(
                f"{outer} is outside {inner}, which does not see the responses that {outer} sends itself.",
                f"Call add_middleware({inner}, ...) after that of {outer}: the last one is outermost.",
            )


@rule("app-mounted-lifespan", "warning", "The lifespan of a mounted app does not run")
def mounted_lifespan(facts: Facts) -> Iterator[Problem]:
    """Report mounted apps whose lifespan never runs; Starlette runs only that of the outermost app."""
    if facts.app is None or hasattr(facts.app.state, _scope.INSTALLED):  # ours starts them
        return
    for prefix, app in list(apps(facts.app))[1:]:
        if _is_own(app.router.lifespan_context):
            yield Problem(
                f"{prefix}: Starlette starts the outermost app only.",
                "Use create_app or install, which run it; if the app's own lifespan does, ignore this.",
            )


def _middleware(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield the middleware of the app and of mounted apps, outermost first, with the path of each app."""
    for prefix, app in apps(facts.app):
        yield from ((prefix, each) for each in app.user_middleware)


def _names(facts: Facts) -> list[str]:
    return [getattr(each.cls, "__name__", "") for each in getattr(facts.app, "user_middleware", ())]


def _below(prefix: str) -> str:
    return prefix and f" below {prefix}"


def _settings(facts: Facts, app: Starlette) -> Any:
    """Return our settings for the app or a mounted app; None if it has none."""
    if app is facts.app:
        return facts.settings
    return app.state.settings if hasattr(app.state, _scope.INSTALLED) else None


def _edge_names(facts: Facts) -> list[str]:
    """Return the class names of the edge's layers."""
    if facts.app is None or not hasattr(facts.app.state, _scope.INSTALLED):
        return []
    layers = getattr(facts.app.middleware_stack, "layers", ())
    return [name for layer in layers if (name := type(layer).__name__) in _PLACES]


def _is_slowapi(kind: Any) -> bool:
    return module_of(kind).partition(".")[0] == "slowapi"


def _is_own(lifespan: Any) -> bool:
    """Return whether a lifespan is the app's own and not FastAPI's default, which wraps included routers'."""
    if not module_of(lifespan).startswith(("starlette.", "fastapi.")):
        return True
    wrapped = getattr(inspect.unwrap(lifespan), "__closure__", None) or ()
    return any(callable(cell.cell_contents) and _is_own(cell.cell_contents) for cell in wrapped)


def _cors_settings(middleware: Middleware) -> CorsSettings | None:
    """Return the arguments of Starlette's CORSMiddleware or ours as our section; None if they are invalid."""
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
