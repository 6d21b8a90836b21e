"""Errors: every one a problem, right in status and headers, and silent about what was sent and about what broke."""

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
def test_http_exception(status):
    """An HTTPException is a problem of its status, whose title is the phrase and whose detail is its own."""
    body = problem(raising(HTTPException(status, "Because.")).get("/?token=s3cret"), status)

    assert body == {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": "Because.",
        "instance": "/",
    }


def test_without_detail():
    """Without a detail the phrase has to do."""
    assert problem(raising(HTTPException(404)).get("/"), 404)["detail"] == "Not Found"


def test_headers_stay():
    """The headers of an exception are sent, and its Cache-Control wins over ours; the media type is always ours."""
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


def test_detail_that_is_a_mapping():
    """The members of a mapping become members of the problem; type, title and detail keep their meaning."""
    detail = {"type": "/sold-out", "title": "Sold out", "detail": "A moment ago.", "article": 7}

    body = problem(raising(FastAPIHTTPException(409, detail)).get("/"), 409)

    assert body == {**detail, "status": 409, "instance": "/"}


def test_detail_with_names_of_our_own():
    """A mapping may have any names: standard members win, the others are there."""
    detail = {"status": "failed", "instance": "mine", "headers": 1, "self": 2, 3: 4, "code": None}

    body = problem(raising(FastAPIHTTPException(409, detail)).get("/"), 409)

    assert {name: body[name] for name in ("headers", "self", "3", "code")} == {
        "headers": 1,
        "self": 2,
        "3": 4,
        "code": None,
    }


@pytest.mark.parametrize("detail", [[{"field": "a"}], ["a", "b"], 7])
def test_detail_that_is_something_else(detail):
    """A detail that is neither text nor a mapping is the member `errors`."""
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
def test_values_that_json_does_not_know(value, shown):
    """Whatever an exception carries, its problem is valid JSON."""
    response = raising(FastAPIHTTPException(400, {"value": value})).get("/")

    assert problem(response, 400)["value"] == shown


def test_problem_error():
    """A ProblemError decides about every member but status and instance, and may add its own."""
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
def test_no_error(status):
    """An HTTPException that is no error has no body and keeps its headers."""
    response = raising(HTTPException(status, headers={"Location": "/other"})).get("/")

    assert response.status_code == status
    assert response.headers["location"] == "/other"
    assert response.content == b""
    assert "content-type" not in response.headers


def test_request_id():
    """The problem names the request, inside a context that has an id; elsewhere the member is absent."""
    with_id, without_id = fastapi(), fastapi()
    with_id.add_middleware(RequestIDMiddleware)

    response = TestClient(with_id).get("/nothing", headers={"X-Request-ID": "a-valid-id"})

    assert problem(response, 404)["request_id"] == response.headers["x-request-id"] == "a-valid-id"
    assert "request_id" not in TestClient(without_id).get("/nothing").json()


def test_a_context_without_id():
    """A context that somebody else opened has no id to tell."""
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
def test_every_outcome(method, path, status):
    """Whoever finds the error, it is a problem, and says nothing of what is inside."""
    response = client_of(service()).request(method, path)

    assert response.status_code == status
    assert response.headers["content-type"] == PROBLEM
    assert MARKER not in response.text


def test_mounted_app():
    """A mounted app has its own handlers; with ours its errors are problems, too, under the whole path."""
    inner = fastapi()
    outer = FastAPI()
    outer.mount("/sub", inner)

    assert problem(client_of(outer).get("/sub/nothing"), 404)["instance"] == "/sub/nothing"
    assert client_of(outer).get("/nothing").json() == {"detail": "Not Found"}


def test_method_not_allowed():
    """A 405 names the methods that there are (RFC 9110, section 15.5.6)."""
    response = client_of(service()).delete("/items/1")

    assert problem(response, 405)
    assert response.headers["allow"] == "GET"


def test_unhandled_exception():
    """A 500 says that something went wrong, and nothing about what."""
    body = problem(client_of(service()).get("/broken"), 500)

    assert body == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "The server could not complete the request.",
        "instance": "/broken",
    }


def test_response_that_does_not_fit_its_model():
    """An invalid response is the server's fault, and its validation error is nobody else's business."""
    with pytest.raises(ResponseValidationError, match=MARKER):
        TestClient(service()).get("/broken-response")

    assert client_of(service()).get("/broken-response").json()["detail"] == "The server could not complete the request."


def test_debug():
    """In debug mode an unhandled exception is the framework's traceback page; other errors stay problems."""
    app = fastapi(debug=True)

    @app.get("/")
    async def broken():
        raise RuntimeError(MARKER)

    page = client_of(app).get("/", headers={"Accept": "text/html"})

    assert page.status_code == 500
    assert MARKER in page.text
    assert problem(client_of(app).get("/nothing"), 404)


def test_failing_background_task():
    """What fails after the response does not change it."""
    app = fastapi()

    async def fail():
        raise RuntimeError

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks):
        tasks.add_task(fail)
        return {}

    assert client_of(app).get("/").json() == {}


@pytest.mark.parametrize("error", [HTTPException(503), ValueError(), RecursionError()])
def test_failure_in_the_middle_of_a_stream(error):
    """A response that has begun cannot become a problem; Starlette's own exception goes on, and names the cause."""
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
def test_handlers_of_the_user_win(kind, path, when):
    """A handler that the user registers stays in charge, whether it came before ours or after."""
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


def test_more_specific_handlers_of_the_user():
    """So does a handler for a status, a subclass, the root of our exceptions, or the base of one that ours is for."""
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


def test_handlers_in_the_constructor():
    """So does one that was given to the constructor."""
    app = fastapi(exception_handlers={HTTPException: lambda request, error: PlainTextResponse("mine")})

    assert client_of(app).get("/nothing").text == "mine"


def test_websocket_handler_of_the_user_wins():
    """And one for WebSockets."""
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


def test_plain_starlette():
    """An app without FastAPI gets the same problems."""

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


def test_head():
    """The answer to HEAD has the headers of the problem."""

    async def missing(request):
        raise HTTPException(404)

    app = Starlette(routes=[Route("/", missing)])
    add_problem_handlers(app)

    response = client_of(app).head("/")

    assert (response.status_code, response.headers["content-type"]) == (404, PROBLEM)


def test_validation_error():
    """A 422 says where and what, for each error."""
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
    """A field for each way in which a value can be wrong."""

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
def test_input_is_never_repeated(field, value):
    """Whatever is wrong with a value, the answer does not repeat it."""
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
def test_nested_input_is_never_repeated(body):
    """Nor does it repeat what is deeper inside, the tag of a union included."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return {}

    response = client_of(app).post("/", json=body)

    problem(response, 422)
    assert MARKER not in response.text


def test_input_elsewhere_is_never_repeated():
    """Nor what was sent in the query, a header, a cookie, a body that is no JSON, or beside the field that is wrong."""
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


def test_text_of_a_validator():
    """What a validator of the user's own says is meant for the client, and stays."""
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
def test_fixed_messages(body, message):
    """Where pydantic's own message repeats the input, ours says the same without it."""
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
def test_keys_that_the_client_chose(key, shown):
    """A key of the body is part of where the error is: it is escaped, and cut to 64 characters."""
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
def test_bodies_that_json_cannot_express(body):
    """NaN, infinity, lone surrogates, invalid UTF-8, deep nesting and huge integers are the client's error."""
    app = fastapi()

    @app.post("/")
    async def endpoint(body: Everything):
        return body

    response = client_of(app).post("/", content=body, headers={"Content-Type": "application/json"})

    assert response.status_code in (400, 422)
    problem(response, response.status_code)


def echoing() -> FastAPI:
    """Return an app that sends back what it gets."""
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
def test_a_body_that_cannot_be_sent_back(path, body, flaw):
    """What JSON cannot express, and Python reads, is the client's error where the response fails on it."""
    response = client_of(echoing()).post(path, content=body, headers={"Content-Type": "application/json"})

    assert problem(response, 422)["errors"] == [{"loc": ["body"], **flaw}]
    assert response.json()["detail"] == "The request is not valid."


@pytest.mark.parametrize("body", [b'{"a":' + b"[" * n + b"]" * n + b"}" for n in range(940, 1000, 2)], ids=len)
@pytest.mark.parametrize("path", ["/untyped", "/typed", "/raw"])
def test_nesting_at_the_edge_of_recursion(path, body):
    """Whether reading it, writing it or neither is what fails first, the server does not."""
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
def test_a_number_elsewhere_that_cannot_be_sent_back(path, headers, loc):
    """The answer names the path parameter, the query, the header or the cookie, and not the value."""
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
def test_a_form_that_cannot_be_sent_back(content_type, body, flaw):
    """A form has numbers that are not finite, too, and may name an encoding that has lone surrogates."""
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
def test_a_failure_that_is_not_the_clients(query, body, error, reading):
    """It stays what it is if it is another one, or nothing that has been read of the request explains it."""
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


def test_a_failure_in_a_websocket():
    """A WebSocket has no status left to say so with: its exceptions go on."""
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
def test_wrong_content_type(content_type):
    """A body of another content type, or of none that can be read, is the client's error."""
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
def test_broken_forms(content_type, body):
    """A form that cannot be read is the client's error."""
    pytest.importorskip("python_multipart", reason="forms need python-multipart, of the extra `standard`")
    app = fastapi()

    @app.post("/")
    async def endpoint(a: Annotated[int, Form()]):
        return {}

    response = client_of(app).post("/", content=body, headers={"Content-Type": content_type})

    assert response.status_code in (400, 422)
    problem(response, response.status_code)


@pytest.mark.parametrize("number", ["9" * 5000, "NaN", "1e999", "%FF", "%ED%A0%80", "%00", "1%00", "²"])
def test_broken_paths(number):
    """A path parameter that is no number is the client's error, and the path in the answer is valid JSON."""
    response = client_of(service()).get(f"/items/{number}")

    assert response.status_code == 422
    assert response.headers["content-type"] == PROBLEM


@pytest.mark.parametrize(
    ("query", "read"), [("%FF%FE", "\ufffd\ufffd"), ("%ED%A0%80", "\ufffd" * 3), ("a%C3", "a\ufffd")]
)
def test_a_query_that_is_no_text(query, read):
    """Starlette reads bytes that are no UTF-8 as replacement characters, which JSON can express."""
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
        ("/\udcff", "/%ED%B3%BF"),  # a server that decodes paths leniently does not make an error of an error
    ],
)
async def test_instance_of_a_decoded_path(path, instance):
    """Where the server passes on the decoded path alone, the instance is that path, percent-encoded."""
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
async def test_instance_of_a_path_as_it_was_sent(raw_path, instance):
    """Where the server passes on the path as the client has sent it, its percent-encoding is kept."""
    path = unquote(raw_path.decode("latin-1"))

    assert await instance_of(fastapi(), path=path, raw_path=raw_path) == instance


async def test_instance_in_a_mounted_app():
    """A mounted app names the whole path, below a root path of its server too."""
    outer = fastapi()
    outer.mount("/sub", fastapi())
    sub = {"path": "/api/sub/a b", "root_path": "/api"}

    assert await instance_of(outer, **sub) == "/api/sub/a%20b"
    assert await instance_of(outer, **sub, raw_path=b"/api/sub/a%20b") == "/api/sub/a%20b"


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(("target", "instance"), [("//evil.com/x", "/evil.com/x"), ("/a%20b%2Fc?q=1", "/a%20b%2Fc")])
def test_instance_under_a_server(http, target, instance):
    """Under a real server the instance is a URI reference to this service, whatever the request line has."""
    with serving(fastapi(), http=http) as port, connection(port) as client:
        client.sendall(request("GET", target))
        answer = read_response(client)

    assert json.loads(answer.partition(b"\r\n\r\n")[2])["instance"] == instance


def test_websocket_validation_error():
    """An invalid handshake is closed with 1008, and its reason repeats nothing."""
    app = fastapi()

    @app.websocket("/ws/{number}")
    async def endpoint(websocket: WebSocket, number: int):
        await websocket.accept()

    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect(f"/ws/{MARKER}"):
        pass

    assert closed.value.code == 1008
    assert closed.value.reason == "The request is not valid."


def test_http_exception_in_a_handshake():
    """A handshake that is refused with an HTTPException is refused with the problem."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("/ws"):
        pass

    assert refused.value.status_code == refused.value.json()["status"] == 401
    assert refused.value.headers["content-type"] == PROBLEM
    assert refused.value.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("status", "code"), [(404, 1008), (429, 1013), (500, 1011), (503, 1013)])
def test_http_exception_in_an_open_websocket(status, code):
    """An open WebSocket cannot have a response: it is closed with the nearest code, and nothing is raised."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        raise ProblemError(status, title="ä" * 100)

    with TestClient(app).websocket_connect("/ws") as websocket, pytest.raises(WebSocketDisconnect) as closed:
        websocket.receive_text()

    assert closed.value.code == code
    assert closed.value.reason == "ä" * 61  # of 123 bytes, as much as makes whole characters


@pytest.mark.parametrize("closes", [True, False])
def test_http_exception_in_a_closed_websocket(closes):
    """Where either side has closed the WebSocket, nothing is sent and nothing is raised."""
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


def test_websocket_exception():
    """A WebSocketException keeps the code that it has."""
    app = fastapi()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        raise WebSocketException(4001, "mine")

    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/ws"):
        pass

    assert (closed.value.code, closed.value.reason) == (4001, "mine")


async def test_refusal_of_a_websocket_where_the_server_cannot_respond():
    """A middleware's refusal of a handshake is a close with 1008, where the server has no other way."""
    received, sent = [], []

    async def receive():
        received.append(1)
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    await Refusal(ProblemError(403))({"type": "websocket", "path": "/", "headers": []}, receive, send)

    assert received == [1]
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "Forbidden"}]


async def test_refusal_of_a_websocket():
    """Elsewhere it is the whole problem."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [], "extensions": {"websocket.http.response": {}}}
    await Refusal(ProblemError(403))(scope, receive, send)

    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert sent[0]["status"] == json.loads(sent[1]["body"])["status"] == 403


def test_two_apps_in_one_process():
    """Handlers belong to the app that they were added to."""
    with_handlers, without = fastapi(), FastAPI()

    assert problem(client_of(with_handlers).get("/nothing"), 404)
    assert client_of(without).get("/nothing").json() == {"detail": "Not Found"}


def test_adding_handlers_twice():
    """Adding the handlers again changes nothing."""
    app = fastapi()
    before = dict(app.exception_handlers)

    add_problem_handlers(app)

    assert app.exception_handlers == before


def test_own_response_is_left_alone():
    """An error response that a handler returns, rather than raises, is the handler's own."""
    app = fastapi()
    app.get("/")(lambda: Response("mine", 400))

    response = client_of(app).get("/")

    assert (response.text, "content-type" in response.headers) == ("mine", False)


def test_a_body_that_is_wrong_everywhere_gets_a_bounded_answer():
    """A megabyte of errors is not answered with ten of them."""
    app = FastAPI()
    add_problem_handlers(app)

    @app.post("/")
    async def create(numbers: list[int]): ...

    response = TestClient(app).post("/", json=["x"] * 1000)

    assert response.status_code == 422
    assert len(response.json()["errors"]) == 100


@pytest.mark.parametrize("errors", ["text", [{"loc": ["q"], "msg": "m"}], [{"loc": [("x", 1)]}], ["text"]])
def test_a_validation_error_raised_by_hand(errors):
    """FastAPI lets its errors be anything; the answer is a 422 in any case."""
    app = FastAPI()
    add_problem_handlers(app)

    @app.get("/")
    async def read():
        raise RequestValidationError(errors)

    response = TestClient(app).get("/")

    assert response.status_code == 422
    assert all(set(each) == {"loc", "msg", "type"} for each in response.json()["errors"])
