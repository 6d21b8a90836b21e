"""Errors are problems with the right status and headers, and without input or internals."""

import json
import uuid
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import orjson
import pytest
from fastapi import APIRouter, BackgroundTasks, Body, Cookie, Depends, FastAPI, Form, Header, Query, Request, WebSocket
from fastapi import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError, ResponseValidationError, WebSocketRequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ImportString, Json, SecretStr, field_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from wire import connection, read_response, request, serving

from fastapi_prodkit import _context
from fastapi_prodkit._problem import Refusal
from fastapi_prodkit.errors import ProblemError, add_problem_handlers
from fastapi_prodkit.exceptions import ProdkitError
from fastapi_prodkit.request_id import RequestIDMiddleware

PROBLEM = "application/problem+json"
MARKER = "s3cret-marker"


def fastapi(**options) -> FastAPI:
    app = FastAPI(**options)
    add_problem_handlers(app)
    return app


def client_of(app) -> TestClient:
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


def raising(error) -> TestClient:
    """Return a client of an app whose `GET /` raises."""
    app = fastapi()

    @app.get("/")
    async def endpoint():
        raise error

    return client_of(app)


def problem(response, status):
    """Check what all problems have in common, and return the body."""
    body = response.json()
    assert response.status_code == body["status"] == status
    assert response.headers.get_list("content-type") == [PROBLEM]
    assert response.headers["cache-control"] == "no-store"
    assert int(response.headers["content-length"]) == len(response.content)
    assert body["instance"] == response.url.path
    assert body["type"]
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 418, 422, 429, 500, 503])
def test_http_exception_is_a_problem(status):
    """An HTTPException becomes a problem with the status phrase as title and the exception's detail."""
    body = problem(raising(HTTPException(status, "Because.")).get("/?token=s3cret"), status)

    assert body == {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": "Because.",
        "instance": "/",
    }


def test_http_exception_without_detail_has_the_status_phrase():
    """An HTTPException without a detail becomes a problem with the status phrase as its detail."""
    assert problem(raising(HTTPException(404)).get("/"), 404)["detail"] == "Not Found"


def test_http_exception_keeps_its_headers():
    """Its Cache-Control wins; the media type is always ours."""
    headers = {
        "WWW-Authenticate": 'Bearer realm="shop"',
        "Cache-Control": "max-age=60",
        "Content-Type": "text/html",
        "X-Own": "1",
    }

    response = raising(HTTPException(401, headers=headers)).get("/")

    assert response.headers["www-authenticate"] == 'Bearer realm="shop"'
    assert response.headers.get_list("cache-control") == ["max-age=60"]
    assert response.headers.get_list("content-type") == [PROBLEM]
    assert response.headers["x-own"] == "1"


def test_detail_mapping_becomes_members():
    """type, title and detail keep their meaning."""
    detail = {"type": "/sold-out", "title": "Sold out", "detail": "A moment ago.", "article": 7}

    body = problem(raising(FastAPIHTTPException(409, detail)).get("/"), 409)

    assert body == {**detail, "status": 409, "instance": "/"}


def test_detail_mapping_may_not_replace_standard_members():
    """A detail mapping can add members to the problem, but standard members such as status stay unchanged."""
    detail = {"status": "failed", "instance": "mine", "headers": 1, "self": 2, 3: 4, "code": None}

    body = problem(raising(FastAPIHTTPException(409, detail)).get("/"), 409)

    assert {name: body[name] for name in ("headers", "self", "3", "code")} == {
        "headers": 1,
        "self": 2,
        "3": 4,
        "code": None,
    }


@pytest.mark.parametrize("detail", [[{"field": "a"}], ["a", "b"], 7])
def test_other_detail_is_the_member_errors(detail):
    """A detail that is neither text nor a mapping becomes the member errors of the problem."""
    assert problem(raising(FastAPIHTTPException(400, detail)).get("/"), 400)["errors"] == detail


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Decimal("1.10"), "1.10"),
        (float("nan"), None),
        (float("inf"), None),
        (2**70, 2**70),
        ("\ud800", "\ud800"),
        ({"größe": "\u2028"}, {"größe": "\u2028"}),
        (SecretStr(MARKER), "**********"),
    ],
)
def test_problem_with_any_value_is_valid_json(value, shown):
    """A problem is valid JSON even if the detail contains NaN, a surrogate, a UUID or a secret."""
    response = raising(FastAPIHTTPException(400, {"value": value})).get("/")

    assert problem(response, 400)["value"] == shown


def test_problem_error_sets_all_members_except_status_and_instance():
    """ProblemError sets type, title, detail, headers and extra members, but cannot change the instance."""
    error = ProblemError(
        409,
        "A moment ago.",
        type="https://api.example.com/problems/sold-out",
        title="Sold out",
        headers={"Retry-After": "3600"},
        article=7,
        instance="/elsewhere",
    )

    response = raising(error).get("/")

    assert response.headers["retry-after"] == "3600"
    assert problem(response, 409) == {
        "type": "https://api.example.com/problems/sold-out",
        "title": "Sold out",
        "status": 409,
        "detail": "A moment ago.",
        "instance": "/",
        "article": 7,
    }


@pytest.mark.parametrize("status", [204, 304, 307])
def test_http_exception_below_400_has_no_body(status):
    """It keeps its headers."""
    response = raising(HTTPException(status, headers={"Location": "/other"})).get("/")

    assert response.status_code == status
    assert response.headers["location"] == "/other"
    assert response.content == b""
    assert "content-type" not in response.headers


def test_problem_has_the_request_id():
    """Without one the member is absent."""
    with_id, without_id = fastapi(), fastapi()
    with_id.add_middleware(RequestIDMiddleware)

    response = TestClient(with_id).get("/nothing", headers={"X-Request-ID": "a-valid-id"})

    assert problem(response, 404)["request_id"] == response.headers["x-request-id"] == "a-valid-id"
    assert "request_id" not in TestClient(without_id).get("/nothing").json()


def test_context_without_an_id_has_no_member():
    """A problem has no request_id member if the log context contains no request id."""
    token = _context.begin({})
    response = TestClient(fastapi()).get("/nothing")
    _context.end(token)

    assert "request_id" not in response.json()


class Item(BaseModel):
    name: str


def service() -> FastAPI:
    router = APIRouter()

    @router.get("/items/{number}")
    async def read(number: int):
        return number

    @router.get("/sync/{number}")
    def sync(number: int):
        raise HTTPException(409)

    @router.post("/items")
    async def create(item: Item):
        return item

    async def broken():
        raise RuntimeError(MARKER)

    @router.get("/broken-dependency", dependencies=[Depends(broken)])
    async def broken_dependency():
        return {}

    @router.get("/broken-response", response_model=Item)
    async def broken_response():
        return {"name": [MARKER]}

    router.get("/broken")(broken)
    inner, outer = FastAPI(), APIRouter()
    inner.include_router(router)
    outer.include_router(router, prefix="/v1")
    app = fastapi(max_body_size=100)
    app.include_router(router)
    app.include_router(outer, prefix="/api")
    app.mount("/sub", inner)
    return app


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("HEAD", "/items/1", 405),
        ("OPTIONS", "/items/1", 405),
        ("DELETE", "/items/1", 405),
        ("GET", "/items/x", 422),
        ("POST", "/items", 422),
        ("GET", "/sync/1", 409),
        ("GET", "/api/v1/items/x", 422),
        ("GET", "/api/v1/sync/1", 409),
        ("GET", "/broken", 500),
        ("GET", "/broken-dependency", 500),
        ("GET", "/broken-response", 500),
    ],
)
def test_every_error_is_a_problem_without_internals(method, path, status):
    """Every error answer, from routing to the response, is a problem document without internal information."""
    response = client_of(service()).request(method, path)

    assert response.status_code == status
    assert response.headers["content-type"] == PROBLEM
    assert MARKER not in response.text


def test_mounted_app_with_handlers_sends_problems():
    """With the whole path."""
    inner = fastapi()
    outer = FastAPI()
    outer.mount("/sub", inner)

    assert problem(client_of(outer).get("/sub/nothing"), 404)["instance"] == "/sub/nothing"
    assert client_of(outer).get("/nothing").json() == {"detail": "Not Found"}


def test_405_names_the_allowed_methods():
    """RFC 9110, section 15.5.6."""
    response = client_of(service()).delete("/items/1")

    assert problem(response, 405)
    assert response.headers["allow"] == "GET"


def test_unhandled_exception_is_a_500_without_its_message():
    """An unhandled exception becomes a 500 problem with a fixed detail that omits the exception's message."""
    body = problem(client_of(service()).get("/broken"), 500)

    assert body == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "The server could not complete the request.",
        "instance": "/broken",
    }


def test_invalid_response_is_a_500_without_its_errors():
    """A response that fails validation becomes a 500 problem that does not show the validation errors."""
    with pytest.raises(ResponseValidationError, match=MARKER):
        TestClient(service()).get("/broken-response")

    assert client_of(service()).get("/broken-response").json()["detail"] == "The server could not complete the request."


def test_debug_shows_the_traceback_page():
    """Other errors stay problems."""
    app = fastapi(debug=True)

    @app.get("/")
    async def broken():
        raise RuntimeError(MARKER)

    page = client_of(app).get("/", headers={"Accept": "text/html"})

    assert page.status_code == 500
    assert MARKER in page.text
    assert problem(client_of(app).get("/nothing"), 404)


def test_failing_background_task_keeps_the_response():
    """An exception in a background task does not change the response of the request."""
    app = fastapi()

    async def fail():
        raise RuntimeError

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks):
        tasks.add_task(fail)
        return {}

    assert client_of(app).get("/").json() == {}


@pytest.mark.parametrize("error", [HTTPException(503), ValueError(), RecursionError()])
def test_exception_in_a_stream_is_reraised(error):
    """Starlette's own exception names the cause."""
    app = fastapi()

    @app.get("/")
    async def endpoint():
        def chunks():
            yield b"first"
            raise error

        return StreamingResponse(chunks())

    with pytest.raises(RuntimeError, match="response already started") as raised:
        TestClient(app).get("/")

    assert raised.value.__cause__ is error


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (HTTPException, "/missing"),
        (RequestValidationError, "/items/x"),
        (ValueError, "/nan?x=nan"),
        (RecursionError, "/recursion"),
        (RuntimeError, "/recursion"),
        (Exception, "/broken"),
        (500, "/broken"),
    ],
)
def test_handler_of_the_user_wins(kind, path, when):
    """Registered before or after ours."""
    app = FastAPI()

    async def own(request, error):
        return PlainTextResponse("mine", 400)

    @app.get("/items/{number}")
    async def item(number: int):
        return number

    @app.get("/nan")
    async def nan(x: float):
        return x

    @app.get("/recursion")
    async def recursion():
        raise RecursionError

    @app.get("/broken")
    async def broken():
        raise KeyError

    if when == "before":
        app.add_exception_handler(kind, own)
    add_problem_handlers(app)
    if when == "after":
        app.add_exception_handler(kind, own)

    response = client_of(app).get(path)

    assert (response.status_code, response.text) == (400, "mine")


def test_handler_of_the_user_for_a_related_exception_wins():
    """For a status, a subclass, or a base class."""
    app = fastapi()

    class SoldOutError(HTTPException):
        pass

    @app.get("/sold-out")
    async def sold_out():
        raise SoldOutError(409)

    @app.get("/problem")
    async def ours():
        raise ProblemError(409)

    @app.get("/recursion")
    async def recursion():
        raise RecursionError

    app.add_exception_handler(RuntimeError, lambda request, error: PlainTextResponse("base"))
    app.add_exception_handler(404, lambda request, error: PlainTextResponse("status"))
    app.add_exception_handler(SoldOutError, lambda request, error: PlainTextResponse("subclass"))
    app.add_exception_handler(ProdkitError, lambda request, error: PlainTextResponse("root"))

    assert [client_of(app).get(path).text for path in ("/nothing", "/sold-out", "/problem", "/recursion")] == [
        "status",
        "subclass",
        "root",
        "base",
    ]


def test_handler_of_the_constructor_wins():
    """An exception handler passed to the constructor of the app takes precedence over the problem handlers."""
    app = fastapi(exception_handlers={HTTPException: lambda request, error: PlainTextResponse("mine")})

    assert client_of(app).get("/nothing").text == "mine"


def test_websocket_handler_of_the_user_wins():
    """A WebSocket exception handler registered by the app takes precedence over the problem handlers."""
    app = FastAPI()

    async def own(websocket, error):
        await websocket.close(4000)

    app.add_exception_handler(WebSocketRequestValidationError, own)
    add_problem_handlers(app)

    @app.websocket("/ws/{number}")
    async def endpoint(websocket: WebSocket, number: int):
        await websocket.accept()

    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/ws/x"):
        pass

    assert closed.value.code == 4000


def test_plain_starlette_app_sends_problems():
    """A plain Starlette app with add_problem_handlers answers errors with problem documents."""

    async def broken(request):
        raise RuntimeError(MARKER)

    async def conflict(request):
        raise HTTPException(409, "Taken.")

    app = Starlette(routes=[Route("/broken", broken), Route("/conflict", conflict), Mount("/sub", routes=[])])
    add_problem_handlers(app)
    client = client_of(app)

    assert problem(client.get("/nothing"), 404)
    assert problem(client.get("/sub/nothing"), 404)
    assert problem(client.post("/conflict"), 405)["detail"] == "Method Not Allowed"
    assert problem(client.get("/conflict"), 409)["detail"] == "Taken."
    assert problem(client.get("/broken"), 500)
    assert set(client.post("/conflict").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_head_has_the_headers_of_the_problem():
    """A failed HEAD request has the status and the content type of the problem document."""

    async def missing(request):
        raise HTTPException(404)

    app = Starlette(routes=[Route("/", missing)])
    add_problem_handlers(app)

    response = client_of(app).head("/")

    assert (response.status_code, response.headers["content-type"]) == (404, PROBLEM)


def test_validation_error_names_place_and_reason():
    """For each error."""
    response = client_of(service()).get("/items/x")

    assert problem(response, 422) == {
        "type": "about:blank",
        "title": HTTPStatus(422).phrase,
        "status": 422,
        "detail": "The request is not valid.",
        "instance": "/items/x",
        "errors": [
            {
                "loc": ["path", "number"],
                "msg": "Input should be a valid integer, unable to parse string as an integer",
                "type": "int_parsing",
            }
        ],
    }


class Colour(Enum):
    RED = "red"


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Everything(BaseModel):
    """A field for each kind of invalid value."""

    model_config = ConfigDict(extra="forbid")

    integer: int = 0
    number: float = 0
    text: Annotated[str, Field(max_length=3)] = ""
    pattern: Annotated[str, Field(pattern="^a$")] = "a"
    colour: Colour = Colour.RED
    literal: Literal["a"] = "a"
    identity: uuid.UUID | None = None
    zone: ZoneInfo | None = None
    size: ByteSize = ByteSize(0)
    imported: ImportString[Any] | None = None
    decoded: Json[int] | None = None
    secret: Annotated[SecretStr, Field(max_length=3)] = SecretStr("")
    union: int | list[int] = 0
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat(kind="cat")
    mapping: dict[int, int] = {}
    items: list[Item] = []
    validated: str = ""

    @field_validator("validated")
    @classmethod
    def _refuse(cls, value: str) -> str:
        if value:
            raise ValueError("has to be empty")
        return value


@pytest.mark.parametrize(
    "field",
    [name for name in Everything.model_fields if name not in ("imported", "pet", "mapping", "items")],
)
@pytest.mark.parametrize("value", [MARKER, f"5{MARKER}", [MARKER], {"a": MARKER}, f"http://{MARKER}:99999999"])
def test_validation_error_does_not_repeat_input(field, value):
    """The 422 answer to an invalid body does not contain the rejected value, for any type of field."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    response = client_of(app).post("/", json={field: value})

    problem(response, 422)
    assert MARKER not in response.text


@pytest.mark.parametrize(
    "body",
    [
        {"pet": {"kind": MARKER}},
        {"pet": {"kind": [MARKER]}},
        {"pet": {"name": MARKER}},
        {"pet": MARKER},
        {"mapping": {"1": MARKER}},
        {"items": [{"name": "a"}, {"name": [MARKER]}, MARKER]},
        [MARKER],
        MARKER,
    ],
)
def test_validation_error_does_not_repeat_nested_input(body):
    """The tag of a union included."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    response = client_of(app).post("/", json=body)

    problem(response, 422)
    assert MARKER not in response.text


def test_validation_error_does_not_repeat_other_input():
    """In query, header, cookie, invalid JSON, or another field."""
    app = fastapi()

    @app.get("/")
    async def read(
        number: Annotated[int, Query()], x_number: Annotated[int, Header()], session: Annotated[int, Cookie()]
    ):
        return {}

    @app.post("/")
    async def write(password: Annotated[str, Body()], age: Annotated[int, Body()]):
        return {}

    client = client_of(app)
    responses = [
        client.get(f"/?number={MARKER}", headers={"X-Number": MARKER, "Cookie": f"session={MARKER}"}),
        client.post("/", content=f'{{"password": "{MARKER}"', headers={"Content-Type": "application/json"}),
        client.post("/", content=MARKER, headers={"Content-Type": "text/plain"}),
        client.post("/", json={"password": MARKER}),
        client.post("/", json={"password": MARKER, "age": "x"}),
    ]

    assert len(responses[0].json()["errors"]) == 3
    for response in responses:
        problem(response, 422)
        assert MARKER not in response.text


def test_message_of_a_validator_stays():
    """It is meant for the client."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    [error] = client_of(app).post("/", json={"validated": MARKER}).json()["errors"]

    assert error == {"loc": ["body", "validated"], "msg": "Value error, has to be empty", "type": "value_error"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"zone": "Nowhere"}, "Input should be a valid time zone"),
        ({"size": "5 parsecs"}, "Input should end with a unit of bytes"),
        ({"imported": "nowhere.at.all"}, "Input should be a valid python path"),
        ({"pet": {"kind": "fish"}}, "Input does not match any of the expected tags"),
    ],
)
def test_message_that_repeats_input_is_replaced(body, message):
    """A pydantic message that quotes the input is replaced by a message without the input."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    [error] = client_of(app).post("/", json=body).json()["errors"]

    assert error["msg"] == message


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 64),
        ("\n\r\t\x1b[31m", "\\n\\r\\t\\x1b[31m"),
        ("\u2028\u202e", "\\u2028\\u202e"),
        ("größe", "gr\\xf6\\xdfe"),
        ("\u2028" * 60, "\\u2028" * 10 + "\\u20"),
        ("", ""),
    ],
)
def test_keys_of_the_body_are_escaped_and_truncated(key, shown):
    """To 64 characters."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    [error] = client_of(app).post("/", json={key: 1}).json()["errors"]

    assert error["loc"] == ["body", shown]


@pytest.mark.parametrize(
    "body",
    [
        b'{"number": NaN}',
        b'{"number": 1e999}',
        b'{"number": "-inf"}',
        b'{"text": "\\ud800"}',
        b'{"integer": NaN}',
        b'{"integer": Infinity}',
        b'{"integer": 1e999}',
        b'{"items": NaN}',
        b'{"text": 1e999}',
        b'{"integer": "\\ud800"}',
        b'{"items": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"mapping": {"\\ud800": 1}}',
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b'{"integer": "\xff"',
        b'{"a":' * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b"[" * 900 + b"]" * 900,
        b'{"integer": ' + b"9" * 5000 + b"}",
        b'{"text": ' + b"9" * 400 + b"}",
        b'{"integer": "' + b"9" * 5000 + b'"}',
        b'{"identity": "\x00"}',
        b"",
        b"null",
        b"{",
        b'"',
        b"\x00",
        b"[]",
        b"7",
    ],
)
def test_unserializable_body_is_a_4xx(body):
    """NaN, infinity, lone surrogates, invalid UTF-8, deep nesting and huge integers."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return body

    response = client_of(app).post("/", content=body, headers={"Content-Type": "application/json"})

    assert response.status_code in (400, 422)
    problem(response, response.status_code)


def echoing() -> FastAPI:
    """Return an app that sends back its input."""
    app = fastapi()

    @app.post("/untyped")
    async def untyped(body: dict[str, Any]):
        return body

    @app.post("/typed")
    async def typed(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.post("/raw")
    def raw(body: Annotated[Any, Body()]):
        return JSONResponse(body)

    @app.get("/{x}")
    async def read(
        x: float, q: float = 0, x_number: Annotated[float, Header()] = 0, number: Annotated[float, Cookie()] = 0
    ):
        return [x, q, x_number, number]

    return app


NUMBER = {"msg": "Input should be a finite number", "type": "finite_number"}
SURROGATE = {"msg": "Input should not have lone surrogates", "type": "string_unicode"}
DEEP = {"msg": "Input should have at most 100 levels of nesting", "type": "nesting"}


@pytest.mark.parametrize(
    ("path", "body", "flaw"),
    [
        ("/untyped", b'{"a": NaN}', NUMBER),
        ("/untyped", b'{"a": [{"b": 1}, -Infinity]}', NUMBER),
        ("/raw", b"[1, 1e999]", NUMBER),
        ("/untyped", b'{"a": "\\ud800"}', SURROGATE),
        ("/untyped", b'{"\\udfff": 1}', SURROGATE),
        ("/raw", b'"\\ud800"', SURROGATE),
        ("/typed", b'{"a": "\\ud800"}', SURROGATE),
        ("/typed", b'{"a":' * 300 + b"1" + b"}" * 300, DEEP),
        ("/typed", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", DEEP),
    ],
)
def test_response_with_unserializable_input_is_a_422(path, body, flaw):
    """A request value that Python parses but the response cannot serialize is answered with a 422."""
    response = client_of(echoing()).post(path, content=body, headers={"Content-Type": "application/json"})

    assert problem(response, 422)["errors"] == [{"loc": ["body"], **flaw}]
    assert response.json()["detail"] == "The request is not valid."


@pytest.mark.parametrize("body", [b'{"a":' + b"[" * n + b"]" * n + b"}" for n in range(940, 1000, 2)], ids=len)
@pytest.mark.parametrize("path", ["/untyped", "/typed", "/raw"])
def test_deep_nesting_is_never_a_500(path, body):
    """Whether reading or writing fails first."""
    response = client_of(echoing()).post(path, content=body, headers={"Content-Type": "application/json"})

    assert response.status_code in (200, 400, 422)


@pytest.mark.parametrize(
    ("path", "headers", "loc"),
    [
        ("/nan", {}, ["path", "x"]),
        ("/1?q=-Infinity", {}, ["query", "q"]),
        ("/1?q=1e999", {}, ["query", "q"]),
        ("/1", {"X-Number": "inf"}, ["header", "x-number"]),
        ("/1", {"Cookie": "number=nan"}, ["cookie", "number"]),
    ],
)
def test_response_with_an_unserializable_parameter_is_a_422(path, headers, loc):
    """It names the path parameter, query, header or cookie, not the value."""
    response = client_of(echoing()).get(path, headers=headers)

    assert problem(response, 422)["errors"] == [{"loc": loc, **NUMBER}]


@pytest.mark.parametrize(
    ("content_type", "body", "flaw"),
    [
        ("application/x-www-form-urlencoded", b"number=NaN", NUMBER),
        (
            "multipart/form-data; boundary=x; charset=utf-7",
            b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n+2AA-\r\n--x--\r\n',
            SURROGATE,
        ),
    ],
)
def test_response_with_an_unserializable_form_is_a_422(content_type, body, flaw):
    """Infinite numbers, and encodings with lone surrogates."""
    pytest.importorskip("python_multipart", reason="forms need python-multipart, of the extra `standard`")
    app = fastapi()

    @app.post("/")
    async def endpoint(number: Annotated[float, Form()] = 0, text: Annotated[str, Form()] = ""):
        return [number, text]

    response = client_of(app).post("/", content=body, headers={"Content-Type": content_type})

    field = "number" if flaw is NUMBER else "text"
    assert problem(response, 422)["errors"] == [{"loc": ["body", field], **flaw}]


@pytest.mark.parametrize(
    ("query", "body", "error"),
    [
        ("", b"{}", ValueError("Out of range float values are not JSON compliant")),
        ("?q=nan", b'{"q": NaN}', ValueError("nan")),
        ("?q=nan", b'{"q": NaN}', UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")),
        ("?q=nan", b'{"q": "\\ud800"}', RecursionError("maximum recursion depth exceeded")),
        ("", b"NaN, or so", ValueError("Out of range float values are not JSON compliant")),
    ],
)
@pytest.mark.parametrize("reading", [True, False])
def test_unserializable_data_of_the_app_is_a_500(query, body, error, reading):
    """A serialization error that the request body does not explain remains the app's error, a 500."""
    app = fastapi()

    @app.post("/")
    async def endpoint(request: Request):
        if reading:
            await request.body()
        raise error

    with pytest.raises(type(error)) as raised:
        TestClient(app).post("/" + query, content=body)

    assert raised.value is error
    assert problem(client_of(app).post("/" + query, content=body), 500)["detail"] != "The request is not valid."


def test_unserializable_data_in_a_websocket_is_raised():
    """A serialization error in a WebSocket endpoint is raised, because no HTTP status can be sent anymore."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, q: float):
        await websocket.accept()
        await websocket.send_text(json.dumps(q, allow_nan=False))

    with pytest.raises(ValueError, match="Out of range"), TestClient(app).websocket_connect("/ws?q=nan"):
        pass


@pytest.mark.parametrize(
    "content_type",
    [b"text/plain", b"", b"application/xml", b"application", b"\xff", b"application/jsonx", b";;;=", b"x" * 5000],
)
def test_wrong_content_type_is_a_4xx(content_type):
    """A request body with a wrong or unreadable content type is answered with a 422 problem."""
    response = client_of(service()).post("/items", content=b'{"name": "a"}', headers={"Content-Type": content_type})

    problem(response, 422)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"\xff\x00"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nunfinished'),
        ("application/x-www-form-urlencoded", b"a=%ff&%ff=%ud800"),
        ("application/json", b"{}"),
    ],
)
def test_invalid_form_is_a_4xx(content_type, body):
    """A form that cannot be parsed is answered with a 400 or 422 problem."""
    pytest.importorskip("python_multipart", reason="forms need python-multipart, of the extra `standard`")
    app = fastapi()

    @app.post("/")
    async def endpoint(a: Annotated[int, Form()]):
        return {}

    response = client_of(app).post("/", content=body, headers={"Content-Type": content_type})

    assert response.status_code in (400, 422)
    problem(response, response.status_code)


@pytest.mark.parametrize("number", ["9" * 5000, "NaN", "1e999", "%FF", "%ED%A0%80", "%00", "1%00", "²"])
def test_invalid_path_parameter_is_a_422(number):
    """The path in the answer is valid JSON."""
    response = client_of(service()).get(f"/items/{number}")

    assert response.status_code == 422
    assert response.headers["content-type"] == PROBLEM


@pytest.mark.parametrize(
    ("query", "read"), [("%FF%FE", "\ufffd\ufffd"), ("%ED%A0%80", "\ufffd" * 3), ("a%C3", "a\ufffd")]
)
def test_query_that_is_not_utf_8_is_valid_json(query, read):
    """Starlette replaces invalid bytes."""
    app = fastapi()
    app.get("/")(lambda q: q)

    response = client_of(app).get(f"/?q={query}")

    assert (response.status_code, response.json()) == (200, read)


async def instance_of(app, **scope):
    """Call an app as a server does, and return the instance of the 404 problem."""
    sent = []

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": "GET", "query_string": b"", "headers": [], **scope}, None, send)

    assert sent[0]["status"] == 404
    return orjson.loads(sent[1]["body"])["instance"]


@pytest.mark.parametrize(
    ("path", "instance"),
    [
        ("/items/7", "/items/7"),
        ("/a b", "/a%20b"),
        ("/ü", "/%C3%BC"),
        ("/a%b", "/a%25b"),
        ("/a?b#c", "/a%3Fb%23c"),
        ('/[a]\\"<b>', "/%5Ba%5D%5C%22%3Cb%3E"),
        ("/~a:@!$&'()*+,;=-._", "/~a:@!$&'()*+,;=-._"),
        ("//evil.com/x", "/evil.com/x"),
        ("http://evil.com/x", "/http://evil.com/x"),
        ("*", "/*"),
        ("", "/"),
        ("/\udcff", "/%ED%B3%BF"),  # a server may decode invalid paths; the answer is not a 500
    ],
)
async def test_instance_is_the_percent_encoded_path(path, instance):
    """If the server passes on the decoded path only."""
    assert await instance_of(fastapi(), path=path) == instance
    assert await instance_of(fastapi(), path=path, raw_path=None) == instance


@pytest.mark.parametrize(
    ("raw_path", "instance"),
    [
        (b"/a%2Fb%20c%c3%bc", "/a%2Fb%20c%c3%bc"),
        (b"/a%zz%2", "/a%25zz%252"),
        (b"/\xff[a] b", "/%FF%5Ba%5D%20b"),
        (b"///evil.com/x", "/evil.com/x"),
        (b"http://evil.com/x", "/http://evil.com/x"),
        (b"/x?token=s3cret", "/x"),
        (b"/x#y", "/x%23y"),
    ],
)
async def test_instance_keeps_the_encoding_of_the_raw_path(raw_path, instance):
    """The instance member keeps the percent-encoding of raw_path and encodes all other unsafe characters."""
    path = unquote(raw_path.decode("latin-1"))

    assert await instance_of(fastapi(), path=path, raw_path=raw_path) == instance


async def test_instance_in_a_mounted_app_is_the_whole_path():
    """Below a root path of the server too."""
    outer = fastapi()
    outer.mount("/sub", fastapi())
    sub = {"path": "/api/sub/a b", "root_path": "/api"}

    assert await instance_of(outer, **sub) == "/api/sub/a%20b"
    assert await instance_of(outer, **sub, raw_path=b"/api/sub/a%20b") == "/api/sub/a%20b"


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(("target", "instance"), [("//evil.com/x", "/evil.com/x"), ("/a%20b%2Fc?q=1", "/a%20b%2Fc")])
def test_instance_on_a_real_server_refers_to_this_service(http, target, instance):
    """For any request line."""
    with serving(fastapi(), http=http) as port, connection(port) as client:
        client.sendall(request("GET", target))
        answer = read_response(client)

    assert json.loads(answer.partition(b"\r\n\r\n")[2])["instance"] == instance


def test_invalid_handshake_is_closed_with_1008():
    """The reason does not repeat the input."""
    app = fastapi()

    @app.websocket("/ws/{number}")
    async def endpoint(websocket: WebSocket, number: int):
        await websocket.accept()

    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect(f"/ws/{MARKER}"):
        pass

    assert closed.value.code == 1008
    assert closed.value.reason == "The request is not valid."


def test_http_exception_refuses_a_handshake_with_the_problem():
    """An HTTPException before accept refuses the handshake with a problem and the exception's headers."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("/ws"):
        pass

    assert refused.value.status_code == refused.value.json()["status"] == 401
    assert refused.value.headers["content-type"] == PROBLEM
    assert refused.value.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, 3000), (403, 3003), (404, 1008), (408, 3008), (429, 1013), (500, 1011), (503, 1013)],
)
def test_http_exception_closes_an_open_websocket(status, code):
    """With the nearest code."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        raise ProblemError(status, title="ä" * 100)

    with TestClient(app).websocket_connect("/ws") as websocket, pytest.raises(WebSocketDisconnect) as closed:
        websocket.receive_text()

    assert closed.value.code == code
    assert closed.value.reason == "ä" * 61  # the whole characters within 123 bytes


@pytest.mark.parametrize("closes", [True, False])
def test_http_exception_in_a_closed_websocket_sends_nothing(closes):
    """An HTTPException after either side has closed the WebSocket sends nothing and raises nothing."""
    app = fastapi()
    ended = []

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        if closes:
            await websocket.close()
        else:
            await websocket.receive()
        ended.append(True)
        raise HTTPException(503)

    with TestClient(app).websocket_connect("/ws"):
        pass

    assert ended == [True]


def test_websocket_exception_keeps_its_code():
    """A WebSocketException closes the WebSocket with the code and the reason of the exception."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        raise WebSocketException(4001, "mine")

    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/ws"):
        pass

    assert (closed.value.code, closed.value.reason) == (4001, "mine")


async def test_refusal_of_a_websocket_is_a_close_on_an_older_server():
    """With 1008."""
    received, sent = [], []

    async def receive():
        received.append(1)
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    await Refusal(ProblemError(403))({"type": "websocket", "path": "/", "headers": []}, receive, send)

    assert received == [1]
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "Forbidden"}]


async def test_refusal_of_a_websocket_is_the_problem():
    """Refusal sends the whole problem if the server supports the websocket.http.response extension."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [], "extensions": {"websocket.http.response": {}}}
    await Refusal(ProblemError(403))(scope, receive, send)

    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert sent[0]["status"] == json.loads(sent[1]["body"])["status"] == 403


def test_two_apps_have_separate_handlers():
    """add_problem_handlers changes only the given app, and other apps keep FastAPI's default errors."""
    with_handlers, without = fastapi(), FastAPI()

    assert problem(client_of(with_handlers).get("/nothing"), 404)
    assert client_of(without).get("/nothing").json() == {"detail": "Not Found"}


def test_handlers_may_be_added_twice():
    """A second call of add_problem_handlers leaves the exception handlers of the app unchanged."""
    app = fastapi()
    before = dict(app.exception_handlers)

    add_problem_handlers(app)

    assert app.exception_handlers == before


def test_error_response_of_a_handler_stays():
    """An error response that a handler returns is sent unchanged and not converted to a problem."""
    app = fastapi()
    app.get("/")(lambda: Response("mine", 400))

    response = client_of(app).get("/")

    assert (response.text, "content-type" in response.headers) == ("mine", False)


def test_number_of_errors_in_an_answer_is_bounded():
    """A 422 problem lists at most 100 validation errors, which bounds the size of the answer."""
    app = FastAPI()
    add_problem_handlers(app)

    @app.post("/")
    async def create(numbers: list[int]): ...

    response = TestClient(app).post("/", json=["x"] * 1000)

    assert response.status_code == 422
    assert len(response.json()["errors"]) == 100


@pytest.mark.parametrize("errors", ["text", [{"loc": ["q"], "msg": "m"}], [{"loc": [("x", 1)]}], ["text"]])
def test_validation_error_raised_by_the_app_is_a_422(errors):
    """FastAPI allows any errors in it."""
    app = FastAPI()
    add_problem_handlers(app)

    @app.get("/")
    async def read():
        raise RequestValidationError(errors)

    response = TestClient(app).get("/")

    assert response.status_code == 422
    assert all(set(each) == {"loc", "msg", "type"} for each in response.json()["errors"])
