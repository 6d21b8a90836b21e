"""opentelemetry-instrumentation-fastapi: for one app, or for all that are made later."""

import pytest

LOADED = ("opentelemetry.sdk.metrics", "opentelemetry.sdk.trace.export")

SPANS = [
    ["GET /items/{number}", "UNSET", []],
    ["GET /items/{number}", "UNSET", []],
    ["GET /gone", "UNSET", []],
    ["GET", "UNSET", []],
    ["GET /stream", "UNSET", []],
    ["GET /broken", "ERROR", ["exception"]],
    ["GET /broken-too", "ERROR", ["exception"]],
]
DURATIONS = [
    ["/items/{number}", 200, 1],
    ["/items/{number}", 422, 1],
    ["/gone", 404, 1],
    [None, 404, 1],
    ["/stream", 200, 1],
    ["/broken", 500, 1],
    ["/broken-too", 500, 1],
]


def attach(app, sink):
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    sink.spans, sink.metrics = InMemorySpanExporter(), InMemoryMetricReader()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(sink.spans))
    providers = {"tracer_provider": tracing, "meter_provider": MeterProvider([sink.metrics])}
    if app is None:
        FastAPIInstrumentor().instrument(**providers)
    else:
        FastAPIInstrumentor.instrument_app(app, **providers)


def effects(sink):
    spans = [
        [span.name, span.status.status_code.name, [event.name for event in span.events]]
        for span in sink.spans.get_finished_spans()
        if span.kind.name == "SERVER"
    ]
    (resource,) = sink.metrics.get_metrics_data().resource_metrics
    durations = [
        [point.attributes.get("http.target"), point.attributes["http.status_code"], point.count]
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if metric.name == "http.server.duration"
    ]
    return {"spans": spans, "durations": durations}


@pytest.mark.parametrize("moment", ["before", "new", "complete"])
def test_opentelemetry_has_one_span_and_duration_per_request(effects, way, moment):
    """Under its route, with the exception if there was one."""
    assert effects(way, moment) == {"spans": SPANS, "durations": DURATIONS}
