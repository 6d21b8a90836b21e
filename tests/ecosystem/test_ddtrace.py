"""ddtrace: `import ddtrace.auto`, as `ddtrace-run` does."""

import importlib

ENVIRONMENT = {
    "DD_TRACE_AGENT_URL": "{url}",
    "DD_TRACE_API_VERSION": "v0.4",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
}


def attach(_app, _sink):
    importlib.import_module("ddtrace.auto")


def effects(sink):
    import msgpack
    from ddtrace.trace import tracer

    tracer.flush()
    spans = [span for body in sink.bodies("/v0.4/traces") for trace in msgpack.unpackb(body) for span in trace]
    return [
        [span["resource"], span["meta"]["http.status_code"], span["meta"].get("error.type")]
        for span in spans
        if span["name"] == "fastapi.request"
    ]


def test_ddtrace_has_one_span_per_request(effects, way):
    """Under its route, with the exception if there was one."""
    assert effects(way, "before") == [
        ["GET /items/{number}", "200", None],
        ["GET /items/{number}", "422", None],
        ["GET /gone", "404", None],
        ["GET /nowhere", "404", None],
        ["GET /stream", "200", None],
        ["GET /broken", "500", "builtins.RuntimeError"],
        ["GET /broken-too", "500", "builtins.ValueError"],
    ]
