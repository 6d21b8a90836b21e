"""The caller on the span of a request: of FastAPI's own telemetry, if it traces."""

import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, NoOpTracer, SpanKind, TracerProvider

from fastapi_prodkit import Settings, create_app, testing
from fastapi_prodkit.auth import Auth, CurrentUser, OptionalUser, User, public

# The fixture, here in this process.
headers_as = testing.headers_as


class Span(NonRecordingSpan):
    """A span with a kind and attributes."""

    def __init__(self, kind, attributes):
        super().__init__(INVALID_SPAN_CONTEXT)
        self.kind = kind
        self.attributes = dict(attributes or {})

    def set_attribute(self, key, value):
        self.attributes[key] = value


class Recorder(TracerProvider, NoOpTracer):
    """Record the spans of requests and of their operations."""

    def __init__(self):
        self.spans = []

    def get_tracer(self, *arguments, **keywords):
        return self

    def start_span(self, name, context=None, kind=SpanKind.INTERNAL, attributes=None, **keywords):
        self.spans.append(Span(kind, attributes))
        return self.spans[-1]

    def users(self):
        """Return the `user.id` of each span, by its kind."""
        return [(span.kind, span.attributes.get("user.id")) for span in self.spans]


def service(**keywords):
    app = create_app(
        Settings(environment="test", log=None), auth=Auth(find_key=lambda hashed: None), telemetry=keywords
    )

    @app.get("/closed")
    async def closed(user: CurrentUser) -> str:
        return user.id

    @app.get("/open")
    @public
    async def opened(user: OptionalUser) -> str | None:
        return user and user.id

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, user: CurrentUser):
        await websocket.accept()
        await websocket.close()

    return app


@pytest.mark.parametrize("path", ["/closed", "/open"])
def test_server_span_has_the_id_of_the_caller(headers_as, path):
    """And no span of a dependency or of the endpoint has it."""
    recorder = Recorder()
    with TestClient(service(tracer_provider=recorder)) as client:
        assert client.get(path, headers=headers_as("alice")).json() == "alice"

    assert (SpanKind.SERVER, "alice") in recorder.users()
    assert {user for kind, user in recorder.users() if kind is not SpanKind.SERVER} <= {None}


def test_span_of_a_websocket_has_the_id_of_the_caller(headers_as):
    """From the handshake on."""
    recorder = Recorder()
    with (
        TestClient(service(tracer_provider=recorder)) as client,
        client.websocket_connect("/ws", headers=headers_as("alice")),
    ):
        pass

    assert (SpanKind.SERVER, "alice") in recorder.users()


def test_span_without_a_caller_has_no_id():
    """Neither of a public route, nor of a request that is refused."""
    recorder = Recorder()
    with TestClient(service(tracer_provider=recorder)) as client:
        assert [client.get(path).status_code for path in ("/closed", "/open")] == [401, 200]

    assert {user for _, user in recorder.users()} == {None}


@pytest.mark.parametrize("telemetry", [{"tracing": False}, {"exclude": lambda scope: True}])
def test_request_without_a_span_is_served(headers_as, telemetry):
    """With tracing switched off, and for an excluded request."""
    recorder = Recorder()
    with TestClient(service(tracer_provider=recorder, **telemetry)) as client:
        assert client.get("/closed", headers=headers_as("alice")).json() == "alice"

    assert recorder.spans == []


def test_span_of_an_app_without_a_guard_has_the_id_of_the_caller(headers_as):
    """When a dependency authenticates; the server span has it, although the dependency has a span of its own."""
    recorder, auth = Recorder(), Auth(find_key=lambda hashed: None)
    app = FastAPI(telemetry={"tracer_provider": recorder})

    @app.get("/")
    async def read(user: User = Depends(auth.current_user)) -> str:
        return user.id

    assert TestClient(app).get("/", headers=headers_as("alice")).json() == "alice"
    assert (SpanKind.SERVER, "alice") in recorder.users()
    assert {user for kind, user in recorder.users() if kind is not SpanKind.SERVER} <= {None}
