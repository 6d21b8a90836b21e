"""slowapi's decorators on our store: what people have in their code goes on to work, and works everywhere."""

import asyncio
import itertools
import time

import httpx2 as httpx
import pytest
import slowapi
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from slowapi.errors import RateLimitExceeded
from starlette.testclient import WebSocketDenialResponse

from fastapi_prodkit import create_app
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit import MemoryStore, SharedStore
from fastapi_prodkit.rate_limit.slowapi import Limiter
from fastapi_prodkit.sections import RateLimitSettings
from fastapi_prodkit.settings import Settings


def app_of(**rate_limit):
    return create_app(Settings(environment="test", rate_limit={"default": "1000/minute", **rate_limit}))


def service(limiter, app):
    """Add the code that somebody has written for slowapi, on every kind of route."""
    app.state.limiter = limiter

    @app.get("/direct")
    @limiter.limit("2/minute")
    async def direct(request: Request):
        return {"route": "direct"}

    @app.get("/sync")
    @limiter.limit("2/minute")
    def sync(request: Request):
        return PlainTextResponse("sync")

    inner = APIRouter(prefix="/inner")

    @inner.get("/nested/{number}")
    @limiter.limit("2/minute")
    async def nested(request: Request, number: int):
        return number

    outer = APIRouter(prefix="/outer")
    outer.include_router(inner)
    app.include_router(outer)

    sub = FastAPI()

    @sub.get("/mounted")
    @limiter.limit("2/minute")
    async def mounted(request: Request):
        return "mounted"

    app.mount("/sub", sub)
    return app


PATHS = ["/direct", "/sync", "/outer/inner/nested/1", "/sub/mounted"]


@pytest.mark.parametrize("path", PATHS)
def test_decorators_hold_on_every_kind_of_route(path):
    """Two pass, the third is our problem with our headers; every response says what is left."""
    client = TestClient(service(Limiter(), app_of()))

    first, _, third = (client.get(path) for _ in range(3))

    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"default";q=1000;w=60, "route";q=2;w=60'
    assert '"route";r=1;t=60' in first.headers["ratelimit"]
    assert third.status_code == 429
    assert third.headers["content-type"] == "application/problem+json" or path.startswith("/sub")
    assert third.headers["retry-after"] == "60"
    assert '"route";r=0;t=60' in third.headers["ratelimit"]


def test_a_path_parameter_gives_no_fresh_quota():
    """A stock limiter counts by URL: whoever counts up has no limit."""
    ours = TestClient(service(Limiter(), app_of()))
    stock = TestClient(service(slowapi.Limiter(key_func=lambda request: "x"), FastAPI()))

    def statuses(client):
        return [client.get(f"/outer/inner/nested/{number}").status_code for number in range(3)]

    assert statuses(ours) == [200, 200, 429]
    assert statuses(stock) == [200, 200, 200]


def test_the_default_holds_everywhere():
    """A stock limiter's default limits do nothing on included routers, mounts and unknown paths."""
    client = TestClient(service(Limiter(), app_of(default="3/minute")))

    paths = ("/outer/inner/nested/1", "/sub/mounted", "/nowhere", "/direct")
    statuses = [client.get(path).status_code for path in paths]

    assert statuses == [200, 200, 404, 429]


def test_it_is_a_slowapi_limiter():
    """Code that asks finds one, and the middlewares that would count wrongly are refused."""
    limiter = Limiter()

    assert isinstance(limiter, slowapi.Limiter)
    with pytest.raises(ConfigurationError, match="remove them"):
        limiter._check_request_limit(None, None)


def test_a_handler_for_slowapis_exception_is_not_needed():
    """It may stay registered; the refusal is our problem all the same."""
    app = service(Limiter(), app_of())
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)
    client = TestClient(app)

    problems = [client.get("/direct").json() for _ in range(3)]

    assert problems[2]["violated-policies"] == ["route"]


def test_arguments_of_the_decorator():
    """They mean what they mean to slowapi."""
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

    @app.get("/left-alone")
    @limiter.exempt
    async def left_alone(request: Request): ...

    client = TestClient(app)

    def statuses(*paths, method="GET", **headers):
        return [client.request(method, path, headers=headers).status_code for path in paths]

    assert statuses(*["/per-method"] * 2) + statuses("/per-method", method="POST") == [200, 429, 200]
    assert statuses(*["/methods"] * 2) + statuses(*["/methods"] * 2, method="POST") == [200, 200, 200, 429]
    assert [client.get("/message").json() for _ in range(2)][1]["detail"] == "slow down"
    assert [client.get("/called").json() for _ in range(2)][1]["detail"] == "called"
    assert statuses(*["/exempt"] * 2, **{"x-staff": "yes"}) + statuses(*["/exempt"] * 2) == [200, 200, 200, 429]
    assert statuses(*["/cost"] * 2) == [200, 429]
    assert statuses(*["/key"] * 2) == [200, 429]
    assert statuses(*["/no-key"] * 3) == [200, 200, 200]
    assert statuses(*["/dynamic"] * 3, **{"x-plan": "big"}) == [200, 200, 429]
    assert statuses(*["/several"] * 2) == [200, 429]
    assert statuses(*["/left-alone"] * 3) == [200, 200, 200]


def test_shared_limit():
    """Two endpoints have one quota, and the headers call it by its scope."""
    limiter = Limiter()
    app = app_of()
    search = limiter.shared_limit("2/minute", scope=lambda: "search")

    @app.get("/a")
    @search
    async def a(request: Request): ...

    @app.get("/b")
    @search
    def b(request: Request): ...

    client = TestClient(app)
    responses = [client.get(path) for path in ("/a", "/b", "/a")]

    assert [response.status_code for response in responses] == [200, 200, 429]
    assert responses[2].json()["violated-policies"] == ["search"]


def test_websocket():
    """A stock limiter cannot; here the handshake is refused."""
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


def test_disabled():
    """`limiter.enabled = False` switches every limit off, as tests do."""
    limiter = Limiter(enabled=False)
    client = TestClient(service(limiter, app_of()))

    assert [client.get(path).status_code for path in ("/direct", "/sync") for _ in range(3)] == [200] * 6


@pytest.mark.parametrize("edge", [True, False])
def test_reset(edge):
    """Every client starts anew, in the app's store and in its own."""
    limiter = Limiter()
    client = TestClient(service(limiter, app_of() if edge else FastAPI()))
    before = [client.get("/direct").status_code for _ in range(3)]

    limiter.reset()

    assert before == [200, 200, 429]
    assert client.get("/direct").status_code == 200


def test_reset_of_a_shared_store_is_refused():
    """It cannot be done without awaiting; the message says how it is done."""
    limiter = Limiter()
    app = service(limiter, FastAPI())
    app.state.rate_limit = store = SharedStore(RateLimitSettings(storage_url="memory://"))
    with TestClient(app) as client:
        client.get("/direct")

    with pytest.raises(ConfigurationError, match="await"):
        limiter.reset()
    assert store


def test_without_an_edge():
    """In a plain FastAPI app it counts in a memory of its own, and the headers are where there is a response."""
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
    assert client.get("/data").status_code == 429
    assert client.get("/response").headers["ratelimit"] == '"route";r=0;t=60'
    assert "ratelimit" not in client.get("/nothing").headers


@pytest.mark.parametrize("name", ["default_limits", "storage_uri", "headers_enabled"])
def test_arguments_that_have_another_place(name):
    """What the settings say is refused here, with the variable that says it."""
    with pytest.raises(ConfigurationError, match=f"{name}=.*instead"):
        Limiter(**{name: "x"})


def test_an_argument_that_does_not_exist():
    """A misspelt one is Python's own error."""
    with pytest.raises(TypeError, match="storage_url"):
        Limiter(storage_url="redis://")


def test_an_endpoint_without_a_request():
    """slowapi's own rule, told when the module is imported."""
    with pytest.raises(ConfigurationError, match="request"):

        @Limiter().limit("1/minute")
        async def endpoint(): ...


def test_a_limit_that_cannot_be_read():
    """A stock limiter logs it and serves without a limit."""
    with pytest.raises(ConfigurationError, match="cannot be read"):

        @Limiter().limit("five a minute")
        async def endpoint(request: Request): ...


def test_a_limit_for_each_client_is_read_for_that_client():
    """A dynamic limit's function sees the request that it is asked for, however many come at once."""
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


async def test_a_silent_store_does_not_stop_the_event_loop():
    """A stock limiter freezes the process until the store answers; here the loop goes on, and the policy decides."""
    listener = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    pytest.importorskip("redis", reason="needs the extra redis")
    app = service(Limiter(), FastAPI())
    app.state.rate_limit = SharedStore(RateLimitSettings(storage_url=f"redis://127.0.0.1:{port}"))
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        statuses = [(await client.get(path)).status_code for path in ("/direct", "/sync", "/direct", "/direct")]
    ticking.cancel()
    listener.close()

    assert statuses == [200, 200, 200, 429]
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.5
    assert len(ticks) > 5


def test_memory_is_the_store_of_an_app_without_one():
    """Without an edge and without `app.state.rate_limit` nothing is shared between two limiters."""
    first, second = (TestClient(service(Limiter(), FastAPI())) for _ in range(2))

    assert [client.get("/direct").status_code for client in (first, first, second)] == [200, 200, 200]
    assert isinstance(Limiter()._own, MemoryStore)
