"""A layer inside of another of its class: the request is handled once, with the inner settings."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.app import Layer, LayerStack
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.disconnect import DisconnectMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.metrics import MetricsMiddleware
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.rate_limit import MemoryStore, RateLimitMiddleware
from fastapi_prodkit.request_id import RequestIDMiddleware, current_request_id
from fastapi_prodkit.sections import (
    CorsSettings,
    HeadersSettings,
    HostsSettings,
    LimitsSettings,
    ProxySettings,
    RateLimitSettings,
    RequestIdSettings,
)
from fastapi_prodkit.security_headers import PagePolicyMiddleware, SecurityHeadersMiddleware

OUTER, INNER = "https://outer.example.com", "https://inner.example.com"
SECTIONS = {
    "environment": "prod",
    "hosts": {"allowed": ["testserver"]},
    "cors": {"origins": [OUTER], "allow_credentials": True},
    "metrics": {"public": True},
    "proxy": {"trusted": ["10.0.0.0/8"]},
    "rate_limit": {"default": "1000/minute"},
    "headers": {"csp": "default-src 'self'", "hsts_max_age": 300},
}


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<p>", headers={"Vary": "Accept", "Access-Control-Allow-Origin": "*"})


async def seen(request: Request) -> JSONResponse:
    ids = request.headers.getlist("x-request-id")
    return JSONResponse({"client": request.client.host, "id": current_request_id(), "headers": ids})


async def send_back(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def broken(request: Request):
    raise RuntimeError("nobody handles it")


async def hanging(request: Request):
    await asyncio.Event().wait()


async def slow(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.15)  # longer than the outer deadline of test_deadline_inside_that_is_longer_or_none_wins
    return PlainTextResponse("done")


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(iter(["a", "b"]))


async def socket(websocket):
    await websocket.accept()
    await websocket.send_text(str(current_request_id()))
    await websocket.close()


ROUTES = [
    Route("/page", page),
    Route("/seen", seen),
    Route("/body", send_back, methods=["POST"]),
    Route("/broken", broken),
    Route("/hanging", hanging),
    Route("/slow", slow),
    Route("/stream", stream),
    WebSocketRoute("/socket", socket),
]


class CopiedScope:
    """Middleware of a user that passes on a copy of the scope."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app({**scope}, receive, send)


def add(app, middleware):
    for each in reversed(middleware):
        app.add_middleware(each.cls, *each.args, **each.kwargs)
    app.router.routes.extend(ROUTES)


def mounted(app, middleware):
    sub = FastAPI()
    add(sub, middleware)
    app.mount("/sub", sub)


PLACES = {
    "added": add,
    "mounted": mounted,
    "starlette": lambda app, middleware: app.mount("/sub", Starlette(routes=ROUTES, middleware=middleware)),
    "router": lambda app, middleware: app.router.routes.append(Mount("/sub", routes=ROUTES, middleware=middleware)),
    "behind a deadline": lambda app, middleware: add(app, [Middleware(DeadlineMiddleware), *middleware]),
    "behind a copied scope": lambda app, middleware: add(app, [Middleware(CopiedScope), *middleware]),
    "twice": lambda app, middleware: add(app, [*middleware, *middleware]),
}


@pytest.fixture(params=PLACES)
def inside(request, capsys):
    """Return a client of an app of create_app that serves ROUTES inside of these layers."""

    def client(*middleware, url="https://testserver", host="10.0.0.1", **sections):
        app = create_app(Settings(**{**SECTIONS, **sections}))
        PLACES[request.param](app, list(middleware))
        prefix = "/sub" if any(getattr(route, "path", "") == "/sub" for route in app.router.routes) else ""
        capsys.readouterr()
        return TestClient(app, base_url=url + prefix, raise_server_exceptions=False, client=(host, 1))

    return client


def lines(capsys) -> list[dict]:
    """Return the log lines of the service, without those of the test client."""
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in written if line["logger"].startswith("fastapi_prodkit")]


def connect(client, **options):
    """Open the socket of ROUTES; a TestClient ignores the path of its base URL for sockets."""
    return client.websocket_connect(f"{client.base_url.path}socket", **options)


def measured(registry=REGISTRY) -> float:
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "http_server_request_duration_seconds_count"
    )


def assert_no_header_twice(response: httpx.Response) -> None:
    counts = Counter(name.lower() for name, _ in response.headers.raw)
    assert [name for name, count in counts.items() if count > 1] == []


EVERY_LAYER = [
    Middleware(ProxyHeadersMiddleware, ProxySettings(trusted=["10.0.0.0/8"])),
    Middleware(RequestIDMiddleware),
    Middleware(AccessLogMiddleware),
    Middleware(ErrorBoundaryMiddleware),
    Middleware(MetricsMiddleware),
    Middleware(PagePolicyMiddleware),
    Middleware(SecurityHeadersMiddleware, HeadersSettings(csp="img-src 'self'")),
    Middleware(CORSMiddleware, CorsSettings(origins=[OUTER])),
    Middleware(AllowedHostsMiddleware, HostsSettings(allowed=["testserver"])),
    Middleware(ConcurrencyLimitMiddleware, LimitsSettings(max_concurrent=5), registry=CollectorRegistry()),
    Middleware(RateLimitMiddleware),
    Middleware(DisconnectMiddleware, LimitsSettings(cancel_on_disconnect=True)),
    Middleware(DeadlineMiddleware),
    Middleware(BodyLimitMiddleware),
]


@pytest.mark.parametrize(
    ("path", "status"), [("/page", 200), ("/seen", 200), ("/stream", 200), ("/broken", 500), ("/nowhere", 404)]
)
def test_second_set_of_layers_changes_nothing(inside, capsys, path, status):
    """No repeated header, one id, line, measurement, and record of an exception."""
    client, before = inside(*EVERY_LAYER), measured()

    response = client.get(path, headers={"Origin": OUTER})

    written = lines(capsys)
    assert response.status_code == status
    assert_no_header_twice(response)
    assert response.headers["access-control-allow-origin"] == OUTER
    assert [line["http_status"] for line in written if line["event"] == "request"] == [status]
    assert sum("exception" in line for line in written) == (status == 500)
    assert {line["request_id"] for line in written} == {response.headers["x-request-id"]}
    assert measured() - before == 1


def test_second_set_of_layers_around_a_websocket_changes_nothing(inside, capsys):
    """A WebSocket behind two sets of layers has one request id, no duplicate header and one access line."""
    with connect(inside(*EVERY_LAYER)) as session:
        request_id = session.receive_text()

    assert dict(session.extra_headers)[b"x-request-id"] == request_id.encode()
    assert len(session.extra_headers) == len(dict(session.extra_headers))
    assert [line["request_id"] for line in lines(capsys) if line["event"] == "request"] == [request_id]


@pytest.mark.parametrize(
    "given",
    [
        {"csp": "img-src 'self'", "frame_options": ""},
        {"settings": HeadersSettings(csp="img-src 'self'", frame_options="")},
        {"settings": HeadersSettings(csp="overridden", frame_options=""), "csp": "img-src 'self'"},
    ],
    ids=["keywords", "settings", "both"],
)
def test_security_headers_of_given_inner_settings_win(inside, given):
    """An empty one too; the outer setting otherwise."""
    client = inside(Middleware(SecurityHeadersMiddleware, **given))

    headers = client.get("/page").headers

    assert headers.get_list("content-security-policy") == ["img-src 'self'"]
    assert "x-frame-options" not in headers
    assert headers["strict-transport-security"] == "max-age=300; includeSubDomains"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_security_headers_by_inner_path_are_relative_to_the_inner_app(inside):
    """A policy by path of an inner layer applies to paths relative to the inner app only."""
    client = inside(Middleware(SecurityHeadersMiddleware, policies={"/page": "img-src 'self'"}))

    policies = [client.get(path).headers.get_list("content-security-policy") for path in ("/page", "/seen")]

    assert policies == [["img-src 'self'"], ["default-src 'self'"]]


def test_cors_inner_policy_replaces_the_outer(inside):
    """The outer CORS policy grants nothing behind an inner one: neither its origins nor its credentials."""
    client = inside(Middleware(CORSMiddleware, CorsSettings(origins=[INNER])))

    inner, outer = (client.get("/page", headers={"Origin": origin}).headers for origin in (INNER, OUTER))

    assert inner["access-control-allow-origin"] == INNER
    assert not [name for name in outer if name.startswith("access-control-allow-")]
    assert "access-control-allow-credentials" not in inner
    assert inner.get_list("vary") == outer.get_list("vary") == ["Accept, Origin"]


def test_cors_inner_policy_behind_a_wildcard_varies(inside):
    """A response to an inner CORS origin has `Vary: Origin`, although the outer policy allows any origin."""
    client = inside(Middleware(CORSMiddleware, CorsSettings(origins=[INNER])), cors={"origins": ["*"]})

    headers = client.get("/page", headers={"Origin": INNER}).headers

    assert (headers["access-control-allow-origin"], headers["vary"]) == (INNER, "Accept, Origin")


def test_cors_handshake_must_pass_both_policies(inside):
    """A WebSocket handshake is refused if only the inner or only the outer CORS policy allows its origin."""
    client = inside(Middleware(CORSMiddleware, CorsSettings(origins=[INNER])))

    for origin in (INNER, OUTER):
        with pytest.raises(WebSocketDenialResponse), connect(client, headers={"Origin": origin}):
            pass


def test_request_id_is_the_same_in_both_headers(inside):
    """Both are in the request of the app."""
    client = inside(Middleware(RequestIDMiddleware, RequestIdSettings(header="X-Inner-ID"), generator=lambda: "unused"))

    response = client.get("/seen", headers={"X-Inner-ID": "from-the-client"})

    chosen = response.headers["x-request-id"]
    assert response.headers["x-inner-id"] == chosen
    assert response.json() == {"client": "10.0.0.1", "id": chosen, "headers": [chosen]}


def test_proxy_headers_are_read_once(inside):
    """A client that is in the list is not taken for a second proxy."""
    client = inside(Middleware(ProxyHeadersMiddleware, ProxySettings(trusted=["10.0.0.0/8", "203.0.113.0/24"])))

    answer = client.get("/seen", headers={"X-Forwarded-For": "198.51.100.66, 203.0.113.7"}).json()

    assert answer["client"] == "203.0.113.7"


def test_metrics_of_two_registries_measure_once_each(inside):
    """A request through two metrics layers with different registries is counted once in each registry."""
    registry = CollectorRegistry()
    client, before = inside(Middleware(MetricsMiddleware, registry=registry)), measured()

    client.get("/page")

    assert (measured(registry), measured() - before) == (1, 1)


def test_allowed_hosts_must_be_in_both_lists(inside):
    """A request for a host that only the outer list allows gets a 400 response."""
    client = inside(Middleware(AllowedHostsMiddleware, HostsSettings(allowed=["admin.example.com"])))

    response = client.get("/page")

    assert response.status_code == 400
    assert_no_header_twice(response)


def test_rate_limit_inside_is_an_additional_limit(inside):
    """The headers name both."""
    client = inside(Middleware(RateLimitMiddleware, RateLimitSettings(default="1/minute")))

    response, refused = client.get("/page"), client.get("/page")

    policy = response.headers.get_list("ratelimit-policy")[0]
    assert policy.startswith('"default";q=1000;w=60, "default-1-per-60s";q=1;w=60')
    assert refused.status_code == 429
    assert refused.json()["violated-policies"] == ["default-1-per-60s"]
    assert_no_header_twice(response)
    assert_no_header_twice(refused)


def test_rate_limit_in_the_same_store_counts_once(inside):
    """Two rate limits with one store count a request once, and the response has one RateLimit header."""
    store = MemoryStore()
    client = inside(*[Middleware(RateLimitMiddleware, store=store)] * 2, rate_limit=None)

    headers = client.get("/page").headers

    assert headers["ratelimit"].startswith('"default";r=99;')
    assert "," not in headers["ratelimit"]


def test_deadline_inside_that_is_shorter_wins(inside):
    """There is one answer."""
    client = inside(Middleware(DeadlineMiddleware, LimitsSettings(request_timeout=0.05)))

    response = client.get("/hanging")

    assert response.status_code == 504
    assert_no_header_twice(response)


@pytest.mark.parametrize("seconds", [60, None])
def test_deadline_inside_that_is_longer_or_none_wins(inside, seconds):
    """A longer or absent inner deadline replaces the outer one, which would have cancelled the request."""
    inner = Middleware(DeadlineMiddleware, LimitsSettings(request_timeout=seconds))
    client = inside(inner, limits={"request_timeout": 0.05})

    assert client.get("/slow").status_code == 200


@pytest.mark.parametrize(("outer", "inner"), [(20, 10), (10, 20), (10, 10), (10, None), (None, 10)])
@pytest.mark.parametrize("sent", [bytes, lambda body: iter([body])])
def test_body_limit_that_is_smaller_wins(inside, outer, inner, sent):
    """For announced and chunked bodies; the refusal is one problem."""
    layer = Middleware(BodyLimitMiddleware, LimitsSettings(max_body_size=inner))
    client = inside(layer, limits={"max_body_size": outer})

    small, large = (client.post("/body", content=sent(b"x" * size)) for size in (10, 11))

    assert (small.status_code, large.status_code) == (200, 413)
    assert large.headers["content-type"] == "application/problem+json"
    assert_no_header_twice(large)


def test_concurrency_limit_inside_uses_a_slot_of_both(inside):
    """Both are released."""
    limit = Middleware(ConcurrencyLimitMiddleware, LimitsSettings(max_concurrent=2), registry=CollectorRegistry())
    client = inside(limit, limits={"max_concurrent": 1})

    assert [client.get("/page").status_code for _ in range(3)] == [200] * 3


class Counted(Layer):
    """Count calls of `inside`, and of `on_request`."""

    may_answer = False

    def __init__(self, app=None):
        self.app = app
        self.asked = self.worked = 0

    def inside(self, outer):
        self.asked += 1
        return self

    def on_request(self, exchange):
        self.worked += 1


@pytest.mark.parametrize("root_path", ["", "/sub"])
def test_inside_is_called_once_not_per_request(root_path):
    """A stack calls `inside` of a layer at the first request only, whether or not the root path changes."""

    async def mount(scope, receive, send):
        scope["root_path"] = root_path
        await counted(scope, receive, send)

    counted = Counted(PlainTextResponse("ok"))
    client = TestClient(LayerStack([RequestIDMiddleware(mount)], mount))

    for _ in range(3):
        client.get("/")

    assert (counted.asked, counted.worked) == (1, 3)


def test_lifespan_passes_the_layers_at_each_start():
    """A stack of layers passes every lifespan to the app, although its layers handle requests only."""
    starts = []

    @asynccontextmanager
    async def lifespan(_):
        starts.append("start")
        yield

    stack = LayerStack([RequestIDMiddleware(None)], FastAPI(lifespan=lifespan))
    for _ in range(2):
        with TestClient(stack):
            pass

    assert starts == ["start", "start"]


def test_inner_exchange_keeps_the_headers_of_the_app():
    """Only the outermost exchange adds response headers."""
    app = create_app(Settings(**SECTIONS))
    add(app, [Middleware(DeadlineMiddleware)])

    headers = TestClient(app).get("/page", headers={"Origin": OUTER}).headers

    assert headers.get_list("vary") == ["Accept, Origin"]


@pytest.mark.parametrize("place", ["added", "mounted"])
def test_hook_added_later_is_called_for_combined_layers(place):
    """A draining app closes keep-alive connections even if its layers were combined by an earlier request."""
    app = create_app(Settings(**SECTIONS))
    PLACES[place](app, [Middleware(RequestIDMiddleware)])
    path = "/page" if place == "added" else "/sub/page"

    with TestClient(app) as client:
        before = client.get(path).headers
        app.state.shutdown.drain()
        after = client.get(path).headers

    assert "connection" not in before
    assert after.get_list("connection") == ["close"]


@pytest.mark.parametrize("exempt", ["/health", ["/health/"], {"health"}, [""]])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (AccessLogMiddleware, {}),
        (AllowedHostsMiddleware, {"allowed": "*"}),
        (ConcurrencyLimitMiddleware, {"max_concurrent": 1}),
        (DeadlineMiddleware, {}),
        (DisconnectMiddleware, {}),
        (MetricsMiddleware, {}),
        (RateLimitMiddleware, {}),
    ],
)
def test_exempt_paths_are_checked(layer, options, exempt):
    """A string would be a set of letters."""
    with pytest.raises(ConfigurationError, match="write a set of paths with a slash first and none at the end"):
        layer(page, exempt=exempt, **options)


def test_root_may_be_exempt():
    """The exempt path `/` is accepted although it ends with a slash, and requests to it skip the host check."""
    app = Starlette(
        routes=[Route("/", page)], middleware=[Middleware(AllowedHostsMiddleware, allowed="a", exempt=["/"])]
    )

    assert TestClient(app).get("/").status_code == 200


def test_stack_calls_layers_for_their_scope_types_only():
    """The stack calls a layer only for scope types that it handles, and passes the lifespan to the app."""
    started = []

    @asynccontextmanager
    async def lifespan(app):
        started.append(app)
        yield

    async def talk(websocket):
        await websocket.accept()
        await websocket.send_text(current_request_id())
        await websocket.close()

    app = Starlette(routes=[Route("/", page), WebSocketRoute("/talk", talk)], lifespan=lifespan)
    measuring = MetricsMiddleware(app, registry=CollectorRegistry())
    mixed, alone = LayerStack([RequestIDMiddleware(app), measuring], app), LayerStack([measuring], app)

    for stack, count in ((mixed, 2), (alone, 0)):
        with TestClient(stack) as client:
            assert client.get("/").status_code == 200
            for _ in range(count):
                with client.websocket_connect("/talk", headers={"X-Request-ID": "abcdefgh"}) as connection:
                    assert connection.receive_text() == "abcdefgh"
    assert started == [app, app]
