"""Request ids: one for every request, in its response and its context."""

import asyncio
import json
import logging
import re
import uuid

import httpx2 as httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_prodkit import _context
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.logging import RequestIDFilter
from fastapi_prodkit.request_id import RequestIDMiddleware, current_request_id
from fastapi_prodkit.sections import RequestIdSettings

GENERATED = re.compile("[0-9a-f]{32}")


async def show_id(request):
    return PlainTextResponse(current_request_id())


async def show_headers(scope, receive, send):
    """Answer with the request's header lines, as the app reads them."""
    await JSONResponse(Headers(scope=scope).getlist("x-request-id"))(scope, receive, send)


def starlette(*routes, settings=None, **options):
    middleware = [Middleware(RequestIDMiddleware, settings, **options)]
    return Starlette(routes=[Route("/", show_id), *routes], middleware=middleware)


async def exchange(app, *headers):
    """Run one ASGI exchange in a new task; return the messages."""
    sent = []

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": list(headers)}
    await asyncio.create_task(app(scope, receive, send))
    return sent


def test_request_without_an_id_gets_one():
    """In its context and its response."""
    response = TestClient(starlette()).get("/")

    assert GENERATED.fullmatch(response.headers["x-request-id"])
    assert response.text == response.headers["x-request-id"]


@pytest.mark.parametrize("inbound", ["12345678", "a" * 128, "A-z_0.9-x", "f47ac10b-58cc-4372-a567-0e02b2c3d479"])
def test_valid_inbound_id_is_kept(inbound):
    """An inbound id of 8 to 128 letters, digits, dots, dashes and underscores is kept."""
    response = TestClient(starlette()).get("/", headers={"X-Request-ID": inbound})

    assert response.headers["x-request-id"] == inbound
    assert response.text == inbound


@pytest.mark.parametrize(
    "inbound",
    [
        b"",
        b"1234567",
        b"a" * 129,
        b"a" * 100_000,
        b"with space",
        b" 12345678",
        b"12345678 ",
        b"12345678\n",
        b"12345678\r\nSet-Cookie: a=b",
        b"12345678\x00",
        b"12345678\x1b[31m",
        b"<script>alert(1)</script>",
        b'12345678"',
        b"12345678,12345678",
        b"12345678/..",
        "größer-als-acht".encode(),
        "größer-als-acht".encode("latin-1"),
        "١٢٣٤٥٦٧٨".encode(),
        b"\xff" * 8,
    ],
)
async def test_invalid_inbound_id_is_replaced(inbound):
    """It is not reflected."""
    start, body = await exchange(starlette(), (b"x-request-id", inbound))

    [value] = [value for name, value in start["headers"] if name == b"x-request-id"]
    assert GENERATED.fullmatch(value.decode())
    assert body["body"] == value


async def test_last_of_several_inbound_ids_counts():
    """The nearest proxy has written it."""
    start, _ = await exchange(starlette(), (b"x-request-id", b"first-one"), (b"x-request-id", b"second-one"))

    assert start["headers"][-1] == (b"x-request-id", b"second-one")


def test_untrusted_inbound_id_is_replaced():
    """With `trust_inbound=False` even a valid inbound id is replaced by a generated id."""
    app = starlette(settings=RequestIdSettings(trust_inbound=False))

    response = TestClient(app).get("/", headers={"X-Request-ID": "a-valid-id"})

    assert GENERATED.fullmatch(response.headers["x-request-id"])


def test_header_name_is_a_setting():
    """The `header` setting names the header that is read from the request and written to the response."""
    client = TestClient(starlette(settings=RequestIdSettings(header="X-Correlation-ID")))

    response = client.get("/", headers={"x-correlation-id": "a-valid-id", "X-Request-ID": "another-id"})

    assert response.headers["x-correlation-id"] == "a-valid-id"
    assert "x-request-id" not in response.headers


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("sent", [[], ["a-valid-id"], ["<refused>"], ["first-one", "second-one"]])
async def test_request_header_has_the_id(sent, trusted):
    """In one line."""
    app = RequestIDMiddleware(show_headers, RequestIdSettings(trust_inbound=trusted))

    start, body = await exchange(app, *[(b"x-request-id", each.encode()) for each in sent], (b"x-other", b"stays"))

    assert [dict(start["headers"])[b"x-request-id"].decode()] == json.loads(body["body"])
    assert (body["body"] == b'["a-valid-id"]') == (trusted and sent == ["a-valid-id"])


def test_other_headers_of_the_request_stay():
    """The middleware replaces an invalid inbound id in the request headers and keeps all other headers."""

    async def show(request):
        return JSONResponse(request.headers.items())

    sent = TestClient(starlette(Route("/show", show))).get("/show", headers={"X-Request-ID": "<>", "X-Other": "1"})

    assert {"x-other": "1", "x-request-id": sent.headers["x-request-id"]}.items() <= dict(sent.json()).items()


def is_uuid(text):
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None


def test_generator_and_validator_are_used():
    """The generator makes new ids, and the validator decides which inbound ids are kept."""
    app = starlette(generator=lambda: "Root=1-2", validator=is_uuid)
    inbound = [None, "f47ac10b-58cc-4372-a567-0e02b2c3d479", "a-valid-id", "x"]

    responses = [TestClient(app).get("/", headers={"X-Request-ID": each} if each else None) for each in inbound]

    assert [response.text for response in responses] == ["Root=1-2", inbound[1], "Root=1-2", "Root=1-2"]
    assert [response.headers["x-request-id"] for response in responses] == [response.text for response in responses]


@pytest.mark.parametrize("inbound", [b"", b"a" * 129, b"with space", b"a\r\nSet-Cookie: b", b"\xff" * 8, b"a\x00b"])
async def test_validator_is_called_for_safe_ids_only(inbound):
    """1 to 128 visible ASCII characters."""
    asked = []
    app = starlette(validator=lambda text: not asked.append(text))

    start, _ = await exchange(app, (b"x-request-id", inbound))

    assert GENERATED.fullmatch(dict(start["headers"])[b"x-request-id"].decode())
    assert asked == []


def test_validator_may_accept_other_ids():
    """A custom validator can accept an inbound id that the default rule rejects."""
    response = TestClient(starlette(validator=lambda text: True)).get("/", headers={"X-Request-ID": "1"})

    assert response.text == "1"


async def not_now(*args):
    """Return a coroutine, which would be true for every id."""


@pytest.mark.parametrize("function", [not_now, "uuid4"])
@pytest.mark.parametrize("name", ["generator", "validator"])
def test_async_or_uncallable_function_is_refused(name, function):
    """RequestIDMiddleware rejects an async or uncallable generator or validator, as it cannot await a result."""
    with pytest.raises(ConfigurationError, match=rf"{name}=\.\.\.\): use a function that is not async"):
        RequestIDMiddleware(show_id, **{name: function})


def test_failing_validator_replaces_the_id(caplog):
    """The error is logged."""
    response = TestClient(starlette(validator=uuid.UUID)).get("/", headers={"X-Request-ID": "a-valid-id"})

    [record] = [record for record in caplog.records if record.name == "fastapi_prodkit.request_id"]
    assert GENERATED.fullmatch(response.text)
    assert (record.levelname, record.exc_info[0]) == ("ERROR", ValueError)


@pytest.mark.parametrize("made", ["", "a" * 129, "a b", "a\r\nSet-Cookie: b", "größer", "\ud800", None, 4711, b"bytes"])
def test_invalid_generated_id_is_replaced(made, caplog):
    """The error is logged."""
    response = TestClient(starlette(generator=lambda: made)).get("/")

    records = [record for record in caplog.records if record.name == "fastapi_prodkit.request_id"]
    assert GENERATED.fullmatch(response.text)
    assert response.headers["x-request-id"] == response.text
    assert [record.levelname for record in records] == ["ERROR"]


def test_failing_generator_is_replaced(caplog):
    """The error is logged with its traceback."""
    response = TestClient(starlette(generator=iter(()).__next__)).get("/")

    [record] = [record for record in caplog.records if record.name == "fastapi_prodkit.request_id"]
    assert GENERATED.fullmatch(response.text)
    assert record.exc_info[0] is StopIteration


@pytest.mark.parametrize("header", ["", "X Request", "X-Request\r\nSet-Cookie", "X-Request:", "Größe"])
def test_invalid_header_name_is_refused(header):
    """RequestIdSettings rejects a header name that is empty or has a space, colon, line break or umlaut."""
    with pytest.raises(ValidationError):
        RequestIdSettings(header=header)


def test_header_of_the_app_is_replaced():
    """Its other headers stay."""

    async def endpoint(request):
        return PlainTextResponse("ok", headers={"X-Request-ID": "its-own-id", "X-Other": "stays"})

    response = TestClient(starlette(Route("/own", endpoint))).get("/own", headers={"X-Request-ID": "a-valid-id"})

    assert response.headers.get_list("x-request-id") == ["a-valid-id"]
    assert response.headers["x-other"] == "stays"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/empty", 204),
        ("GET", "/unchanged", 304),
        ("GET", "/elsewhere", 307),
        ("GET", "/folder", 307),
        ("GET", "/missing", 404),
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/stream", 200),
        ("GET", "/sub/", 200),
        ("GET", "/sub/nothing", 404),
        ("GET", "/unavailable", 503),
    ],
)
def test_every_response_has_one_id(method, path, status):
    """Every response, including redirects, errors and streams, has exactly one X-Request-ID header."""

    def raising(status):
        async def endpoint(request):
            raise HTTPException(status)

        return endpoint

    async def empty(request):
        return Response(status_code=204)

    async def unchanged(request):
        return Response(status_code=304)

    async def elsewhere(request):
        return RedirectResponse("/")

    async def stream(request):
        return StreamingResponse(iter([b"a", b"b"]))

    app = starlette(
        Route("/empty", empty),
        Route("/unchanged", unchanged),
        Route("/elsewhere", elsewhere),
        Route("/folder/", show_id),
        Route("/missing", raising(404)),
        Route("/unavailable", raising(503)),
        Route("/stream", stream),
        Mount("/sub", routes=[Route("/", show_id)]),
    )

    response = TestClient(app, follow_redirects=False).request(method, path)

    assert response.status_code == status
    assert len(response.headers.get_list("x-request-id")) == 1


def test_validation_error_has_the_id():
    """FastAPI's 422 response to invalid input carries a generated request id."""
    app = FastAPI()
    app.add_middleware(RequestIDMiddleware)

    @app.get("/items/{number}")
    async def item(number: int):
        return number

    response = TestClient(app).get("/items/x")

    assert response.status_code == 422
    assert GENERATED.fullmatch(response.headers["x-request-id"])


async def test_ids_do_not_repeat():
    """In ten thousand requests."""
    app = RequestIDMiddleware(show_id_raw)

    seen = {(await exchange(app))[0]["headers"][0][1] for _ in range(10_000)}

    assert len(seen) == 10_000


async def show_id_raw(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": current_request_id().encode()})


async def test_response_without_headers_gets_the_id():
    """ASGI makes them optional."""
    start, body = await exchange(RequestIDMiddleware(show_id_raw))

    assert start["headers"] == [(b"x-request-id", body["body"])]


async def test_concurrent_requests_have_separate_ids():
    """Each of 200 concurrent requests reads its own id in its dependency and in its endpoint."""
    app = FastAPI()
    app.add_middleware(RequestIDMiddleware)

    async def dependency():
        before = current_request_id()
        await asyncio.sleep(0)
        return before

    @app.get("/")
    async def endpoint(before: str = Depends(dependency)):
        await asyncio.sleep(0)
        return [before, current_request_id()]

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        responses = await asyncio.gather(
            *[client.get("/", headers={"X-Request-ID": f"request-{number}"}) for number in range(200)]
        )

    assert [response.json() for response in responses] == [[f"request-{number}"] * 2 for number in range(200)]


def test_id_is_available_in_threads_and_background_tasks():
    """Sync dependencies, sync endpoints and background tasks read the request id in their worker threads."""
    app, seen = FastAPI(), []
    app.add_middleware(RequestIDMiddleware)

    def note():
        seen.append(current_request_id())

    @app.get("/", dependencies=[Depends(note)])
    def endpoint(tasks: BackgroundTasks):
        note()
        tasks.add_task(note)

    TestClient(app).get("/", headers={"X-Request-ID": "a-valid-id"})

    assert seen == ["a-valid-id"] * 3


def test_id_is_available_during_a_stream():
    """The generator of a streamed response reads the request id for every chunk."""

    async def endpoint(request):
        async def chunks():
            for _ in range(3):
                yield f"{current_request_id()} "

        return StreamingResponse(chunks())

    response = TestClient(starlette(Route("/stream", endpoint))).get("/stream", headers={"X-Request-ID": "a-valid-id"})

    assert response.text == "a-valid-id " * 3


async def test_context_is_closed_after_a_response():
    """`current_request_id` returns None after the middleware has finished a request."""
    await RequestIDMiddleware(show_id_raw)({"type": "http", "path": "/", "headers": []}, None, drop)

    assert current_request_id() is None


def test_id_is_available_below_a_task_group():
    """A BaseHTTPMiddleware above RequestIDMiddleware, which runs the app in another task, does not lose the id."""

    async def pass_on(request, call_next):
        return await call_next(request)

    middleware = [
        Middleware(AccessLogMiddleware),
        Middleware(BaseHTTPMiddleware, dispatch=pass_on),
        Middleware(RequestIDMiddleware),
    ]
    app = Starlette(routes=[Route("/", show_id)], middleware=middleware)

    response = TestClient(app).get("/", headers={"X-Request-ID": "a-valid-id"})

    assert response.text == response.headers["x-request-id"] == "a-valid-id"


async def test_record_of_the_server_has_the_id(caplog):
    """The context is closed by then; other records have none."""
    scope = {"type": "http", "path": "/", "headers": [(b"x-request-id", b"a-valid-id")]}

    async def app(scope, receive, send):
        raise RuntimeError

    server = logging.getLogger("server")
    try:
        await RequestIDMiddleware(app)(scope, None, drop)
    except RuntimeError:
        server.exception("failed")
    server.error("another")

    assert all(RequestIDFilter().filter(record) for record in caplog.records)
    assert [record.request_id for record in caplog.records] == ["a-valid-id", "-"]


async def drop(message):
    pass


def test_id_outside_of_a_request_is_none():
    """`current_request_id` returns None outside of a request and in a context without an id."""
    assert current_request_id() is None

    token = _context.begin({})
    within = current_request_id()
    _context.end(token)

    assert within is None


async def test_websocket_has_an_id():
    """In the accepting answer."""
    seen = []

    async def endpoint(websocket):
        await websocket.accept(headers=[(b"x-other", b"stays")])
        seen.append(current_request_id())
        await websocket.close()

    client = TestClient(starlette(WebSocketRoute("/ws", endpoint)))

    with client.websocket_connect("/ws", headers={"X-Request-ID": "a-valid-id"}) as session:
        headers = session.extra_headers

    assert seen == ["a-valid-id"]
    assert headers == [(b"x-other", b"stays"), (b"x-request-id", b"a-valid-id")]


def test_refused_websocket_has_an_id():
    """A WebSocket handshake that is refused with a response carries a request id."""
    app = FastAPI()
    app.add_middleware(RequestIDMiddleware)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        raise HTTPException(403)

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("/ws"):
        pass

    assert GENERATED.fullmatch(refused.value.headers["x-request-id"])


async def test_lifespan_messages_pass_unchanged():
    """RequestIDMiddleware passes a lifespan call on unchanged and creates no id for it."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send, current_request_id()))

    scope = {"type": "lifespan"}
    await RequestIDMiddleware(app)(scope, 1, 2)

    assert seen == [(scope, 1, 2, None)]


@pytest.mark.parametrize(("bound", "kept"), [("<bound>", True), ("a b", False), ("a\r\nb", False), ("", False)])
def test_id_of_an_outer_app_is_kept(bound, kept):
    """Unless it is unsafe in a header."""

    class Binding:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            _context.bind(request_id=bound)
            await self.app(scope, receive, send)

    inner = Starlette(routes=[Route("/", show_id)], middleware=[Middleware(RequestIDMiddleware)])
    app = Starlette(
        routes=[Mount("/inner", app=inner)], middleware=[Middleware(AccessLogMiddleware), Middleware(Binding)]
    )

    response = TestClient(app).get("/inner/")

    assert (response.headers["x-request-id"] == bound) == kept
    assert response.headers["x-request-id"] == response.text


def test_two_apps_have_separate_settings():
    """A mounted app uses the id of the outer one."""
    inner = starlette(settings=RequestIdSettings(header="X-Inner-ID"))
    outer = starlette(Mount("/inner", app=inner), settings=RequestIdSettings(header="X-Outer-ID"))

    alone = TestClient(inner).get("/")
    mounted = TestClient(outer).get("/inner/", headers={"X-Outer-ID": "outer-id", "X-Inner-ID": "inner-id"})

    assert "x-outer-id" not in alone.headers
    assert mounted.text == "outer-id"
    assert mounted.headers["x-inner-id"] == "outer-id"
    assert mounted.headers["x-outer-id"] == "outer-id"
