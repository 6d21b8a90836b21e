"""The decorators of slowapi with our store and problems."""

import asyncio
import functools
import itertools
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx2 as httpx
import pytest
import slowapi
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.requests import HTTPConnection
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from redis_servers import redis_or_skip
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_ipaddr, get_remote_address
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.routing import Host, Route, Router
from starlette.testclient import WebSocketDenialResponse

import fastapi_prodkit.rate_limit
from fastapi_prodkit import create_app
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit import Limiter, MemoryStore, SharedStore, by_header
from fastapi_prodkit.sections import RateLimitSettings
from fastapi_prodkit.settings import Settings


def app_of(**rate_limit):
    return create_app(Settings(environment="test", rate_limit={"default": "1000/minute", **rate_limit}))


def service(limiter, app, limit="2/minute"):
    """Add code written for slowapi, on every kind of route."""
    app.state.limiter = limiter

    @app.get("/direct")
    @limiter.limit(limit)
    async def direct(request: Request):
        return {"route": "direct"}

    @app.get("/sync")
    @limiter.limit(limit)
    def sync(request: Request):
        return PlainTextResponse("sync")

    inner = APIRouter(prefix="/inner")

    @inner.get("/nested/{number}")
    @limiter.limit(limit)
    async def nested(request: Request, number: int):
        return number

    outer = APIRouter(prefix="/outer")
    outer.include_router(inner)
    app.include_router(outer)

    sub = FastAPI()

    @sub.get("/mounted")
    @limiter.limit(limit)
    async def mounted(request: Request):
        return "mounted"

    app.mount("/sub", sub)
    return app


PATHS = ["/direct", "/sync", "/outer/inner/nested/1", "/sub/mounted"]


@pytest.mark.parametrize("path", PATHS)
def test_decorator_limits_every_kind_of_route(path):
    """The refusal is our problem; every response has the headers."""
    client = TestClient(service(Limiter(), app_of()))

    first, _, third = (client.get(path) for _ in range(3))

    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"default";q=1000;w=60, "route";q=2;w=60'
    assert '"route";r=1;t=60' in first.headers["ratelimit"]
    assert third.status_code == 429
    assert third.headers["content-type"] == "application/problem+json" or path.startswith("/sub")
    assert third.headers["retry-after"] == "60"
    assert '"route";r=0;t=60' in third.headers["ratelimit"]


def test_path_parameters_share_one_quota():
    """slowapi's own limiter counts by URL."""
    ours = TestClient(service(Limiter(), app_of()))
    stock = TestClient(service(slowapi.Limiter(key_func=lambda request: "x"), FastAPI()))

    def statuses(client):
        return [client.get(f"/outer/inner/nested/{number}").status_code for number in range(3)]

    assert statuses(ours) == [200, 200, 429]
    assert statuses(stock) == [200, 200, 200]


def test_default_limit_covers_every_route():
    """slowapi's own skips included routers, mounts and unknown paths."""
    stock = slowapi.Limiter(get_remote_address, default_limits=["1/minute"])
    plain = FastAPI()
    plain.add_middleware(SlowAPIMiddleware)

    def statuses(app, limiter):
        router = APIRouter()
        router.get("/included")(lambda: None)
        service(limiter, app).include_router(router)
        client = TestClient(app)
        paths = ("/included", "/included", "/nowhere", "/nowhere", "/direct")
        return [client.get(path).status_code for path in paths]

    assert statuses(app_of(default="4/minute"), Limiter()) == [200, 200, 404, 404, 429]
    assert statuses(plain, stock) == [200, 200, 404, 404, 200]


@pytest.mark.parametrize("middleware", [SlowAPIMiddleware, SlowAPIASGIMiddleware])
def test_middlewares_of_slowapi_do_not_count(middleware, caplog):
    """A log line reports them once."""
    app = service(Limiter(), app_of(default="7/minute"))
    app.add_middleware(middleware)
    app.get("/plain")(lambda: None)
    client = TestClient(app)

    with caplog.at_level(logging.WARNING, "fastapi_prodkit"):
        statuses = [client.get(path).status_code for path in ["/plain"] * 3 + ["/direct"] * 3]

    assert statuses == [200] * 5 + [429]
    assert [record.message for record in caplog.records if record.name == "fastapi_prodkit.rate_limit"] == [
        "slowapi's middlewares have no effect here, cost time and break streams: remove them"
    ]


def test_limiter_is_imported_on_first_use():
    """Access to `rate_limit.Limiter` imports slowapi; a misspelt name raises AttributeError."""
    with pytest.raises(AttributeError, match="Limitr"):
        fastapi_prodkit.rate_limit.Limitr  # noqa: B018 - the access is the test

    assert issubclass(fastapi_prodkit.rate_limit.Limiter, slowapi.Limiter)


def test_handler_of_slowapi_has_no_effect():
    """The refusal is our problem."""
    app = service(Limiter(), app_of())
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)
    client = TestClient(app)

    problems = [client.get("/direct").json() for _ in range(3)]

    assert problems[2]["violated-policies"] == ["route"]
    assert problems[2]["detail"] == "Too many requests; try again later."


@pytest.mark.parametrize("edge", [True, False])
def test_handler_of_the_user_gets_what_slowapi_sets(edge):
    """The exception, the limit, the detail, and the function that adds headers."""
    app = service(Limiter(), app_of() if edge else FastAPI())
    seen = []

    @app.exception_handler(RateLimitExceeded)
    async def handler(request: Request, error: RateLimitExceeded) -> Response:
        seen.append(
            (error.status_code, error.detail, error.limit.limit.amount, request.state.view_rate_limit[0].amount)
        )
        response = PlainTextResponse("easy!", status_code=429)
        return request.app.state.limiter._inject_headers(response, request.state.view_rate_limit)

    client = TestClient(app)
    response = [client.get("/direct") for _ in range(3)][2]

    assert (response.status_code, response.text) == (429, "easy!")
    assert seen == [(429, "2 per 1 minute", 2, 2)]
    assert response.headers["retry-after"] == "60"
    assert response.headers["ratelimit"].endswith('"route";r=0;t=60')


def test_refusal_is_an_exception_of_slowapi():
    """A refusal inside a decorated function can be caught with slowapi's `except RateLimitExceeded`."""
    app = app_of()

    @Limiter().limit("1/minute", error_message="slow down")
    async def limited(request: Request): ...

    @app.get("/")
    async def endpoint(request: Request):
        try:
            await limited(request)
        except RateLimitExceeded as error:
            return [error.detail, str(error.limit.limit)]

    client = TestClient(app)

    assert [client.get("/").json() for _ in range(2)] == [None, ["slow down", "1 per 1 minute"]]


def test_arguments_of_the_decorator_work():
    """Each argument of the `limit` decorator has the effect that it has in slowapi."""
    limiter = Limiter()
    app = app_of()

    @app.api_route("/per-method", methods=["GET", "POST"])
    @limiter.limit("1/minute", per_method=True)
    async def per_method(request: Request): ...

    @app.api_route("/methods", methods=["GET", "POST"])
    @limiter.limit("1/minute", methods=["POST"])
    async def methods(request: Request): ...

    @app.get("/message")
    @limiter.limit("1/minute", error_message="slow down")
    async def message(request: Request): ...

    @app.get("/called")
    @limiter.limit("1/minute", error_message=lambda: "called")
    async def called(request: Request): ...

    @app.get("/exempt")
    @limiter.limit("1/minute", exempt_when=lambda request: request.headers.get("x-staff") == "yes")
    async def exempt(request: Request): ...

    @app.get("/cost")
    @limiter.limit("5/minute", cost=lambda request: 3)
    async def cost(request: Request): ...

    @app.get("/client-cost")
    @limiter.limit("5/minute", cost=lambda request: int(request.headers["x-cost"]))
    async def client_cost(request: Request): ...

    @app.get("/key")
    @limiter.limit("1/minute", key_func=lambda: "everybody")
    async def key(request: Request): ...

    @app.get("/no-key")
    @limiter.limit("1/minute", key_func=lambda request: "")
    async def no_key(request: Request): ...

    @app.get("/dynamic")
    @limiter.limit(lambda key: "2/minute" if key else "1/minute", key_func=lambda request: request.headers["x-plan"])
    async def dynamic(request: Request): ...

    @app.get("/several")
    @limiter.limit("5/minute")
    @limiter.limit("1/minute; 9/hour")
    async def several(request: Request): ...

    client = TestClient(app)

    def statuses(*paths, method="GET", **headers):
        return [client.request(method, path, headers=headers).status_code for path in paths]

    assert statuses(*["/per-method"] * 2) + statuses("/per-method", method="POST") == [200, 429, 200]
    assert statuses(*["/methods"] * 2) + statuses(*["/methods"] * 2, method="POST") == [200, 200, 200, 429]
    assert [client.get("/message").json() for _ in range(2)][1]["detail"] == "slow down"
    assert [client.get("/called").json() for _ in range(2)][1]["detail"] == "called"
    assert statuses(*["/exempt"] * 2, **{"x-staff": "yes"}) + statuses(*["/exempt"] * 2) == [200, 200, 200, 429]
    assert statuses(*["/cost"] * 2) == [200, 429]
    for cost, status in (("-100", 200), ("5", 200), ("-100", 200), ("1", 429), (str(2**63), 429)):
        assert statuses("/client-cost", **{"x-cost": cost}) == [status]
    assert statuses(*["/key"] * 2) == [200, 429]
    assert statuses(*["/no-key"] * 3) == [200, 200, 200]
    assert statuses(*["/dynamic"] * 3, **{"x-plan": "big"}) == [200, 200, 429]
    assert statuses(*["/several"] * 2) == [200, 429]


@pytest.mark.parametrize("decorator", [Limiter.limit, functools.partial(Limiter.shared_limit, scope="all")])
def test_negative_cost_is_refused(decorator):
    """A negative cost raises ConfigurationError, because each request would add quota."""
    with pytest.raises(ConfigurationError, match="use 0 or more"):

        @decorator(Limiter(), "5/minute", cost=-1)
        async def endpoint(request: Request): ...


def test_shared_limit_has_one_quota_for_two_endpoints():
    """The headers name its scope."""
    limiter = Limiter()
    app = app_of()

    @app.get("/a")
    @limiter.shared_limit("2/minute", scope=lambda: "search")
    async def a(request: Request): ...

    @app.get("/b")
    @limiter.shared_limit("2/minute", "search")
    def b(request: Request): ...

    client = TestClient(app)
    responses = [client.get(path) for path in ("/a", "/b", "/a")]

    assert [response.status_code for response in responses] == [200, 200, 429]
    assert responses[2].json()["violated-policies"] == ["search"]


def test_scope_function_gets_the_name_of_the_endpoint():
    """A scope function with a parameter receives the endpoint's name, where slowapi raises AttributeError."""
    limiter = Limiter()
    app = app_of()

    @app.get("/")
    @limiter.shared_limit("1/minute", scope=lambda endpoint: f"any {endpoint}")
    async def search(request: Request): ...

    client = TestClient(app)

    assert [client.get("/").status_code for _ in range(2)] == [200, 429]
    assert '"route";q=1' in client.get("/").headers["ratelimit-policy"]  # a name with a space is not used


def test_websocket_handshake_is_limited():
    """A WebSocket handshake above the limit is refused with 429, which slowapi's own Limiter cannot do."""
    limiter = Limiter()
    app = app_of()

    @app.websocket("/ws")
    @limiter.limit("1/minute")
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    client = TestClient(app)

    with client.websocket_connect("/ws"):
        pass
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
        pass

    assert refused.value.status_code == 429


def test_disabled_limiter_limits_nothing():
    """A Limiter with `enabled=False` serves every request to its decorated endpoints."""
    limiter = Limiter(enabled=False)
    client = TestClient(service(limiter, app_of()))

    assert [client.get(path).status_code for path in ("/direct", "/sync") for _ in range(3)] == [200] * 6


@pytest.mark.parametrize("edge", [True, False])
def test_reset_clears_the_counters(edge):
    """In the app's store and in its own."""
    limiter = Limiter()
    client = TestClient(service(limiter, app_of() if edge else FastAPI()))
    before = [client.get("/direct").status_code for _ in range(3)]

    limiter.reset()

    assert before == [200, 200, 429]
    assert client.get("/direct").status_code == 200


def test_reset_of_a_shared_store_is_refused():
    """It must be awaited; the message says how."""
    limiter = Limiter()
    app = service(limiter, FastAPI())
    app.state.rate_limit = store = SharedStore(RateLimitSettings(storage_url="memory://"))
    with TestClient(app) as client:
        client.get("/direct")

    with pytest.raises(ConfigurationError, match="await"):
        limiter.reset()
    assert store


def test_limiter_without_an_edge_counts_in_memory():
    """Every kind of response has the headers."""
    limiter = Limiter()
    app = FastAPI()

    @app.get("/data")
    @limiter.limit("1/minute")
    async def data(request: Request, response: Response):
        return {}

    @app.get("/response")
    @limiter.limit("1/minute")
    def own(request: Request):
        return PlainTextResponse("x")

    @app.get("/nothing")
    @limiter.limit("1/minute")
    async def nothing(request: Request):
        return {}

    client = TestClient(app)

    assert client.get("/data").headers["ratelimit"] == '"route";r=0;t=60'
    refused = client.get("/data")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert refused.headers["ratelimit"] == '"route";r=0;t=60'
    assert client.get("/response").headers["ratelimit"] == '"route";r=0;t=60'
    assert client.get("/nothing").headers["ratelimit"] == '"route";r=0;t=60'


@pytest.mark.parametrize("name", ["default_limits", "storage_uri", "headers_enabled"])
def test_argument_with_a_setting_is_refused(name):
    """The error names the setting."""
    with pytest.raises(ConfigurationError, match=f"{name}=.*use "):
        Limiter(**{name: "x"})


def test_unknown_argument_is_a_type_error():
    """An argument that Limiter does not have raises TypeError instead of being ignored."""
    with pytest.raises(TypeError, match="storage_url"):
        Limiter(storage_url="redis://")


@pytest.mark.parametrize("variable", ["RATELIMIT_DEFAULT", "RATELIMIT_STORAGE_URL"])
def test_variable_of_slowapi_is_refused(variable, monkeypatch, tmp_path):
    """From the environment or `.env`."""
    monkeypatch.chdir(tmp_path)
    Limiter()
    (tmp_path / ".env").write_text(f"{variable}=redis://127.0.0.1\n")

    with pytest.raises(ConfigurationError, match=f"{variable}.*use RATE_LIMIT_"):
        Limiter()


@pytest.mark.parametrize("enabled", [True, False])
def test_ratelimit_enabled_false_disables_the_limiter(enabled, monkeypatch):
    """RATELIMIT_ENABLED=false disables a Limiter even with `enabled=False`, where slowapi enables its own."""
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")

    assert Limiter(enabled=enabled).enabled is False
    assert bool(slowapi.Limiter(get_remote_address, enabled=enabled).enabled) is not enabled


class Order(BaseModel):
    number: int


def test_endpoint_needs_no_request_parameter():
    """A limited endpoint needs no `request` parameter, and a body parameter named `request` stays the body."""
    limiter = Limiter()
    app = app_of()

    @app.get("/none")
    @limiter.limit("1/minute")
    async def none(number: int, **rest: str):
        return number

    @app.get("/sync")
    @limiter.limit("1/minute")
    def sync(number: int):
        return number

    @app.post("/body")
    @limiter.limit("1/minute")
    async def body(request: Order):
        return request.number

    @app.get("/other")
    @limiter.limit("1/minute")
    async def other(connection: HTTPConnection, answer: Response):
        answer.status_code = 201
        return connection.url.path

    client = TestClient(app)

    def answers(path, **more):
        return [(response.status_code, response.json()) for response in (more["do"](path) for _ in range(2))]

    for path in ("/none?number=7&rest=1", "/sync?number=7"):
        (status, content), (refused, _) = answers(path, do=client.get)
        assert (status, content, refused) == (200, 7, 429)
    (status, content), (refused, _) = answers("/body", do=lambda path: client.post(path, json={"number": 7}))
    assert (status, content, refused) == (200, 7, 429)
    (status, content), (refused, _) = answers("/other", do=client.get)
    assert (status, content, refused) == (201, "/other", 429)
    with pytest.raises(Exception, match='No "request"'):
        slowapi.Limiter(get_remote_address).limit("1/minute")(lambda: None)


def test_parameter_called_request_needs_no_annotation():
    """The annotation cannot be resolved."""

    @Limiter().limit("1/minute")
    async def endpoint(request: "NoSuchName", kind: "Request"): ...  # noqa: F821

    assert endpoint.__signature__.parameters.keys() == {"request", "kind", "prodkit_response"}


async def test_direct_call_of_a_limited_function_is_not_limited():
    """A decorated function that is called outside of a request runs without a limit, as no client is known."""

    @Limiter().limit("1/minute")
    async def endpoint(number: int):
        return number

    @Limiter().limit("1/minute")
    def sync(number: int):
        return number

    assert [await endpoint(1), await endpoint(2), sync(3), sync(4)] == [1, 2, 3, 4]


def test_plain_starlette_routes_are_limited():
    """They pass the request by position."""
    limiter = Limiter()

    class Page(HTTPEndpoint):
        @limiter.limit("1/minute")
        async def get(self, request):
            return PlainTextResponse("page")

    @limiter.limit("1/minute")
    def home(request: Request):
        return PlainTextResponse("home")

    client = TestClient(Starlette(routes=[Route("/page", Page), Route("/", home)]))

    assert [client.get(path).status_code for path in ("/page", "/page", "/", "/")] == [200, 429, 200, 429]
    assert client.get("/").headers["ratelimit"] == '"route";r=0;t=60'


@pytest.mark.parametrize("edge", [True, False])
def test_generator_endpoint_is_limited_before_the_response(edge):
    """A generator endpoint is counted before its response starts, so a refusal still gets status 429."""
    limiter = Limiter()
    app = app_of() if edge else FastAPI()

    @app.get("/async")
    @limiter.limit("2/minute")
    @limiter.limit("1/minute")
    async def async_numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    @app.get("/sync")
    @limiter.limit("1/minute")
    def numbers(request: Request) -> Iterator[int]:
        yield 1
        yield 2

    @app.get("/staff")
    @limiter.limit("1/minute", exempt_when=lambda: True)
    def staff() -> Iterator[int]:
        yield 1

    client = TestClient(app)
    first, again = client.get("/async"), client.get("/async")
    sync = [client.get("/sync") for _ in range(2)]

    assert (first.text, again.status_code) == ("1\n2\n", 429)
    assert '"route";r=0;t=60, "route-2";r=1;t=60' in first.headers["ratelimit"]
    assert (sync[0].text, sync[1].status_code) == ("1\n2\n", 429)
    assert '"route";r=0;t=60' in sync[0].headers["ratelimit"]
    assert [client.get("/staff").status_code for _ in range(2)] == [200, 200]


def test_async_decorator_in_between_works():
    """An async endpoint under a sync `functools.wraps` wrapper is awaited and limited."""
    limiter = Limiter()
    app = app_of()

    def wrapped(endpoint):
        @functools.wraps(endpoint)
        def wrapper(*args, **kwargs):
            return endpoint(*args, **kwargs)

        return wrapper

    @app.get("/")
    @limiter.limit("1/minute")
    @wrapped
    async def endpoint(request: Request):
        return "async"

    client = TestClient(app)

    assert client.get("/").json() == "async"
    assert client.get("/").status_code == 429


def test_functions_of_the_decorator_run_in_the_thread_of_the_endpoint():
    """They may block."""
    limiter = Limiter()
    app = app_of()
    threads = []

    def key(request):
        threads.append(threading.get_ident())
        return "key"

    @app.get("/")
    @limiter.limit("5/minute", key_func=key)
    def endpoint(request: Request):
        return threads.append(threading.get_ident())

    @app.get("/loop")
    async def loop():
        threads.append(threading.get_ident())

    with TestClient(app) as client:
        client.get("/")
        client.get("/loop")

    assert threads[0] == threads[1] != threads[2]


def test_endpoints_of_equal_names_have_separate_quotas():
    """Two endpoints from one factory function are counted separately, where slowapi counts them together."""

    def service(limiter, app):
        def add(path):
            @app.get(path)
            @limiter.limit("3/minute")
            async def endpoint(request: Request): ...

        add("/a")
        add("/b")
        client = TestClient(app)
        return [client.get(path).status_code for path in ("/a", "/a", "/b", "/b", "/b")]

    assert service(Limiter(), app_of()) == [200] * 5
    stock = slowapi.Limiter(get_remote_address, key_style="endpoint")
    assert service(stock, FastAPI()) == [200, 429, 429, 429, 429]


@pytest.mark.parametrize("stock_key", [get_remote_address, get_ipaddr])
def test_key_functions_of_slowapi_count_by_address(stock_key):
    """The key functions of slowapi ignore X-Forwarded-For here and count an IPv6 client by its /64 network."""
    app = app_of()
    limiter = Limiter(key_func=stock_key)

    @app.get("/")
    @limiter.limit("1/minute")
    async def endpoint(request: Request): ...

    def statuses(host, **headers):
        return TestClient(app, client=(host, 1), headers=headers).get("/").status_code

    assert [statuses("2001:db8::1"), statuses("2001:db8::2"), statuses("2001:db8:0:1::1")] == [200, 429, 200]
    assert [statuses("192.0.2.1"), statuses("192.0.2.1", X_FORWARDED_FOR="192.0.2.2")] == [200, 429]


def test_key_functions_of_this_package_work():
    """The decorator accepts key functions written for RateLimit, such as `by_header`."""
    app = app_of()

    @app.get("/")
    @Limiter().limit("1/minute", key_func=by_header("X-API-Key"))
    async def endpoint(request: Request): ...

    client = TestClient(app)

    assert [client.get("/", headers={"x-api-key": key}).status_code for key in "aab"] == [200, 429, 200]


@pytest.mark.parametrize("read", [int, str.encode])
def test_key_may_be_an_integer_or_bytes(read):
    """Other objects are refused."""
    app = app_of()
    limiter = Limiter(key_func=lambda request: read(request.query_params["key"]))

    @app.get("/")
    @limiter.limit("1/minute")
    async def endpoint(request: Request): ...

    @app.get("/object")
    @limiter.limit("1/minute", key_func=lambda request: object())
    async def by_object(request: Request): ...

    client = TestClient(app)

    assert [client.get("/", params={"key": key}).status_code for key in "112"] == [200, 429, 200]
    with pytest.raises(ConfigurationError, match="of type object"):
        client.get("/object")


def exempting(app, limiter):
    """Add exempt endpoints on every kind of route."""

    @app.get("/hook/{name}")
    @limiter.limit("1/minute")
    @limiter.exempt
    async def hook(request: Request, name: str): ...

    @app.get("/hook-2")
    @limiter.exempt
    @limiter.limit("1/minute")
    async def second(request: Request): ...

    @app.post("/hook-2")
    async def other(): ...

    @app.get("/busy")
    @limiter.limit("4/minute", override_defaults=True)
    async def busy(request: Request): ...

    router = APIRouter(prefix="/included")

    @router.get("/hook/")
    @limiter.exempt
    def included(): ...

    sub = FastAPI()

    @sub.get("/hook")
    @limiter.exempt
    async def mounted(): ...

    app.include_router(router, prefix="/v1")
    app.mount("/{tenant}/sub", sub)
    app.router.routes.append(Host("api.test", Router([Route("/hosted", limiter.exempt(lambda _: Response()))])))
    return app


@pytest.mark.parametrize("path", ["/hook/a", "/hook-2", "/v1/included/hook/", "/acme/sub/hook", "/hosted"])
def test_exempt_endpoint_is_not_counted(path):
    """An exempt endpoint is neither counted nor refused, by its own limit or by the default limit."""
    client = TestClient(exempting(app_of(default="1/minute"), Limiter()), base_url="http://api.test")
    client.get("/nowhere")

    responses = [client.get(path) for _ in range(3)]

    assert [response.status_code for response in responses] == [200] * 3
    assert "ratelimit" not in responses[0].headers
    assert client.get("/nowhere").status_code == 429


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/hook-2"),
        ("DELETE", "/hook-2"),
        ("GET", "/hook/a/b"),
        ("GET", "/x/sub/hooks"),
        ("GET", "/x/sub/y/hook"),
    ],
)
def test_other_endpoint_at_a_similar_path_counts(method, path):
    """An exemption applies to an endpoint; other methods and similar paths still count."""
    client = TestClient(exempting(app_of(default="1/minute"), Limiter()))

    first, second = (client.request(method, path).status_code for _ in range(2))

    assert first in {200, 404, 405}
    assert second == 429


def test_route_in_front_of_an_exempt_endpoint_counts():
    """A request that an earlier route handles counts, even if the path also matches an exempt endpoint."""
    app = app_of(default="1/minute")

    @app.get("/hook/me")
    async def me(): ...

    client = TestClient(exempting(app, Limiter()))

    assert [client.get("/hook/me").status_code for _ in range(2)] == [200, 429]
    assert client.get("/hook/you").status_code == 200


def test_override_defaults_replaces_the_default_limit():
    """With `override_defaults=True` only the endpoint's own limit applies, even if the default is lower."""
    client = TestClient(exempting(app_of(default="1/minute"), Limiter()))

    responses = [client.get("/busy") for _ in range(5)]

    assert [response.status_code for response in responses] == [200] * 4 + [429]
    assert responses[0].headers["ratelimit-policy"] == '"route";q=4;w=60'


def test_decorator_above_the_route_logs_a_warning(caplog):
    """It has no effect there."""
    limiter = Limiter()
    app = app_of()

    @limiter.limit("1/minute")
    @app.get("/wrong/{number}")
    async def wrong(request: Request, number: int): ...

    def plain(request: Request): ...

    once, twice = limiter.limit("1/minute")(plain), limiter.limit("2/minute")(plain)
    app.get("/once")(once)
    app.get("/twice")(twice)
    with caplog.at_level(logging.WARNING, "fastapi_prodkit"), TestClient(app) as client:
        client.get("/wrong/1")

    assert [record.message for record in caplog.records] == [
        "the limit of /wrong/{number} has no effect: put its decorator below that of the route"
    ]


def test_endpoint_class_is_limited():
    """Requests to a Starlette HTTPEndpoint class count against the default limit."""

    class Items(HTTPEndpoint):
        async def get(self, request):
            return Response()

    app = app_of(default="1/minute")
    app.add_route("/items", Items)
    client = TestClient(app)

    assert [client.get("/items").status_code for _ in range(2)] == [200, 429]


def test_schema_shows_429_without_added_parameters():
    """The OpenAPI schema of a decorated endpoint lists the 429 response and no parameters of the decorator."""
    app = app_of()

    @app.get("/")
    @Limiter().limit("1/minute")
    async def endpoint(): ...

    operation = app.openapi()["paths"]["/"]["get"]

    assert "429" in operation["responses"]
    assert "parameters" not in operation


def test_failing_request_counts():
    """Its response has the headers."""
    app = app_of()

    @app.get("/")
    @Limiter().limit("1/minute")
    async def endpoint():
        raise HTTPException(404)

    client = TestClient(app)
    first, second = client.get("/"), client.get("/")

    assert (first.status_code, second.status_code) == (404, 429)
    assert '"route";r=0;t=60' in first.headers["ratelimit"]


def test_invalid_limit_is_refused():
    """slowapi's own limiter serves without a limit."""
    with pytest.raises(ConfigurationError, match="cannot be read"):

        @Limiter().limit("five a minute")
        async def endpoint(request: Request): ...


def test_dynamic_limit_gets_its_own_request():
    """With concurrent requests."""
    limiter = Limiter(key_func=lambda request: request.headers["x-client"])
    app = FastAPI()

    @app.get("/")
    @limiter.limit(lambda key: f"{key}/minute")
    async def endpoint(request: Request): ...

    async def attack():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            calls = [client.get("/", headers={"x-client": str(number)}) for number in (1, 2, 3) for _ in range(4)]
            return [response.status_code for response in await asyncio.gather(*calls)]

    assert sorted(asyncio.run(attack())) == [200] * 6 + [429] * 6


async def test_silent_store_does_not_block_the_event_loop():
    """The policy decides."""
    pytest.importorskip("redis", reason="needs the extra redis")
    app = service(Limiter(), FastAPI())
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog for ever
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        app.state.rate_limit = SharedStore(RateLimitSettings(storage_url=url))
        ticking = asyncio.create_task(tick())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            statuses = [(await client.get(path)).status_code for path in ("/direct", "/sync", "/direct", "/direct")]
        ticking.cancel()

    assert statuses == [200, 200, 200, 429]
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.5
    assert len(ticks) > 5


@pytest.mark.parametrize(
    ("policy", "without"), [("memory", [200, 200, 429]), ("allow", [200] * 3), ("deny", [503] * 3)]
)
def test_two_processes_share_a_store(policy, without):
    """Async and sync endpoints; during an outage the policy decides."""
    pytest.importorskip("redis", reason="needs the extra redis")
    with redis_or_skip() as running:
        options = {
            "storage_url": running.url(),
            "on_storage_error": policy,
            "storage_timeout": 2,
            "default": "9/day",
        }
        # The decorators of a module create the same limits in each process.
        apps = [service(Limiter(), app_of(**options), "2/day") for _ in range(2)]
        with TestClient(apps[0]) as first, TestClient(apps[1]) as second:
            shared = [client.get(path) for path in ("/direct", "/sync") for client in (first, second, first)]
            running.kill()
            alone = [second.get(path).status_code for path in ("/direct", "/sync") for _ in range(3)]

    assert [response.status_code for response in shared] == [200, 200, 429] * 2
    assert shared[5].headers["content-type"] == "application/problem+json"
    assert alone == without * 2


def test_limiters_without_a_store_count_separately():
    """Two limiters without an edge and without `app.state.rate_limit` each use their own MemoryStore."""
    first, second = (TestClient(service(Limiter(), FastAPI())) for _ in range(2))

    assert [client.get("/direct").status_code for client in (first, first, second)] == [200, 200, 200]
    assert isinstance(Limiter()._own, MemoryStore)
