"""FastAPI's own telemetry: it works as without us, and is off if nothing receives it."""

from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.trace import NoOpTracer, TracerProvider

from fastapi_prodkit import Settings, create_app, install


class Recorder(TracerProvider, NoOpTracer):
    """Record the names of the spans of requests."""

    def __init__(self):
        self.spans = []

    def get_tracer(self, *arguments, **keywords):
        return self

    def start_span(self, name, *arguments, **keywords):
        self.spans.append(name)
        return super().start_span(name, *arguments, **keywords)


def serve(app):
    app.add_api_route("/items", lambda: 1)
    with TestClient(app) as client:
        assert client.get("/items").status_code == 200


@pytest.fixture
def recorder():
    return Recorder()


def settings():
    return Settings(environment="test", log=None)


def test_telemetry_uses_the_provider_of_the_constructor(recorder):
    """Once for each request."""
    serve(create_app(settings(), telemetry={"tracer_provider": recorder, "operation_spans": False}))

    assert recorder.spans == ["GET"]


@pytest.mark.parametrize("way", ["create_app", "install"])
def test_telemetry_uses_a_global_provider_set_in_the_lifespan(recorder, monkeypatch, way):
    """Telemetry uses a tracer provider that the app's lifespan sets as the global one."""

    @asynccontextmanager
    async def lifespan(_app):
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: recorder)
        yield

    app = FastAPI(lifespan=lifespan) if way == "install" else create_app(settings(), lifespan=lifespan)
    if way == "install":
        install(app, settings())

    serve(app)

    assert recorder.spans.count("GET") == 1


@pytest.mark.parametrize("way", ["create_app", "install"])
def test_telemetry_is_off_without_a_provider(recorder, monkeypatch, way):
    """A provider that is set after start-up receives nothing."""
    app = FastAPI() if way == "install" else create_app(settings())
    if way == "install":
        install(app, settings())

    with TestClient(app) as client:
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: recorder)
        client.get("/")

    assert recorder.spans == []


def test_telemetry_is_decided_at_each_start(recorder, monkeypatch):
    """Tests start one app several times."""
    app = create_app(settings())

    serve(app)
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: recorder)
    serve(app)

    assert recorder.spans.count("GET") == 1
