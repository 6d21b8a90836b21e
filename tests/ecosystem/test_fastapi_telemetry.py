"""FastAPI's own telemetry: FASTAPI_OTEL_AUTO_CONFIGURE and an OTLP endpoint in the environment."""

ENVIRONMENT = {"FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "{url}"}
LOADED = ("opentelemetry.exporter.otlp.proto.http.trace_exporter",)


def attach(_app, _sink): ...


def effects(sink):
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    traces = [ExportTraceServiceRequest.FromString(body) for body in sink.bodies("/v1/traces")]
    metrics = [ExportMetricsServiceRequest.FromString(body) for body in sink.bodies("/v1/metrics")]
    logs = [ExportLogsServiceRequest.FromString(body) for body in sink.bodies("/v1/logs")]
    spans = [each for sent in traces for of in sent.resource_spans for kept in of.scope_spans for each in kept.spans]
    points = [
        point
        for of in metrics[-1].resource_metrics
        for scope in of.scope_metrics
        for metric in scope.metrics
        if metric.name == "http.server.request.duration"
        for point in metric.histogram.data_points
    ]
    records = [
        each for sent in logs for of in sent.resource_logs for kept in of.scope_logs for each in kept.log_records
    ]
    return {
        "spans": [[span.name, span.status.code] for span in spans if span.kind == span.SPAN_KIND_SERVER],
        "requests": sum(point.count for point in points),
        "records": [record.event_name for record in records],
    }


def test_fastapi_telemetry_exports_spans_metrics_and_records(effects, way):
    """As bare FastAPI does, once."""
    unset, error = 0, 2
    assert effects(way, "new") == {
        "spans": [
            ["GET /items/{number}", unset],
            ["GET /items/{number}", unset],
            ["GET /gone", unset],
            ["GET", unset],
            ["GET /stream", unset],
            ["GET /broken", error],
            ["GET /broken-too", error],
        ],
        "requests": 7,
        "records": ["fastapi.validation.failed", *["http.server.request.exception"] * 2],
    }
