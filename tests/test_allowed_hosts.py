"""Allowed hosts: requests for other host names, or with a malformed Host, are refused."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import HostsSettings


async def ok(scope, receive, send):
    await PlainTextResponse("ok")(scope, receive, send)


async def ask(app, *hosts, path="/", root_path="", http_version="1.1"):
    """Send a request with these Host lines, as no client library would; return the status and the problem."""
    sent = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": root_path,
        "http_version": http_version,
        "headers": [(b"accept", b"*/*"), *((b"host", host) for host in hosts)],
    }

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], sent[1]["body"]


def guard(*allowed, **options):
    return AllowedHostsMiddleware(ok, HostsSettings(allowed=allowed), **options)


@pytest.mark.parametrize(
    ("allowed", "host"),
    [
        ("api.example.com", b"api.example.com"),
        ("api.example.com", b"API.Example.COM"),
        ("API.example.com.", b"api.example.com"),
        ("api.example.com", b"api.example.com."),
        ("api.example.com", b"api.example.com:8443"),
        ("api.example.com", b"api.example.com.:0"),
        ("api.example.com", b"api.example.com:"),
        ("api.example.com", b"api.example.com:65535"),
        ("my_service", b"my_service:8000"),
        ("*.example.com", b"a.example.com"),
        ("*.example.com", b"a.b.EXAMPLE.com:80"),
        ("127.0.0.1", b"127.0.0.1:8000"),
        ("[::1]", b"[::1]"),
        ("[::1]", b"[0:0:0:0:0:0:0:1]:8000"),
        ("*", b"anything.at.all:1"),
        ("*", b"[2001:DB8::1]"),
    ],
)
async def test_allowed_host_ignores_case_port_and_trailing_dot(allowed, host):
    """IPv6 addresses match in every spelling."""
    status, _ = await ask(guard(allowed), host)

    assert status == 200


@pytest.mark.parametrize(
    ("allowed", "host"),
    [
        ("api.example.com", b"example.com"),
        ("api.example.com", b"evil.api.example.com"),
        ("api.example.com", b"api.example.com.evil.org"),
        ("api.example.com", b"apiXexample.com"),
        ("*.example.com", b"example.com"),
        ("*.example.com", b"evilexample.com"),
        ("*.example.com", b"a.example.com.evil.org"),
        ("127.0.0.1", b"[::1]"),
        ("[::1]", b"[::2]"),
    ],
)
async def test_other_host_is_refused(allowed, host):
    """Similar names too; `*.example.com` does not allow example.com."""
    status, body = await ask(guard(allowed), host)

    assert status == 400
    assert b"does not name this service" in body


@pytest.mark.parametrize("allowed", ["api.example.com", "*.example.com", "*"])
@pytest.mark.parametrize(
    "host",
    [
        b"",
        b" ",
        b",",
        b",,,",
        b".",
        b"*",
        b"*.example.com",
        b".example.com",
        b"a..example.com",
        b"api.example.com..",
        b"api.example.com:port",
        b"api.example.com:-1",
        b"api.example.com:65536",
        b"api.example.com:999999",
        b"api.example.com:80:80",
        b":80",
        b"user@api.example.com",
        b"user:password@api.example.com",
        b"api.example.com, evil.org",
        b"api.example.com evil.org",
        b" api.example.com",
        b"api.example.com\n",
        b"api.example.com\r\nX-Evil: 1",
        b"api.example.com/path",
        b"api.example.com?x",
        b"api.example.com#x",
        b"http://api.example.com",
        b"api%2eexample.com",
        b"caf\xc3\xa9.example.com",
        b"\xff.example.com",
        b"api.example.com\x00",
        b"::1",
        b"[::1",
        b"[::1]x",
        b"[::g]",
        b"[::::]",
        b"[fe80::1%25eth0]",
        b"a" * 64 + b".example.com",
        b"a." * 130 + b"example.com",
        b"a" * 100_000,
    ],
)
async def test_invalid_host_is_refused_and_not_repeated(allowed, host):
    """Even if any host is allowed."""
    status, body = await ask(guard(allowed), host)

    assert status == 400
    assert b"Host header is invalid" in body
    assert len(body) < 200


@pytest.mark.parametrize("allowed", ["api.example.com", "*"])
async def test_repeated_host_is_refused(allowed):
    """Even if the lines are equal, because proxies may read different ones."""
    status, body = await ask(guard(allowed), b"api.example.com", b"api.example.com")

    assert status == 400
    assert b"Host header is repeated" in body


@pytest.mark.parametrize("http_version", ["1.0", "1.1", "2"])
@pytest.mark.parametrize("allowed", ["api.example.com", "*"])
async def test_missing_host_is_refused(allowed, http_version):
    """In every version of HTTP."""
    status, body = await ask(guard(allowed), http_version=http_version)

    assert status == 400
    assert b"Host header is missing" in body


def test_refusal_is_a_problem_that_is_not_cached():
    """A request with a foreign host gets a 400 problem with `no-store`, whose body omits the query."""
    app = Starlette(middleware=[Middleware(AllowedHostsMiddleware, HostsSettings(allowed=("api.example.com",)))])

    response = TestClient(app).get("/items?secret=1")

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert response.json() == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "detail": "The Host header does not name this service.",
        "instance": "/items",
    }


@pytest.mark.parametrize("hosts", [(), (b"10.0.0.7:8000",), (b"a", b"b"), (b"\xff",)])
@pytest.mark.parametrize("path", ["/health", "/health/"])
async def test_exempt_path_accepts_any_host(path, hosts):
    """With or without a trailing slash."""
    app = guard("api.example.com", exempt={"/health"})

    status, _ = await ask(app, *hosts, path=path)

    assert status == 200


async def test_exempt_path_is_relative_to_the_mounted_app():
    """An exempt path is compared with the path below the mount, not with the whole path."""
    app = guard("api.example.com", exempt={"/health"})

    inside, _ = await ask(app, b"10.0.0.7", path="/sub/health", root_path="/sub")
    outside, _ = await ask(app, b"10.0.0.7", path="/sub/health")

    assert (inside, outside) == (200, 400)


def test_each_of_several_names_is_allowed():
    """With several names configured, a Host header that matches any one of them is accepted."""
    app = AllowedHostsMiddleware(
        Starlette(routes=[Mount("/", ok)]), HostsSettings(allowed=("api.example.com", "*.example.org"))
    )

    answers = [
        TestClient(app, base_url=f"http://{host}").get("/").status_code
        for host in ("api.example.com", "a.example.org", "example.org")
    ]

    assert answers == [200, 200, 400]


@pytest.mark.parametrize("settings", [None, HostsSettings()])
def test_middleware_without_hosts_fails_at_construction(settings):
    """The error names the variable and the remedy."""
    with pytest.raises(ConfigurationError, match=r"HOSTS_ALLOWED is empty: list the host names"):
        AllowedHostsMiddleware(ok, settings)


@pytest.mark.parametrize(
    "name",
    [
        "https://api.example.com",
        "api.example.com:8000",
        "api.example.com/",
        "*example.com",
        "api.*.com",
        "**",
        "*.",
        ".example.com",
        "bücher.example",
        "a b",
        "a\n",
        "::1",
        "[::g]",
        "[]",
        "a." * 130 + "com",
    ],
)
def test_name_that_never_matches_fails_at_construction(name):
    """A configured name that no Host header could match raises ConfigurationError at construction."""
    with pytest.raises(ConfigurationError, match=r"HOSTS_ALLOWED: .* is not a host name"):
        guard("api.example.com", name)


def websocket_app(settings):
    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    return Starlette(routes=[WebSocketRoute("/", echo)], middleware=[Middleware(AllowedHostsMiddleware, settings)])


def test_websocket_to_an_allowed_host_passes():
    """A WebSocket with an allowed Host header connects and exchanges messages."""
    app = websocket_app(HostsSettings(allowed=("testserver",)))

    with TestClient(app).websocket_connect("/") as session:
        session.send_text("hello")

        assert session.receive_text() == "hello"


def test_websocket_to_another_host_is_refused():
    """A WebSocket handshake with a foreign Host header is refused with a 400 problem."""
    app = websocket_app(HostsSettings(allowed=("api.example.com",)))

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("/"):
        pass

    assert refused.value.status_code == 400
    assert refused.value.headers["content-type"] == "application/problem+json"


async def test_stream_passes_chunk_by_chunk():
    """The middleware passes each chunk of a streamed response on separately."""
    sent = []

    async def chunks():
        yield b"a"
        yield b"b"

    async def send(message):
        sent.append(message.get("body"))

    async def receive():
        return {"type": "http.request", "body": b""}

    app = AllowedHostsMiddleware(StreamingResponse(chunks()), HostsSettings(allowed=("*",)))
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "GET", "path": "/"}
    await app({**scope, "headers": [(b"host", b"a")]}, receive, send)

    assert sent == [None, b"a", b"b", b""]


def test_exception_of_the_app_passes_unchanged():
    """An exception that the app raises passes through the middleware unchanged."""

    def fail(request):
        raise RuntimeError("boom")

    app = AllowedHostsMiddleware(Starlette(routes=[Route("/", fail)]), HostsSettings(allowed=("*",)))

    with pytest.raises(RuntimeError, match="boom"):
        TestClient(app).get("/")


def test_lifespan_passes_unchanged():
    """The middleware passes the lifespan on, so that the app starts, serves and shuts down."""
    app = AllowedHostsMiddleware(Starlette(), HostsSettings(allowed=("*",)))

    with TestClient(app) as client:
        assert client.get("/").status_code == 404


async def test_two_apps_have_separate_hosts():
    """Two apps in one process each accept only the hosts that they were configured with."""
    one, other = guard("one.example.com"), guard("other.example.com")

    assert (await ask(one, b"one.example.com"))[0] == 200
    assert (await ask(other, b"one.example.com"))[0] == 400
