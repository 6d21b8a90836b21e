"""CORS: exact origins, and one Vary line."""

import pytest
from fastapi import FastAPI
from httpx2 import Headers
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from wire import connection, read_response, request, serving

from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.metrics import MetricsMiddleware
from fastapi_prodkit.sections import CorsSettings

APP = "https://app.example.com"
LISTED = CorsSettings(origins=(APP, "http://localhost:3000"))
VERCEL = CorsSettings(vercel_project="shop", vercel_team="acme")


def client(settings=None, *, headers=None):
    def respond(request):
        return PlainTextResponse("ok", headers=headers)

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    routes = [Route("/", respond, methods=["GET", "OPTIONS"]), WebSocketRoute("/ws", echo)]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(CORSMiddleware, settings)]))


def preflight(app, origin, **headers):
    return app.options("/", headers={"Origin": origin, "Access-Control-Request-Method": "PUT", **headers})


def policy(response):
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


async def exchange(app, *headers, method="GET"):
    """Send headers, as no client library would; return the messages of the answer."""
    sent = []
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": method, "path": "/", "headers": list(headers)}

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"ok"})


# Responses


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_listed_origin_may_read_the_response(origin):
    """Including the headers that this library sends."""
    response = client(LISTED).get("/", headers={"Origin": origin})

    assert policy(response) == {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": "X-Request-ID, RateLimit, RateLimit-Policy, Retry-After",
    }
    assert response.headers.get_list("vary") == ["Origin"]


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://evil.example",
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://app.example.com.evil.org",
        "https://evilapp.example.com",
        "https://app.example.com/",
        "https://app.example.com, https://evil.example",
        "HTTPS://APP.EXAMPLE.COM",
    ],
)
def test_other_origin_gets_no_access_control_header(origin):
    """Vary has Origin, for caches."""
    response = client(LISTED).get("/", headers={"Origin": origin})

    assert response.status_code == 200
    assert policy(response) == {}
    assert response.headers.get_list("vary") == ["Origin"]


def test_response_without_origin_varies():
    """A cache may use it for a request with an origin."""
    response = client(LISTED).get("/")

    assert policy(response) == {}
    assert response.headers.get_list("vary") == ["Origin"]


def test_credentials_are_allowed_with_the_exact_origin():
    """Never with `*`."""
    settings = CorsSettings(origins=(APP,), allow_credentials=True)

    response = client(settings).get("/", headers={"Origin": APP})

    assert response.headers["access-control-allow-origin"] == APP
    assert response.headers["access-control-allow-credentials"] == "true"
    assert preflight(client(settings), APP).headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize("origin", [None, "null", "https://anybody.example"])
def test_wildcard_response_does_not_vary(origin):
    """With `*`, every origin gets an identical response, so the response has no Vary header."""
    response = client(CorsSettings(origins=("*",))).get("/", headers={"Origin": origin} if origin else {})

    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers
    assert "vary" not in response.headers


@pytest.mark.parametrize("field", ["origins", "allow_methods", "allow_headers", "expose_headers"])
def test_wildcard_with_credentials_fails_at_construction(field):
    """Browsers ignore `*` in requests with credentials."""
    settings = CorsSettings(**{"origins": (APP,), "allow_credentials": True, field: ("*",)})

    with pytest.raises(ConfigurationError, match=rf"CORS_{field.upper()}: browsers refuse `\*`"):
        CORSMiddleware(ok, settings)


def test_middleware_without_origins_allows_none():
    """Responses do not vary."""
    app = client()

    response = app.get("/", headers={"Origin": APP})

    assert policy(response) == {}
    assert "vary" not in response.headers
    assert preflight(app, APP).status_code == 403


def test_access_control_headers_of_the_app_are_removed():
    """Access-Control headers set by the app are removed, so that only one policy is sent."""
    own = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true", "X-Own": "1"}

    allowed = client(LISTED, headers=own).get("/", headers={"Origin": APP})
    foreign = client(LISTED, headers=own).get("/", headers={"Origin": "https://evil.example"})
    nobody = client(headers=own).get("/", headers={"Origin": APP})

    assert allowed.headers.get_list("access-control-allow-origin") == [APP]
    assert "access-control-allow-credentials" not in allowed.headers
    assert allowed.headers["x-own"] == "1"
    assert policy(foreign) == {}
    assert policy(nobody) == {}


@pytest.mark.parametrize(
    ("lines", "merged"),
    [
        ([b"Accept-Encoding"], b"Accept-Encoding, Origin"),
        ([b"accept, Accept-Language", b"cookie"], b"accept, Accept-Language, cookie, Origin"),
        ([b"Origin"], b"Origin"),
        ([b"accept,ORIGIN", b"origin"], b"accept, Origin"),
        ([b"*"], b"*, Origin"),
        ([b""], b"Origin"),
        ([b", ,"], b"Origin"),
        ([b"\xff"], b"\xff, Origin"),
    ],
)
async def test_vary_of_the_app_is_merged_with_ours(lines, merged):
    """The Vary values of the app and of the middleware become one header without duplicates."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Vary", line) for line in lines]})
        await send({"type": "http.response.body"})

    start, _ = await exchange(CORSMiddleware(app, LISTED))

    assert [value for name, value in start["headers"] if name.lower() == b"vary"] == [merged]


def test_vary_of_the_app_stays_if_ours_is_empty():
    """With `*`, the middleware adds no Vary value, and the Vary header of the app is unchanged."""
    public = client(CorsSettings(origins=("*",)), headers={"Vary": "Accept", "Access-Control-Max-Age": "1"})
    removed = client(CorsSettings(origins=("*",)), headers={"Access-Control-Max-Age": "1"})

    assert public.get("/").headers.get_list("vary") == ["Accept"]
    assert "vary" not in removed.get("/").headers


async def test_messages_of_the_app_are_not_modified():
    """An app may send the same message again."""
    constant = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}

    async def app(scope, receive, send):
        await send(constant)
        await send({"type": "http.response.body"})

    wrapped = CORSMiddleware(app, LISTED)
    first, _ = await exchange(wrapped, (b"origin", APP.encode()))
    second, _ = await exchange(wrapped)

    assert b"access-control-allow-origin" in dict(first["headers"])
    assert b"access-control-allow-origin" not in dict(second["headers"])
    assert constant == {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}


# Patterns


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://a.example.com", True),
        ("https://b.example.com", True),
        ("https://a.example.com.evil.org", False),
        ("https://evil.org/https://a.example.com", False),
        ("xhttps://a.example.com", False),
        ("https://a.example.com\n", False),
        ("null", False),
    ],
)
async def test_regex_matches_the_whole_origin(origin, allowed):
    """An origin is allowed only if the regular expression matches all of it, not a part."""
    app = CORSMiddleware(ok, CorsSettings(origin_regex=r"https://(a|b)\.example\.com"))

    [start, _] = await exchange(app, (b"origin", origin.encode()))

    assert (b"access-control-allow-origin", origin.encode()) in start["headers"] or not allowed
    assert allowed or b"access-control-allow-origin" not in dict(start["headers"])


@pytest.mark.parametrize(
    "origin",
    [
        b"null",
        b"",
        b" ",
        b",",
        b",,,",
        b"https://",
        b"https://a\r\nSet-Cookie: b",
        b"https://a\nb",
        b"https://a\x00",
        b"https://user@a",
        b"https://a/path",
        b"https://a?b",
        b"https://a#b",
        b"https://a, https://b",
        b"https://caf\xc3\xa9",
        b"\xff\xfe",
        b"https://" + b"a" * 100_000,
    ],
)
async def test_invalid_origin_is_never_reflected(origin):
    """However wide the regular expression."""
    app = CORSMiddleware(ok, CorsSettings(origin_regex=r"(?s).*"))

    [start, _] = await exchange(app, (b"origin", origin))

    assert start["headers"] == [(b"vary", b"Origin")]


@pytest.mark.parametrize(
    "origin",
    ["https://shop-a1b2c3d4e-acme.vercel.app", "https://shop-0-acme.vercel.app"],
)
def test_vercel_deployment_of_the_team_is_allowed(origin):
    """An origin of a Vercel deployment is allowed if its project and team are the configured ones."""
    response = client(VERCEL).get("/", headers={"Origin": origin})

    assert response.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop-a1b2c3d4e-evil-acme.vercel.app",
        "https://shop-git-main-acme.vercel.app",
        "https://shop-git-main-evil-acme.vercel.app",
        "https://my-shop-a1b2c3d4e-acme.vercel.app",
        "https://shop-a1b2c3d4e-acme2.vercel.app",
        "https://shop--acme.vercel.app",
        "https://shop-A1-acme.vercel.app",
        "https://shop.vercel.app",
        "https://shop-acme.vercel.app",
        "https://shop-a1b2c3d4e-acme.vercel.app.evil.org",
        "https://shop-a1b2c3d4e-acmeXvercel.app",
        "https://shop-a1b2c3d4e-acme.vercel.app:8443",
        "http://shop-a1b2c3d4e-acme.vercel.app",
    ],
)
def test_other_vercel_deployment_is_refused(origin):
    """Other projects, other teams (one named `evil-acme` too) and hosts of branches."""
    response = client(VERCEL).get("/", headers={"Origin": origin})

    assert policy(response) == {}


# Preflights


def test_preflight_is_answered_without_the_app():
    """A preflight from an allowed origin gets a 204 with the allowed methods and headers."""
    response = preflight(client(LISTED), APP, **{"Access-Control-Request-Headers": "authorization"})

    assert response.status_code == 204
    assert response.content == b""
    assert dict(response.headers) == {
        "access-control-allow-origin": APP,
        "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE",
        "access-control-allow-headers": "Authorization, Content-Type, X-Request-ID",
        "access-control-max-age": "600",
        "vary": "Access-Control-Request-Method, Access-Control-Request-Headers, Origin",
    }


def test_preflight_states_methods_headers_and_max_age():
    """An empty list leaves its header out."""
    settings = CorsSettings(origins=(APP,), allow_methods=("PUT",), allow_headers=(), expose_headers=(), max_age=0)

    response = preflight(client(settings), APP)

    assert policy(response) == {
        "access-control-allow-origin": APP,
        "access-control-allow-methods": "PUT",
        "access-control-max-age": "0",
    }
    assert policy(client(settings).get("/", headers={"Origin": APP})) == {"access-control-allow-origin": APP}


def test_wildcard_answers_every_preflight():
    """With `*`, a preflight from any origin gets a 204."""
    response = preflight(client(CorsSettings(origins=("*",))), "https://anybody.example")

    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", ""])
def test_preflight_of_another_origin_is_a_403_problem(origin):
    """Without any Access-Control header."""
    response = preflight(client(LISTED), origin)

    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"] == "Requests from this origin are not allowed."
    assert policy(response) == {}
    assert response.headers["vary"] == "Origin"


def request_headers(names):
    return {"Access-Control-Request-Headers": names}


METHOD = "Access-Control-Request-Method: {!r} is not one of CORS_ALLOW_METHODS"
HEADERS = "Access-Control-Request-Headers: {!r} is not in CORS_ALLOW_HEADERS"
WILD = CorsSettings(origins=("*",), allow_methods=("*",), allow_headers=("*",))


@pytest.mark.parametrize(
    ("settings", "headers", "code", "reason"),
    [
        (LISTED, {"Access-Control-Request-Method": "TRACE"}, "method", METHOD.format("TRACE")),
        (LISTED, {"Access-Control-Request-Method": "patch"}, "method", METHOD.format("patch")),
        (LISTED, {"Access-Control-Request-Method": ""}, "method", METHOD.format("")),
        (LISTED, {"Access-Control-Request-Method": "\x1bX" * 999}, "method", METHOD.format("\x1bX" * 150)),
        (LISTED, request_headers("x-bad"), "header", HEADERS.format("x-bad")),
        (LISTED, request_headers("x-bad, content-type,, X-Worse"), "header", HEADERS.format("x-bad, x-worse")),
        (LISTED, request_headers("x," * 999), "header", HEADERS.format("x, " * 100)),
        (WILD, request_headers("x-any, authorization"), "header", HEADERS.format("authorization")),
        (
            LISTED,
            {"Access-Control-Request-Private-Network": "true"},
            "private_network",
            "Access-Control-Request-Private-Network: 'true' is never allowed",
        ),
    ],
)
def test_preflight_for_another_method_or_header_is_a_403_problem(settings, headers, code, reason, caplog):
    """The log names the method or header."""
    registry = CollectorRegistry()
    app = FastAPI()
    app.add_middleware(CORSMiddleware, settings)
    app.add_middleware(MetricsMiddleware, registry=registry)
    app.add_middleware(AccessLogMiddleware)

    with caplog.at_level("INFO"):
        response = preflight(TestClient(app), APP, **headers)

    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"
    assert policy(response) == {}
    [record] = (each for each in caplog.records if each.name == "fastapi_prodkit.access")
    assert (record.levelname, record.reason) == ("WARNING", reason)
    assert registry.get_sample_value("http_server_refusals_total", {"reason": f"cors_{code}_not_allowed"}) == 1


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        *((CorsSettings(origins=(APP,), allow_methods=()), {"Access-Control-Request-Method": method})
          for method in ("GET", "HEAD", "POST")),
        (LISTED, request_headers("")),
        (LISTED, request_headers("AUTHORIZATION ,content-type")),
        (LISTED, {"Access-Control-Request-Private-Network": "false"}),
        (WILD, {"Access-Control-Request-Method": "PURGE", **request_headers("x-any")}),
    ],
)  # fmt: skip
def test_preflight_allows_simple_methods_and_any_case_of_headers(settings, headers):
    """By the Fetch standard."""
    assert preflight(client(settings), APP, **headers).status_code == 204


@pytest.mark.parametrize("lines", [(APP, APP), (APP, "https://evil.example"), ("https://evil.example", APP)])
def test_several_origin_lines_are_no_allowed_origin(lines):
    """They are a list (RFC 9110 section 5.3)."""
    origins = [f"Origin: {line}" for line in lines]
    requests = [
        request("GET", "/", *origins),
        request("OPTIONS", "/", *origins, "Access-Control-Request-Method: PUT"),
    ]

    with serving(client(LISTED).app) as port, connection(port) as peer:
        answers = []
        for each in requests:
            peer.sendall(each)
            answers.append(read_response(peer).lower())

    assert [answer[9:12] for answer in answers] == [b"200", b"403"]
    assert not any(b"access-control-" in answer for answer in answers)
    assert all(b"vary: origin" in answer for answer in answers)


@pytest.mark.parametrize("headers", [{"Origin": APP}, {"Access-Control-Request-Method": "PUT"}, {}])
def test_options_without_preflight_headers_reaches_the_app(headers):
    """An OPTIONS request without both preflight headers is no preflight and reaches the app."""
    response = client(LISTED).options("/", headers=headers)

    assert response.text == "ok"


# WebSockets


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("ws://testserver/ws", {}),
        ("ws://testserver/ws", {"Origin": APP}),
        ("ws://testserver/ws", {"Origin": "http://testserver"}),
        ("wss://testserver/ws", {"Origin": "https://testserver"}),
        ("ws://testserver:8000/ws", {"Origin": "http://testserver:8000"}),
        ("wss://testserver/ws", {"Origin": "https://testserver", "Host": "TestServer:443"}),
        ("ws://testserver/ws", {"Origin": "http://[::1]", "Host": "[::1]:80"}),
    ],
)
def test_websocket_of_an_allowed_origin_passes(url, headers):
    """Or of the same host, or without an origin."""
    with client(LISTED).websocket_connect(url, headers=headers) as session:
        session.send_text("hello")

        assert session.receive_text() == "hello"


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("ws://testserver/ws", {"Origin": "https://evil.example"}),
        ("ws://testserver/ws", {"Origin": "null"}),
        ("ws://testserver/ws", {"Origin": ""}),
        ("ws://testserver/ws", {"Origin": "https://testserver"}),
        ("wss://testserver/ws", {"Origin": "http://testserver"}),
        ("ws://testserver/ws", {"Origin": "http://testserver:8000"}),
        ("ws://testserver/ws", {"Origin": "http://testserver.evil.org"}),
    ],
)
@pytest.mark.parametrize("settings", [None, LISTED], ids=["nobody", "listed"])
def test_websocket_of_another_origin_is_refused(settings, url, headers):
    """Browsers would send it with the user's cookies."""
    with pytest.raises(WebSocketDenialResponse) as refused, client(settings).websocket_connect(url, headers=headers):
        pass

    assert refused.value.status_code == 403
    assert refused.value.headers["content-type"] == "application/problem+json"


def test_websocket_with_two_origins_is_refused():
    """Even if both are the host's own; some servers let them pass."""
    own = Headers([("Origin", "http://testserver")] * 2)

    with pytest.raises(WebSocketDenialResponse) as refused, client(LISTED).websocket_connect("/ws", headers=own):
        pass

    assert refused.value.status_code == 403


def test_wildcard_allows_websockets_without_cookies():
    """Because `*` excludes credentials."""
    app = client(CorsSettings(origins=("*",)))
    anybody = {"Origin": "https://anybody.example"}

    with app.websocket_connect("/ws", headers=anybody) as session:
        session.send_text("hello")
        assert session.receive_text() == "hello"

    with (
        pytest.raises(WebSocketDenialResponse),
        app.websocket_connect("/ws", headers={**anybody, "Cookie": "session=1"}),
    ):
        pass


async def test_refused_websocket_is_closed_on_an_older_server():
    """A server without the denial extension; clients see 403."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [(b"origin", b"https://evil.example")]}
    await CORSMiddleware(ok, LISTED)(scope, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


def test_websocket_disconnect_passes_unchanged():
    """When a WebSocket client disconnects, the app receives the close code of the client."""
    seen = []

    async def listen(websocket):
        await websocket.accept()
        with pytest.raises(WebSocketDisconnect) as left:
            await websocket.receive_text()
        seen.append(left.value.code)

    app = CORSMiddleware(Starlette(routes=[WebSocketRoute("/", listen)]), LISTED)

    with TestClient(app).websocket_connect("/") as session:
        session.close(1001)

    assert seen == [1001]


# The rest of ASGI


async def test_stream_passes_chunk_by_chunk():
    """The middleware passes each chunk of a streamed response on separately, after one start message."""

    async def chunks():
        yield b"a"
        yield b"b"

    sent = await exchange(CORSMiddleware(StreamingResponse(chunks()), LISTED))

    assert [message.get("body") for message in sent] == [None, b"a", b"b", b""]


def test_exception_of_the_app_passes_unchanged():
    """An exception that the app raises passes through the middleware unchanged."""

    def fail(request):
        raise RuntimeError("boom")

    app = CORSMiddleware(Starlette(routes=[Route("/", fail)]), LISTED)

    with pytest.raises(RuntimeError, match="boom"):
        TestClient(app).get("/", headers={"Origin": APP})


def test_500_has_the_cors_headers():
    """If the middleware is around the whole app."""

    def fail(request):
        raise RuntimeError("boom")

    app = CORSMiddleware(Starlette(routes=[Route("/", fail)]), LISTED)

    response = TestClient(app, raise_server_exceptions=False).get("/", headers={"Origin": APP})

    assert response.status_code == 500
    assert response.headers["access-control-allow-origin"] == APP


def test_lifespan_passes_unchanged():
    """The middleware passes the lifespan on, so that the app starts, serves and shuts down."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware)

    with TestClient(app) as running:
        assert running.get("/openapi.json").status_code == 200


def test_two_apps_have_separate_origins():
    """Two apps in one process each allow only the origins that they were configured with."""
    one, other = client(LISTED), client(CorsSettings(origins=("https://other.example.com",)))

    assert policy(one.get("/", headers={"Origin": APP}))
    assert not policy(other.get("/", headers={"Origin": APP}))


# Settings


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "app.example.com",
        "https://app.example.com/",
        "https://App.example.com",
        "https://*.example.com",
        "https://app.example.com:443",
        "http://app.example.com:80",
        "https://user@app.example.com",
        "https://app.example.com\n",
        "https://café.example.com",
    ],
)
def test_origin_that_never_matches_is_refused(origin):
    """As a setting."""
    with pytest.raises(ValidationError, match="origin"):
        CorsSettings(origins=(origin,))


@pytest.mark.parametrize(
    "origin", ["https://app.example.com:8443", "http://localhost:80800", "http://[::1]:3000", "capacitor://localhost"]
)
def test_origin_may_have_a_port_an_ipv6_address_or_another_scheme(origin):
    """A configured origin with a port, an IPv6 address or a scheme other than HTTP is allowed."""
    response = client(CorsSettings(origins=(origin,))).get("/", headers={"Origin": origin})

    assert response.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("field", ["allow_methods", "allow_headers", "expose_headers"])
@pytest.mark.parametrize("name", ["", "a b", "a\r\nb", "é", '"a"', "a:b"])
def test_methods_and_headers_must_be_tokens(field, name):
    """A method or header name that is no HTTP token is refused when the settings are built."""
    with pytest.raises(ValidationError, match="token"):
        CorsSettings(**{field: (name,)})
