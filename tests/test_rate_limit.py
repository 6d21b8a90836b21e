"""Rate limits: exactly as many requests as allowed, and headers with the remaining ones."""

import asyncio
import tracemalloc
import uuid

import httpx2 as httpx
import pytest
from clock import Clock
from fastapi import APIRouter, Depends, FastAPI, Response, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit._counting import client_key
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.rate_limit import MemoryStore, RateLimit, RateLimitMiddleware, by_header, memory
from fastapi_prodkit.rate_limit.keys import bounded, hashed
from fastapi_prodkit.rate_limit.limits import Limit, parse_limits, refused, text_of
from fastapi_prodkit.sections import RateLimitSettings

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock=clock)


async def ok(request):
    return PlainTextResponse("ok")


async def hello():
    return {}


async def hello_number(number: int):
    return number


def starlette(*routes, default="2/minute", **options):
    middleware = Middleware(RateLimitMiddleware, RateLimitSettings(default=default), **options)
    return Starlette(routes=[Route("/", ok), *routes], middleware=[middleware])


def fastapi(default="100/minute", **options):
    app = FastAPI()
    add_problem_handlers(app)
    if default is not None:
        app.add_middleware(RateLimitMiddleware, RateLimitSettings(default=default), **options)
    return app


def statuses(client, path="/", *, times):
    return [client.get(path).status_code for _ in range(times)]


def remaining(store, limit, client):
    """Count a request, and return how many are left."""
    [(_, left, _)] = store.count([limit], client)
    return left


def time_left(store, limit):
    """Count a request, and return the seconds until the window ends."""
    [(_, _, seconds)] = store.count([limit], "a")
    return seconds


def limits(response):
    """Return policy and quota from the headers of a response."""
    assert len(response.headers.get_list("ratelimit")) == len(response.headers.get_list("ratelimit-policy")) == 1
    return response.headers["ratelimit-policy"], response.headers["ratelimit"]


def test_limit_serves_as_many_requests_as_allowed():
    """With a limit of two requests, the first two are served and every further one gets status 429."""
    assert statuses(TestClient(starlette()), times=4) == [200, 200, 429, 429]


def test_headers_have_policy_remaining_and_reset(clock, store):
    """Each response states the policy, the remaining requests and the seconds until the window ends."""
    client = TestClient(starlette(store=store))

    first = client.get("/")
    clock.now += 0.5
    second = client.get("/")
    clock.now += 20
    third = client.get("/")

    policy = '"default";q=2;w=60'
    assert limits(first) == (policy, '"default";r=1;t=60')
    assert limits(second) == (policy, '"default";r=0;t=60')
    assert limits(third) == (policy, '"default";r=0;t=40')


def test_refusal_is_a_problem_with_retry_after(clock, store):
    """It names the policy."""
    client = TestClient(starlette(store=store))
    statuses(client, times=2)
    clock.now += 18.5

    response = client.get("/?token=s3cret")

    assert response.status_code == 429
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["retry-after"] == "42"
    assert response.json() == {
        "type": QUOTA_EXCEEDED,
        "title": "Too Many Requests",
        "status": 429,
        "detail": "Too many requests; try again later.",
        "instance": "/",
        "violated-policies": ["default"],
    }


def test_served_responses_have_no_retry_after():
    """Only a refusal carries Retry-After; a served response does not."""
    assert "retry-after" not in TestClient(starlette()).get("/").headers


def test_window_ends_for_all_clients_at_once(clock, store):
    """It opens with the first request; refused requests do not prolong it."""
    client = TestClient(starlette(store=store))

    in_window = statuses(client, times=3)
    clock.now += 59.999
    at_its_end = client.get("/")
    clock.now += 0.001
    in_next_window = client.get("/")

    assert in_window == [200, 200, 429]
    assert (at_its_end.status_code, at_its_end.headers["retry-after"]) == (429, "1")
    assert limits(in_next_window)[1] == '"default";r=1;t=60'


@pytest.mark.parametrize("start", [0.0, 0.1, 1234.567891, 86_399.999999, 1e9 + 1 / 3])
def test_reset_is_between_one_second_and_the_window(start):
    """The reset time is at least 1 second and at most the window, whatever the clock reads at the start."""
    clock = Clock()
    clock.now = start
    store, limit = MemoryStore(clock=clock), Limit("default", 1000, 60)

    found = []
    for step in range(600):
        clock.now = start + step / 10
        found.append(time_left(store, limit))

    assert found[0] == 60
    assert set(found) <= set(range(1, 61))
    assert found == sorted(found, reverse=True)


async def test_limit_holds_for_concurrent_requests():
    """Of 50 concurrent requests exactly 7 are served under a limit of 7, although each handler awaits."""

    async def slow(request):
        await asyncio.sleep(0)
        return PlainTextResponse("ok")

    transport = httpx.ASGITransport(app=starlette(Route("/slow", slow), default="7/minute"))

    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        responses = await asyncio.gather(*[client.get("/slow") for _ in range(50)])

    assert sorted(response.status_code for response in responses) == [200] * 7 + [429] * 43


def test_several_limits_are_counted_separately(clock, store):
    """Each is an item of the headers; a refusal names the exceeded ones."""
    client = TestClient(starlette(default="2/second; 3/minute", store=store))

    first = client.get("/")
    client.get("/")
    over_the_first = client.get("/")
    clock.now += 1
    over_the_second = client.get("/")

    assert limits(first) == (
        '"default-2-per-1s";q=2;w=1, "default-3-per-60s";q=3;w=60',
        '"default-2-per-1s";r=1;t=1, "default-3-per-60s";r=2;t=60',
    )
    assert over_the_first.json()["violated-policies"] == ["default-2-per-1s"]
    assert over_the_first.headers["retry-after"] == "1"
    assert over_the_second.json()["violated-policies"] == ["default-3-per-60s"]
    assert over_the_second.headers["retry-after"] == "59"


def test_retry_after_is_the_longest_wait():
    """Of the exceeded limits."""
    client = TestClient(starlette(default="1/minute; 1/hour"))

    client.get("/")
    response = client.get("/")

    assert response.json()["violated-policies"] == ["default-1-per-60s", "default-1-per-3600s"]
    assert response.headers["retry-after"] == "3600"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100/minute", [(100, 60)]),
        ("5 per 10 seconds", [(5, 10)]),
        ("1/second; 100/hour", [(1, 1), (100, 3600)]),
        ("1/second, 100/hour", [(1, 1), (100, 3600)]),
        ("10/day", [(10, 86_400)]),
    ],
)
def test_notation_is_that_of_limits(text, expected):
    """As in slowapi."""
    assert [(limit.amount, limit.seconds) for limit in parse_limits(text, name="default")] == expected


def test_text_of_limits_can_be_parsed():
    """Whatever the notation was, it is the same text, in the notation of the settings."""
    texts = {
        text_of(parse_limits(text, name="a")) for text in ("1 per minute, 2/5 seconds", "1/minute; 2 per 5 second")
    }

    assert texts == {"1/minute; 2/5 seconds"}
    assert text_of(parse_limits(texts.pop(), name="a")) == "1/minute; 2/5 seconds"


def test_names_of_several_limits_are_unique():
    """Each has amount and window."""
    names = ["a-1-per-60s", "a-2-per-3600s", "a-1-per-60s-2", "a-1-per-60s-3"]

    parsed = parse_limits("1/minute; 2/hour; 1 per 60 seconds; 1/minute", name="a")

    assert [limit.name for limit in parsed] == names
    assert len({limit.id for limit in parsed}) == 4
    assert parsed[0].beside(names).name == "a-1-per-60s-4"


@pytest.mark.parametrize("text", ["", "100", "minute", "-1/minute", "five/minute", "5/fortnight", "5/minute; oops"])
def test_invalid_limit_is_refused(text):
    """With the text and the notation."""
    with pytest.raises(ConfigurationError, match=r"cannot be read: write it as '100/minute'") as caught:
        RateLimit(text)

    assert repr(text) in str(caught.value)


def test_invalid_default_fails_when_the_app_is_created():
    """A default limit that cannot be parsed fails in the constructor, not at the first request."""
    with pytest.raises(ConfigurationError, match="'oops' cannot be read"):
        RateLimitMiddleware(ok, RateLimitSettings(default="oops"))

    with pytest.raises(ValidationError):
        RateLimitSettings(default="")


def routes():
    async def empty(request):
        return Response(status_code=204)

    async def unchanged(request):
        return Response(status_code=304)

    async def missing(request):
        raise HTTPException(404)

    async def unavailable(request):
        raise HTTPException(503)

    async def stream(request):
        return StreamingResponse(iter([b"a", b"b"]))

    return [
        Route("/empty", empty),
        Route("/unchanged", unchanged),
        Route("/missing", missing),
        Route("/unavailable", unavailable),
        Route("/stream", stream),
        Route("/folder/", ok),
        Mount("/sub", routes=[Route("/", ok)]),
    ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/empty", 204),
        ("GET", "/unchanged", 304),
        ("GET", "/folder", 307),
        ("GET", "/missing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/sub/", 200),
        ("GET", "/sub/nothing", 404),
        ("DELETE", "/", 405),
        ("OPTIONS", "/", 405),
        ("GET", "/stream", 200),
        ("GET", "/unavailable", 503),
    ],
)
def test_every_request_counts(method, path, status):
    """And every response has the headers."""
    client = TestClient(starlette(*routes(), default="5/minute"), follow_redirects=False)

    response = client.request(method, path)

    assert response.status_code == status
    assert limits(response)[1] == '"default";r=4;t=60'


async def test_500_has_the_headers():
    """Around a whole app."""

    async def broken():
        raise RuntimeError

    inner = fastapi(default=None)
    inner.get("/")(broken)
    app = RateLimitMiddleware(inner)

    response = TestClient(app, raise_server_exceptions=False).get("/")

    assert response.status_code == 500
    assert limits(response)[1] == '"default";r=99;t=60'


async def test_body_of_a_refused_request_is_not_read():
    """The middleware refuses a request without a call to `receive`, so no upload is read."""
    app = starlette(default="1/minute")
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    for _ in range(2):
        await app(scope_of("203.0.113.9"), receive, send)

    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [200, 429]


def test_refused_head_has_the_headers():
    """A refused HEAD request gets status 429 and Retry-After like a refused GET request."""
    client = TestClient(starlette(default="1/minute"))

    client.head("/")
    response = client.head("/")

    assert (response.status_code, response.headers["retry-after"]) == (429, "60")


async def test_response_without_headers_gets_ours():
    """ASGI makes them optional."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def send(message):
        sent.append(message)

    await RateLimitMiddleware(app)(scope_of("203.0.113.9"), None, send)

    assert [name for name, _ in sent[0]["headers"]] == [b"ratelimit-policy", b"ratelimit"]


@pytest.mark.parametrize("path", ["/health", "/health/"])
def test_exempt_path_is_not_counted(path):
    """With or without a trailing slash."""
    client = TestClient(starlette(Route(path, ok), default="1/minute", exempt={"/health"}))

    assert statuses(client, path, times=3) == [200, 200, 200]
    assert "ratelimit" not in client.get(path).headers
    assert limits(client.get("/"))[1] == '"default";r=0;t=60'


def test_exempt_path_is_relative_to_the_root_path():
    """The exempt path /health also applies when the app is served under the root path /api."""
    client = TestClient(starlette(Route("/health", ok), default="1/minute", exempt={"/health"}), root_path="/api")

    assert statuses(client, "/api/health", times=3) == [200, 200, 200]
    assert statuses(client, "/api/other", times=2) == [404, 429]


def scope_of(host):
    client = None if host is None else (host, 50_000)
    return {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "client": client}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("203.0.113.1", "203.0.113.1", True),
        ("203.0.113.1", "203.0.113.2", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("2001:DB8:0:1::1", "2001:db8:0:1::1", True),
        ("::ffff:203.0.113.1", "203.0.113.1", True),
        ("::ffff:203.0.113.1", "::ffff:203.0.113.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        (None, None, True),
        (None, "203.0.113.1", False),
        ("not:an:address", "not:an:address", True),
        ("not:an:address", "another:one", False),
        ("", "", True),
        ("testclient", "203.0.113.1", False),
    ],
)
def test_client_key_is_the_address_or_ipv6_network(one, other, same):
    """An IPv4 address within IPv6 counts as IPv4; another text counts as it is."""
    assert (client_key(scope_of(one)) == client_key(scope_of(other))) is same


def test_request_without_a_client_is_counted():
    """ASGI makes it optional."""
    assert client_key({"type": "http"}) == client_key(scope_of(None))


def test_each_client_has_its_own_quota():
    """A client that has used up its quota does not reduce the quota of another client."""
    app = starlette(default="1/minute")
    first, second = TestClient(app, client=("203.0.113.1", 1)), TestClient(app, client=("203.0.113.2", 1))

    assert statuses(first, times=2) == [200, 429]
    assert statuses(second, times=2) == [200, 429]


def test_x_forwarded_for_does_not_change_the_client():
    """Unless ProxyHeadersMiddleware does."""
    client = TestClient(starlette(default="1/minute"))

    found = [client.get("/", headers={"X-Forwarded-For": f"203.0.113.{number}"}).status_code for number in range(2)]

    assert found == [200, 429]


@pytest.mark.parametrize(
    ("strategy", "windows", "megabytes"), [("fixed-window", 1, 12), ("sliding-window", 2, 24), ("moving-window", 1, 34)]
)
def test_memory_is_bounded(clock, monkeypatch, strategy, windows, megabytes):
    """Below 50 MB, and as the page says.

    The test counts an eighth of the clients, which take an eighth: tables grow in powers of two.
    """
    monkeypatch.setattr(memory, "MAX_CLIENTS", memory.MAX_CLIENTS // 8)
    store, limit = MemoryStore(strategy, clock=clock), Limit("default", 100, 60)
    window = store.window(limit)

    tracemalloc.start()
    for _ in range(windows):
        for number in range(memory.MAX_CLIENTS):
            window.hit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 10, clock.now)
        clock.now += 60
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 8 * most < megabytes * 1_000_000


def test_memory_does_not_grow_with_further_clients(monkeypatch):
    """Memory use hardly grows after MAX_CLIENTS clients, because new clients replace old ones."""
    monkeypatch.setattr(memory, "MAX_CLIENTS", 10_000)
    store, limit = MemoryStore(clock=Clock()), Limit("default", 100, 60)

    tracemalloc.start()
    for number in range(10_000):
        remaining(store, limit, f"10.0.{number >> 8 & 255}.{number & 255}")
    after_as_many_as_are_kept, _ = tracemalloc.get_traced_memory()
    for number in range(10_000):
        remaining(store, limit, f"10.1.{number >> 8 & 255}.{number & 255}")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert after_as_many_as_are_kept < 2_000_000
    assert most < 2_500_000


def test_active_client_stays_counted(monkeypatch, store):
    """A client that does not return is forgotten."""
    monkeypatch.setattr(memory, "MAX_CLIENTS", 10)
    limit = Limit("default", 1000, 60)
    remaining(store, limit, "silent")

    active = []
    for number in range(100):
        active.append(remaining(store, limit, "active"))
        remaining(store, limit, f"passer-by {number}")
    silent = remaining(store, limit, "silent")

    assert active == list(range(999, 899, -1))
    assert silent == 999


def test_number_of_counted_clients_is_bounded(monkeypatch, store):
    """MemoryStore counts at most MAX_CLIENTS clients and forgets the oldest beyond that."""
    monkeypatch.setattr(memory, "MAX_CLIENTS", 10)
    limit = Limit("default", 1000, 60)

    for number in range(100):
        remaining(store, limit, f"passer-by {number}")
    known = sum(remaining(store, limit, f"passer-by {number}") == 998 for number in reversed(range(90, 100)))

    assert 5 <= known <= 10


def limited(limit, **options):
    """Return an app whose one route has its own limit."""
    app = fastapi(**options)

    @app.get("/", dependencies=[Depends(limit)])
    async def endpoint():
        return {"a": 1}

    return app


@pytest.mark.parametrize("default", ["100/minute", None])
def test_dependency_limits_its_route(default):
    """With and without the middleware; in the headers of dict responses and refusals."""
    client = TestClient(limited(RateLimit("2/minute"), default=default))

    first = client.get("/")
    client.get("/")
    refused = client.get("/")

    assert first.json() == {"a": 1}
    assert limits(first)[0].endswith('"route";q=2;w=60')
    assert limits(first)[1].endswith('"route";r=1;t=60')
    assert refused.status_code == 429
    assert limits(refused)[1].endswith('"route";r=0;t=60')
    assert refused.headers["retry-after"] == "60"
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == ["route"]


@pytest.mark.parametrize("default", ["100/minute", None])
def test_second_limit_of_one_name_is_renamed(default, caplog):
    """In headers, problem and log."""
    router = APIRouter(dependencies=[Depends(RateLimit("9/minute"))])

    @router.get("/", dependencies=[Depends(RateLimit("1/hour"))])
    async def endpoint():
        return {}

    app = fastapi(default=default)
    app.include_router(router)
    app.add_middleware(AccessLogMiddleware)
    client = TestClient(app)

    client.get("/")
    with caplog.at_level("INFO", "fastapi_prodkit.access"):
        refused = client.get("/")

    assert limits(refused)[0].endswith('"route";q=9;w=60, "route-1-per-3600s";q=1;w=3600')
    assert limits(refused)[1].endswith('"route";r=7;t=60, "route-1-per-3600s";r=0;t=3600')
    assert refused.json()["violated-policies"] == ["route-1-per-3600s"]
    assert [record.reason for record in caplog.records if record.name == "fastapi_prodkit.access"] == [
        "over the limit route-1-per-3600s (1 in 3600 s)"
    ]


def test_dependency_counts_beside_the_default():
    """One header has both."""
    client = TestClient(limited(RateLimit("2/minute"), default="100/minute"))

    response = client.get("/")

    assert limits(response) == (
        '"default";q=100;w=60, "route";q=2;w=60',
        '"default";r=99;t=60, "route";r=1;t=60',
    )


@pytest.mark.parametrize("default", ["100/minute", None])
def test_dependencies_of_router_and_route_both_count(default):
    """The refusal names the stricter one."""
    app, router = fastapi(default=default), APIRouter(dependencies=[Depends(RateLimit("9/minute", name="router"))])

    @router.get("/", dependencies=[Depends(RateLimit("1/second; 2/minute", name="strict"))])
    async def endpoint():
        return {}

    app.include_router(router, prefix="/v1")
    client = TestClient(app)

    served, refused = client.get("/v1/"), client.get("/v1/")

    assert limits(served)[0].endswith('"router";q=9;w=60, "strict-1-per-1s";q=1;w=1, "strict-2-per-60s";q=2;w=60')
    assert limits(served)[1].endswith('"router";r=8;t=60, "strict-1-per-1s";r=0;t=1, "strict-2-per-60s";r=1;t=60')
    assert refused.json()["violated-policies"] == ["strict-1-per-1s"]
    assert '"router";r=7;t=60' in limits(refused)[1]


def test_dependency_of_a_router_is_shared_by_its_routes():
    """All routes of a router share the limit that the router depends on; other routes do not count against it."""
    app, router = fastapi(), APIRouter(dependencies=[Depends(RateLimit("2/minute"))])
    router.get("/a")(hello)
    router.get("/b/{number}")(hello_number)
    app.include_router(router)
    app.get("/free")(hello)
    client = TestClient(app)

    assert [client.get(path).status_code for path in ("/a", "/b/1", "/b/2", "/a", "/free")] == [200, 200, 429, 429, 200]


def test_one_dependency_on_two_routes_shares_its_quota():
    """Equal limits of different objects do not."""
    app, shared = fastapi(), RateLimit("1/minute")
    app.get("/a", dependencies=[Depends(shared)])(hello)
    app.get("/b", dependencies=[Depends(shared)])(hello)
    app.get("/c", dependencies=[Depends(RateLimit("1/minute"))])(hello)
    client = TestClient(app)

    assert [client.get(path).status_code for path in ("/a", "/b", "/c")] == [200, 429, 200]


def test_one_dependency_counts_a_request_once():
    """A request counts once against a limit, even if both its router and its route depend on that limit."""
    limit = RateLimit("2/minute")
    app, router = fastapi(), APIRouter(dependencies=[Depends(limit)])
    router.get("/", dependencies=[Depends(limit)])(hello)
    app.include_router(router)

    assert statuses(TestClient(app), times=3) == [200, 200, 429]


def test_dependency_adds_headers_to_every_response():
    """With the middleware."""
    app = fastapi()
    limit = [Depends(RateLimit("100/minute"))]
    app.get("/response", dependencies=limit)(lambda: PlainTextResponse("ok"))
    app.get("/stream", dependencies=limit)(lambda: StreamingResponse(iter([b"a"])))
    app.get("/invalid", dependencies=limit)(hello_number)

    @app.get("/missing", dependencies=limit)
    async def missing():
        raise HTTPException(404)

    responses = [TestClient(app).get(path) for path in ("/response", "/stream", "/invalid", "/missing")]

    assert [response.status_code for response in responses] == [200, 200, 422, 404]
    assert [limits(response)[1].split(", ")[1] for response in responses] == [
        f'"route";r={remaining};t=60' for remaining in (99, 98, 97, 96)
    ]


def test_dependency_without_problem_handlers_sends_status_and_headers():
    """Without this package's problem handlers a refusal still has status 429 and the rate limit headers."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(RateLimit("1/minute", name="login"))])(hello)
    client = TestClient(app)

    client.get("/")
    response = client.get("/")

    assert response.status_code == 429
    assert response.headers["retry-after"] == "60"
    assert limits(response) == ('"login";q=1;w=60', '"login";r=0;t=60')


def test_dependency_in_a_mounted_app_has_headers():
    """From the middleware of the outer app."""
    outer, inner = fastapi(), limited(RateLimit("1/minute"), default=None)
    outer.mount("/sub", inner)
    client = TestClient(outer)

    served, refused = client.get("/sub/"), client.get("/sub/")

    assert limits(served)[1] == '"default";r=99;t=60, "route";r=0;t=60'
    assert (refused.status_code, limits(refused)[1]) == (429, '"default";r=98;t=60, "route";r=0;t=60')


@pytest.mark.parametrize("place", ["edge", "state"])
def test_dependency_uses_the_store_of_edge_or_state(place, store, clock):
    """A limit dependency counts in the store that the scope of the edge or `app.state` provides."""
    app = limited(RateLimit("1/minute"))
    if place == "state":
        app.state.rate_limit = store

    async def edge(scope, receive, send):
        if place == "edge":
            scope["fastapi_prodkit"] = {"rate_limit": store}
        await app(scope, receive, send)

    client = TestClient(edge)

    before = statuses(client, times=2)
    clock.now += 60
    after = statuses(client, times=2)

    assert before == after == [200, 429]


def test_dependency_without_a_store_counts_in_memory():
    """The default limit is switched off."""
    app = limited(RateLimit("1/minute"), default=None)

    async def edge(scope, receive, send):
        scope["fastapi_prodkit"] = {}
        await app(scope, receive, send)

    assert statuses(TestClient(edge), times=2) == [200, 429]


def test_websocket_handshake_counts():
    """Over the limit it is refused with the 429 problem."""

    async def endpoint(websocket):
        await websocket.accept()
        await websocket.close()

    client = TestClient(starlette(WebSocketRoute("/ws", endpoint), default="1/minute"))

    with client.websocket_connect("/ws"):
        pass
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
        pass

    assert refused.value.status_code == 429
    assert client.get("/").status_code == 429


@pytest.mark.parametrize("default", ["100/minute", None])
def test_websocket_route_may_depend_on_a_limit(default):
    """A WebSocket handshake above the limit of its route is refused with the 429 problem as its response."""
    app = fastapi(default=default)

    @app.websocket("/ws", dependencies=[Depends(RateLimit("1/minute"))])
    async def endpoint(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    client = TestClient(app)

    with client.websocket_connect("/ws"):
        pass
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
        pass

    assert refused.value.status_code == 429
    assert refused.value.headers["retry-after"] == "60"
    assert refused.value.json()["violated-policies"] == ["route"]


async def test_lifespan_messages_pass_unchanged():
    """RateLimitMiddleware passes scope, receive and send of a lifespan call on unchanged."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    await RateLimitMiddleware(app)({"type": "lifespan"}, 1, 2)

    assert seen == [({"type": "lifespan"}, 1, 2)]


@pytest.mark.parametrize("inner", ["1/minute", "1/minute; 5/hour"])
def test_mounted_app_with_a_limit_shows_both(inner):
    """A refusal names the exceeded one."""
    around = RateLimitMiddleware(starlette(default=inner), RateLimitSettings(default="3/minute"))
    client = TestClient(around)

    served, refused = client.get("/"), client.get("/")

    assert limits(served)[1].startswith('"default";r=2;t=60, "default-1-per-60s";r=0;t=60')
    assert (served.status_code, refused.status_code) == (200, 429)
    assert limits(refused)[1].startswith('"default";r=1;t=60, "default-1-per-60s";r=0;t=60')
    assert refused.json()["violated-policies"] == ["default-1-per-60s"]


def test_two_apps_count_separately():
    """Two apps count requests separately, even if their rate limit settings are equal."""
    first, second = TestClient(starlette(default="1/minute")), TestClient(starlette(default="1/minute"))
    third = TestClient(starlette(default="3/minute"))

    assert statuses(first, times=2) == [200, 429]
    assert statuses(second, times=2) == [200, 429]
    assert statuses(third, times=4) == [200, 200, 200, 429]


def test_equal_limits_in_one_store_are_separate():
    """Two equal limits in one MemoryStore have separate counters."""
    store = MemoryStore()
    first, second = TestClient(starlette(store=store)), TestClient(starlette(store=store))

    assert statuses(first, times=3) == [200, 200, 429]
    assert statuses(second, times=3) == [200, 200, 429]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "größe", "a, b", ""])
def test_name_that_cannot_be_in_a_header_is_refused(name):
    """RateLimit rejects a name with characters that the RateLimit header cannot carry."""
    with pytest.raises(ConfigurationError, match="is not valid in a header"):
        RateLimit("5/minute", name=name)


# Strategies


def admitted(store, limit, key="a", *, cost=1):
    return not refused(store.count([limit], key, cost))


def test_sliding_window_counts_the_overlap_of_the_previous_window(clock):
    """So twice the limit never passes."""
    store, limit = MemoryStore("sliding-window", clock=clock), Limit("default", 10, 100)
    clock.now = 1099.0
    before = [admitted(store, limit) for _ in range(11)]

    clock.now = 1100.0
    at_the_edge = admitted(store, limit)
    clock.now = 1150.0
    half_way = [admitted(store, limit) for _ in range(6)]

    assert before == [True] * 10 + [False]
    assert not at_the_edge
    assert half_way == [True] * 5 + [False]


def test_sliding_window_ignores_older_windows(clock):
    """A sliding window counts only the current and the previous window; older requests have no effect."""
    store, limit = MemoryStore("sliding-window", clock=clock), Limit("default", 2, 100)
    statuses = [admitted(store, limit) for _ in range(3)]

    clock.now += 200

    assert statuses == [True, True, False]
    assert [admitted(store, limit) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
def test_request_after_retry_after_is_served(clock, strategy):
    """A refused client that waits the announced seconds is admitted by every strategy."""
    store, limit = MemoryStore(strategy, clock=clock), Limit("default", 3, 60)
    for offset in (0, 7.3, 19.9):
        clock.now = 1013.4 + offset
        assert admitted(store, limit)

    while not refused(quotas := store.count([limit], "a")):
        pass
    [(_, _, seconds)] = quotas
    clock.now += seconds

    assert admitted(store, limit)


def test_moving_window_counts_each_request_for_the_window(clock):
    """A moving window of 10 seconds never admits more than its 2 requests within any 10 seconds."""
    store, limit = MemoryStore("moving-window", clock=clock), Limit("default", 2, 10)
    passed = []
    for tenth in range(400):
        clock.now = 1000 + tenth / 10
        if admitted(store, limit):
            passed.append(clock.now)

    assert all(later - earlier >= 10 for earlier, later in zip(passed, passed[2:], strict=False))
    assert len(passed) >= 6


@pytest.mark.parametrize("clients", [1, 7, 1000])
def test_moving_window_has_bounded_memory(monkeypatch, clock, clients):
    """A moving window stores at most MAX_HITS request times plus those of one key, for any number of clients."""
    monkeypatch.setattr(memory, "MAX_HITS", 100)
    store, limit = MemoryStore("moving-window", clock=clock), Limit("default", 60, 60)

    for number in range(2000):
        admitted(store, limit, f"client {number % clients}")
        clock.now += 0.01
        recent = store.window(limit)._hits
        remembered = {id(hits): len(hits) for hits in [*recent.new.values(), *recent._old.values()]}
        assert sum(remembered.values()) <= 100 + 60


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
def test_cleared_store_counts_from_zero(clock, strategy):
    """After `MemoryStore.clear()` a client that had used up its quota is admitted again."""
    store, limit = MemoryStore(strategy, clock=clock), Limit("default", 1, 60)
    admitted(store, limit)

    store.clear()

    assert admitted(store, limit)


# Keys and costs


def test_key_function_groups_requests():
    """None: the request is not limited."""

    async def tenant(connection):
        return connection.headers.get("x-tenant")

    client = TestClient(limited(RateLimit("1/minute", key=tenant)))

    def call(**headers):
        return client.get("/", headers=headers).status_code

    assert [call(**{"x-tenant": name}) for name in ("a", "a", "b")] == [200, 429, 200]
    assert [call(), call()] == [200, 200]


@pytest.mark.parametrize(
    ("read", "one", "other"),
    [
        (int, "1", "2"),
        (uuid.UUID, "12345678-1234-5678-1234-567812345678", "12345678-1234-5678-1234-567812345679"),
        (str.encode, "a", "ü"),
        (str.isdigit, "1", "a"),
    ],
)
def test_key_may_be_an_integer_uuid_or_bytes(read, one, other):
    """A key function may return int, UUID, bytes or bool; requests with equal keys share one quota."""
    client = TestClient(limited(RateLimit("1/minute", key=lambda connection: read(connection.query_params["key"]))))

    answers = [client.get("/", params={"key": key}).status_code for key in (one, one, other)]

    assert answers == [200, 429, 200]


@pytest.mark.parametrize("kind", [object, list, float])
def test_key_of_another_type_is_refused(kind):
    """Its text may differ for each request."""
    client = TestClient(limited(RateLimit("1/minute", key=lambda connection: kind())))

    with pytest.raises(ConfigurationError, match=f"of type {kind.__name__}; return a text"):
        client.get("/")


def test_by_header_stores_a_hash():
    """Requests without the header count by address."""
    limit = RateLimit("1/minute", key=by_header("X-API-Key"))
    client = TestClient(limited(limit))

    def call(**headers):
        return client.get("/", headers=headers).status_code

    assert [call(**{"x-api-key": key}) for key in ("secret-a", "secret-a", "secret-b")] == [200, 429, 200]
    assert [call(), call()] == [200, 429]
    sent = HTTPConnection({"type": "http", "headers": [(b"x-api-key", b"secret-a")]})
    assert by_header("X-API-Key")(sent) == hashed("secret-a")


def test_long_key_is_replaced_by_its_hash():
    """So is one with special characters."""
    assert bounded("x" * 64) == "x" * 64
    assert bounded("x" * 65) == hashed("x" * 65)
    assert bounded("ü") == hashed("ü")
    assert bounded("a b\r\n") == hashed("a b\r\n")
    assert Limit("name", 1, 60, owner="a b").id == "a%20b/name/1/60"
    assert len(hashed("\ud800" * 10_000)) == 33


@pytest.mark.parametrize("cost", [3, lambda connection: int(connection.headers["x-cost"])])
def test_cost_counts_several_requests(cost):
    """A request whose cost exceeds the rest is refused, and does not count."""
    client = TestClient(limited(RateLimit("7/minute", cost=cost)))

    responses = [client.get("/", headers={"x-cost": "3"}) for _ in range(3)]

    assert [response.status_code for response in responses] == [200, 200, 429]
    assert "r=1" in responses[1].headers["ratelimit"]


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
@pytest.mark.parametrize("cost", ["-1000", "0"])
def test_negative_cost_of_a_function_counts_as_zero(strategy, cost):
    """A huge one is refused."""
    app = limited(RateLimit("3/minute", cost=lambda connection: int(connection.headers["x-cost"])))
    app.state.rate_limit = MemoryStore(strategy)
    client = TestClient(app)

    statuses = [client.get("/", headers={"x-cost": each}).status_code for each in (cost, "2", cost, str(10**30), "2")]

    assert statuses == [200, 200, 200, 429, 429]


@pytest.mark.parametrize(("cost", "said"), [(-1, "use 0 or more"), (1.5, "type float"), ("1", "type str")])
def test_invalid_cost_is_refused_at_construction(cost, said):
    """RateLimit rejects a negative cost, which would add quota, and any cost that is not an integer."""
    with pytest.raises(ConfigurationError, match=said):
        RateLimit("3/minute", cost=cost)


def test_cost_of_a_function_has_to_be_an_integer():
    """A cost function that returns a float raises ConfigurationError, whose message names the type."""
    client = TestClient(limited(RateLimit("3/minute", cost=lambda connection: 0.5)))

    with pytest.raises(ConfigurationError, match="type float: it has to be an integer"):
        client.get("/")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("GET", "//"),
        ("GET", "/?a=1"),
        ("GET", "/%2e/"),
        ("OPTIONS", "/"),
        ("GET", "/INDEX"),
        ("PUT", "/x/y"),
    ],
)
def test_default_limit_ignores_path_and_method(method, path):
    """The default limit counts all requests of a client together, whatever their method or path."""
    client = TestClient(starlette(default="1/minute"))
    client.get("/")

    assert client.request(method, path).status_code == 429


@pytest.mark.parametrize("default", ["2/minute", "2/minute; 100/hour"])
def test_legacy_headers_are_those_of_slowapi_and_github(default):
    """`legacy_headers=True` adds the X-RateLimit headers that clients of slowapi or GitHub read."""
    settings = RateLimitSettings(default=default, legacy_headers=True)
    app = Starlette(routes=[Route("/", ok)], middleware=[Middleware(RateLimitMiddleware, settings)])

    headers = TestClient(app).get("/").headers

    assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("2", "1")
    assert int(headers["x-ratelimit-reset"]) > 1_700_000_000
    assert "ratelimit" in headers


def test_limit_holds_for_parallel_requests():
    """Of 50 requests sent at once in a new event loop exactly 7 are served under a limit of 7 a minute."""
    app = starlette(default="7/minute")

    async def attack():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return [response.status_code for response in await asyncio.gather(*[client.get("/") for _ in range(50)])]

    assert sorted(asyncio.run(attack())) == [200] * 7 + [429] * 43


def test_middleware_refuses_to_create_a_shared_store():
    """It could not close the connections."""
    settings = RateLimitSettings(storage_url="redis://127.0.0.1:6379")

    with pytest.raises(ConfigurationError, match="store=SharedStore"):
        RateLimitMiddleware(PlainTextResponse("ok"), settings)


# Exempt requests


def test_docs_and_static_files_are_not_counted(tmp_path):
    """One page takes many requests."""
    (tmp_path / "app.js").write_text("1")
    settings = Settings(environment="dev", rate_limit={"default": "2/minute"})
    inner = FastAPI()
    inner.mount("/files", StaticFiles(directory=tmp_path))
    app = create_app(settings)
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.mount("/zipped", GZipMiddleware(StaticFiles(directory=tmp_path)))
    app.mount("/inner", inner)
    app.add_api_route("/statistics", lambda: "counts")
    client = TestClient(app)
    docs = ("/docs", "/docs/oauth2-redirect", "/docs/assets/swagger-ui.css")
    files = ("/static/app.js", "/static/none.js", "/zipped/app.js", "/inner/files/app.js")

    uncounted = [client.get(path) for path in (*docs, *files)]
    statuses = [client.get(path).status_code for path in ("/statistics", "/inner/nothing", "/statistics", *docs)]

    assert [each.status_code for each in uncounted] == [200, 200, 200, 200, 404, 200, 200]
    assert not any("ratelimit" in each.headers for each in uncounted)
    assert statuses == [200, 404, 429, 200, 200, 200]


def test_static_files_at_the_root_are_not_counted(tmp_path):
    """Other routes are."""
    (tmp_path / "index.html").write_text("page")
    app = create_app(Settings(environment="test", rate_limit={"default": "1/minute"}))
    app.add_api_route("/api", lambda: "counts")
    app.mount("/", StaticFiles(directory=tmp_path, html=True))
    client = TestClient(app)

    assert [client.get(path).status_code for path in ("/", "/", "/api", "/api", "/")] == [200, 200, 200, 429, 200]


def test_no_default_limit_keeps_limits_of_routes():
    """The middleware alone requires a limit."""
    app = create_app(Settings(environment="test"))
    app.add_api_route("/", lambda: "ok")
    app.add_api_route("/limited", lambda: "ok", dependencies=[Depends(RateLimit("1/minute"))])
    client = TestClient(app)

    assert {client.get("/").status_code for _ in range(101)} == {200}
    assert [client.get("/limited").status_code for _ in range(2)] == [200, 429]
    with pytest.raises(ConfigurationError, match="RATE_LIMIT_DEFAULT is none"):
        RateLimitMiddleware(PlainTextResponse("ok"), RateLimitSettings(default=None))
