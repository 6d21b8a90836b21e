"""What `GET /metrics` takes with 10 000 series: ours, and the same series of a histogram of prometheus_client.

    python benchmarks/scrape.py [--rounds 15]

Both apps answer through their ASGI interface, in interleaved rounds, and the fastest third counts, in CPU time.
"""

import asyncio
import sys

from asgi import App, Request, answer, call, interleave
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Histogram, make_asgi_app
from tables import Table, parser_of, show

from fastapi_prodkit.metrics import BUCKETS, MetricsMiddleware, metrics_router
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.sections import MetricsSettings

SERIES = 10_000
ROUTES = SERIES // (len(BUCKETS) + 3)  # each bucket, +Inf, count and sum
SCRAPE = Request("GET", "/metrics")
OURS, THEIRS = "metrics", "prometheus_client Histogram"


async def read() -> dict[str, int]:
    return {}


async def ours() -> App:
    registry, app = CollectorRegistry(), FastAPI()
    app.add_middleware(MetricsMiddleware, registry=registry)
    app.include_router(metrics_router(MetricsSettings(public=True), registry=registry))
    for number in range(ROUTES):
        app.add_api_route(f"/items/{number}", read)
    index_routes(app)
    for number in range(ROUTES):
        await call(app, "GET", f"/items/{number}")
    return app


def theirs() -> App:
    registry, app = CollectorRegistry(), FastAPI()
    labels = ("http_request_method", "http_route", "http_response_status_code")
    histogram = Histogram(
        "http_server_request_duration_seconds", "Duration.", labels, buckets=BUCKETS, registry=registry
    )
    for number in range(ROUTES):
        histogram.labels("GET", f"/items/{number}", "200").observe(0.004)
    app.mount("/metrics", make_asgi_app(registry, disable_compression=True))  # ours leaves it to the proxy
    return app


async def measure(rounds: int) -> dict[str, dict[str, float]]:
    apps, path = {OURS: await ours(), THEIRS: theirs()}, {OURS: "/metrics", THEIRS: "/metrics/"}
    samples = {}
    for name, app in apps.items():
        seen = await answer(app, SCRAPE._replace(path=path[name]))
        samples[name] = sum(line.startswith(b"http_server_request_duration") for line in seen.body.splitlines())
    times: dict[str, float] = {}
    for name, app in apps.items():
        times |= await interleave({name: app}, SCRAPE._replace(path=path[name]), rounds, calls=1)
    return {name: {"CPU ms": times[name] * 1000, "series": samples[name]} for name in apps}


def table(rounds: int) -> Table:
    return Table(
        name="scrape",
        title="A scrape of 10 000 series",
        unit="in process; the `_created` series are those that only prometheus_client sends",
        rows=asyncio.run(measure(rounds)),
        instead_of={THEIRS: OURS},
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show([table(options.rounds)], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
