"""Each peer alone on a `FastAPI()`, as its own documentation says, and bootstrappers that add many things at once."""

from collections.abc import Callable
from typing import Any

from candidates import ORIGIN, PROXIES, Candidate
from fastapi import FastAPI
from ours import WHOLE, add_routes, bare


def proxy_headers(_limit: str) -> FastAPI:
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    app = bare()
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=PROXIES)
    return app


def correlation_id(_limit: str) -> FastAPI:
    from asgi_correlation_id import CorrelationIdMiddleware

    app = bare()
    app.add_middleware(CorrelationIdMiddleware)
    return app


def instrumentator(_limit: str) -> FastAPI:
    from prometheus_fastapi_instrumentator import Instrumentator

    app = bare()
    Instrumentator().instrument(app).expose(app)
    return app


def starlette_exporter(_limit: str) -> FastAPI:
    from starlette_exporter import PrometheusMiddleware, handle_metrics

    app = bare()
    app.add_middleware(PrometheusMiddleware)
    app.add_route("/metrics", handle_metrics)
    return app


def secure(_limit: str) -> FastAPI:
    from secure import Secure
    from secure.middleware import SecureASGIMiddleware

    app = bare()
    app.add_middleware(SecureASGIMiddleware, secure=Secure.with_default_headers())
    return app


def cors(_limit: str) -> FastAPI:
    from starlette.middleware.cors import CORSMiddleware

    app = bare()
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])
    return app


def trusted_host(_limit: str) -> FastAPI:
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = bare()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["api.example.com"])
    return app


def slowapi_with(middleware: str) -> Callable[[str], FastAPI]:
    def make(limit: str) -> FastAPI:
        import slowapi
        import slowapi.middleware
        from slowapi.util import get_remote_address

        app = bare()
        app.state.limiter = slowapi.Limiter(key_func=get_remote_address, default_limits=[limit])
        app.add_middleware(getattr(slowapi.middleware, middleware))
        return app

    return make


def guard(limit: str) -> FastAPI:
    from guard import SecurityConfig, SecurityMiddleware

    requests, unit = limit.split("/")
    app = bare()
    config = SecurityConfig(
        rate_limit=int(requests),
        rate_limit_window={"minute": 60, "day": 86_400}[unit],
        enable_ip_banning=False,
        enable_redis=False,
        enable_penetration_detection=False,  # with which one request takes more than 100 ms
        trusted_proxies=(PROXIES,),
        enable_cors=True,
        cors_allow_origins=[ORIGIN],
    )
    app.add_middleware(SecurityMiddleware, config=config)
    return app


def opentelemetry(_limit: str) -> FastAPI:
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Counter(SpanExporter):
        spans = 0

        def export(self, spans: Any) -> SpanExportResult:
            self.spans += len(spans)
            return SpanExportResult.SUCCESS

    exporter, provider, app = Counter(), TracerProvider(), bare()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    app.state.spans = lambda: provider.force_flush() and exporter.spans
    return app


def lite_bootstrap(_limit: str) -> FastAPI:
    from lite_bootstrap.bootstrappers.fastapi_bootstrapper import FastAPIBootstrapper, FastAPIConfig

    config = FastAPIConfig(
        service_name="service", cors_allowed_origins=[ORIGIN], fastapi_logging_middleware_enabled=True
    )
    return add_routes(FastAPIBootstrapper(config).bootstrap())


def microbootstrap(_limit: str) -> FastAPI:
    from microbootstrap import FastApiSettings
    from microbootstrap.bootstrappers.fastapi import FastApiBootstrapper

    settings = FastApiSettings(service_debug=False, service_name="service", cors_allowed_origins=[ORIGIN])
    return add_routes(FastApiBootstrapper(settings).bootstrap())


PEERS = {
    "uvicorn ProxyHeadersMiddleware": Candidate(proxy_headers, ("client address",), "proxy_headers"),
    "asgi-correlation-id": Candidate(correlation_id, ("request id",), "request_id"),
    "prometheus-fastapi-instrumentator": Candidate(instrumentator, ("metrics",), "metrics"),
    "starlette-exporter": Candidate(starlette_exporter, ("metrics",), "metrics"),
    "secure": Candidate(secure, ("security headers",), "security_headers"),
    "Starlette CORSMiddleware": Candidate(cors, ("CORS",), "cors"),
    "Starlette TrustedHostMiddleware": Candidate(trusted_host, ("allowed hosts",), "allowed_hosts"),
    "SlowAPIASGIMiddleware": Candidate(slowapi_with("SlowAPIASGIMiddleware"), ("rate limit",), "rate_limit"),
    "SlowAPIMiddleware": Candidate(slowapi_with("SlowAPIMiddleware"), ("rate limit",), "rate_limit"),
    "fastapi-guard": Candidate(guard, ("rate limit", "CORS", "security headers"), "rate_limit"),
    "opentelemetry-instrumentation-fastapi": Candidate(opentelemetry, ("spans",)),
    "lite-bootstrap": Candidate(lite_bootstrap, ("access log", "metrics", "CORS"), WHOLE),
    "microbootstrap": Candidate(microbootstrap, ("access log", "metrics", "CORS"), WHOLE),
}
