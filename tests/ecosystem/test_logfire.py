"""logfire: `logfire.instrument_fastapi(app)`."""

import pytest

LOADED = ("logfire",)


def attach(app, sink):
    import logfire
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    sink.spans = InMemorySpanExporter()
    processors = [SimpleSpanProcessor(sink.spans)]
    logfire.configure(send_to_logfire=False, console=False, additional_span_processors=processors)
    logfire.instrument_fastapi(app)


def effects(sink):
    return [
        [span.name, span.status.status_code.name, [event.name for event in span.events]]
        for span in sink.spans.get_finished_spans()
        if span.attributes["logfire.span_type"] == "span" and span.kind.name == "SERVER"
    ]


@pytest.mark.parametrize("moment", ["new", "complete"])
def test_logfire_has_one_span_per_request(effects, way, moment):
    """Under its route, with the exception if there was one."""
    assert effects(way, moment) == [
        ["GET /items/{number}", "UNSET", []],
        ["GET /items/{number}", "UNSET", []],
        ["GET /gone", "UNSET", ["exception"]],
        ["GET", "UNSET", []],
        ["GET /stream", "UNSET", []],
        ["GET /broken", "ERROR", ["exception"]],
        ["GET /broken-too", "ERROR", ["exception"]],
    ]
