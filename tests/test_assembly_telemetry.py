"""FastAPI's own telemetry: it records what it records without us; where nothing takes that, it is off."""

from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.trace import NoOpTracer, TracerProvider

from fastapi_prodkit import Settings, create_app, install


class Recorder(TracerProvider, NoOpTracer):
    """Keep the names of spans of requests."""

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


def test_telemetry_with_a_provider_of_the_constructor(recorder):
    """What the constructor is given is used, once for each request."""
    serve(create_app(settings(), telemetry={"tracer_provider": recorder, "operation_spans": False}))

    assert recorder.spans == ["GET"]


@pytest.mark.parametrize("way", ["create_app", "install"])
def test_telemetry_with_a_global_provider_set_while_the_app_starts(recorder, monkeypatch, way):
    """A provider that a lifespan sets is in time."""

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
def test_telemetry_is_off_where_nothing_takes_what_it_records(recorder, monkeypatch, way):
    """Nothing is asked for at start-up, so requests do not pay for it: a provider that is set later gets nothing."""
    app = FastAPI() if way == "install" else create_app(settings())
    if way == "install":
        install(app, settings())

    with TestClient(app) as client:
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: recorder)
        client.get("/")

    assert recorder.spans == []


def test_telemetry_of_an_app_that_starts_again(recorder, monkeypatch):
    """A provider is looked for at each start, as in tests that start one app several times."""
    app = create_app(settings())

    serve(app)
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: recorder)
    serve(app)

    assert recorder.spans.count("GET") == 1
