"""Proxy headers: what a trusted proxy says is believed, what anybody could have written is not."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.sections import ProxySettings

PEER = ("10.0.0.1", 40_000)
BALANCERS = ("10.0.0.0/8", "fd00::/8", "198.51.100.7")


async def seen(*headers, trusted=BALANCERS, peer=PEER, type="http", scheme="http"):  # noqa: A002 - ASGI's own name
    """Send header lines as they are; return the client and the scheme that the app saw."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)

    lines = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    scope = {"type": type, "path": "/", "headers": lines, "client": peer, "scheme": scheme}
    await ProxyHeadersMiddleware(app, ProxySettings(trusted=trusted))(scope, None, None)
    assert scopes == [scope]
    return scope["client"], scope["scheme"]


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ("203.0.113.9", ("203.0.113.9", 0)),
        ("203.0.113.9:567", ("203.0.113.9", 567)),
        ("  203.0.113.9\t", ("203.0.113.9", 0)),
        ("2001:db8::1", ("2001:db8::1", 0)),
        ("[2001:db8::1]", ("2001:db8::1", 0)),
        ("[2001:db8::1]:567", ("2001:db8::1", 567)),
        ("2001:DB8:0:0:0:0:0:1", ("2001:db8::1", 0)),
        ("::ffff:203.0.113.9", ("203.0.113.9", 0)),
        ("[::ffff:203.0.113.9]:567", ("203.0.113.9", 567)),
        ("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535", ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65_535)),
    ],
)
async def test_one_proxy(forwarded_for, client):
    """The address that the proxy appended is the client's, with its port if it came along, in its shortest spelling."""
    assert await seen(("x-forwarded-for", forwarded_for)) == (client, "http")


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ("1.1.1.1, 203.0.113.9", "203.0.113.9"),
        ("1.1.1.1, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("1.1.1.1, 203.0.113.9, 198.51.100.7:80, [fd00::2]:80, 10.9.9.9", "203.0.113.9"),
        ("10.0.0.9, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("203.0.113.9, ::ffff:10.0.0.2", "203.0.113.9"),
        ("garbage, 203.0.113.9", "203.0.113.9"),
        (", ,203.0.113.9", "203.0.113.9"),
        ("10.0.0.4, 10.0.0.3, 10.0.0.2", "10.0.0.4"),
        ("10.0.0.2", "10.0.0.2"),
    ],
)
async def test_chain(forwarded_for, client):
    """The right-most address that is not a proxy's counts; if all are proxies, the left-most."""
    assert await seen(("x-forwarded-for", forwarded_for)) == ((client, 0), "http")


async def test_several_lines():
    """Several header lines are one list, in their order."""
    lines = [("x-forwarded-for", "1.1.1.1, 203.0.113.9"), ("accept", "*/*"), ("x-forwarded-for", "10.0.0.3,10.0.0.2")]

    assert await seen(*lines) == (("203.0.113.9", 0), "http")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        ",",
        ",,,,",
        "unknown",
        "_hidden",
        "203.0.113",
        "203.0.113.256",
        "203.0.113.09",
        "203.0.113.9:",
        "203.0.113.9:port",
        "203.0.113.9:65536",
        "203.0.113.9:999999",
        "203.0.113.9:-1",
        "203.0.113.9 1.1.1.1",
        "203.0.113.9/32",
        "[2001:db8::1",
        "2001:db8::1]",
        "[2001:db8::1]567",
        "[]:80",
        "2001:db8:::1",
        "fe80::1%eth0",
        "[fe80::1%eth0]:80",
        "::1%\r\nX-Evil: 1",
        "203.0.113.9\r\nX-Evil: 1",
        "203.0.113.9\n1",
        "203.0.113.9\x00",
        "٢٠٣.0.113.9",
        b"\xff\xfe",
        "localhost",
        "client.example.com",
        "<script>",
        "2130706433",
        "0x7f.0.0.1",
        "1" * 100_000,
        "," * 100_000,
        "a," * 50_000,
    ],
)
async def test_garbage(entry):
    """An entry that is no address ends the walk: the last proxy that made sense is the client, or the peer."""
    entry = entry if isinstance(entry, bytes) else entry.encode()

    assert await seen(("x-forwarded-for", entry)) == (PEER, "http")
    assert await seen(("x-forwarded-for", b"203.0.113.9, " + entry)) == (PEER, "http")
    assert await seen(("x-forwarded-for", entry + b", 10.0.0.2")) == (("10.0.0.2", 0), "http")


async def test_endless_chain():
    """A chain of more proxies than anybody has is not walked to its end."""
    client, _ = await seen(("x-forwarded-for", "203.0.113.9" + ", 10.0.0.2" * 5000))

    assert client == ("10.0.0.2", 0)


@pytest.mark.parametrize(
    ("peer", "believed"),
    [
        (("10.255.0.1", 1), True),
        (("198.51.100.7", 1), True),
        (("::ffff:10.0.0.1", 1), True),
        (["fd00::1", 1], True),
        (("203.0.113.1", 1), False),
        (("198.51.100.8", 1), False),
        (("::1", 1), False),
        (("testclient", 1), False),
        (("", 0), False),
        (None, False),
    ],
)
async def test_peers(peer, believed):
    """Only a listed peer is believed; from any other, the headers change nothing."""
    client, scheme = await seen(("x-forwarded-for", "203.0.113.9"), ("x-forwarded-proto", "https"), peer=peer)

    assert (client, scheme) == ((("203.0.113.9", 0), "https") if believed else (peer, "http"))


async def test_peer_in_ipv4_form():
    """Trust that is written in the IPv6 form of IPv4 holds for the IPv4 address."""
    client, _ = await seen(("x-forwarded-for", "203.0.113.9"), trusted=("::ffff:10.0.0.0/104", "::ffff:1.2.3.4"))

    assert client == ("203.0.113.9", 0)


async def test_nobody_trusted():
    """Without trusted proxies no header is believed, even from the machine itself."""
    client, scheme = await seen(
        ("x-forwarded-for", "203.0.113.9"), ("x-forwarded-proto", "https"), trusted=(), peer=("127.0.0.1", 1)
    )

    assert (client, scheme) == (("127.0.0.1", 1), "http")


@pytest.mark.parametrize("peer", [("203.0.113.1", 1), ("testclient", 1), None])
async def test_any_peer(peer):
    """`*` believes any peer, and takes what stands right-most: the left may be invented."""
    client, _ = await seen(("x-forwarded-for", "1.1.1.1, 203.0.113.9"), trusted=("*",), peer=peer)

    assert client == ("203.0.113.9", 0)


async def test_any_peer_beside_networks():
    """Beside `*`, listed proxies are still walked over."""
    client, _ = await seen(("x-forwarded-for", "203.0.113.9, 10.0.0.2"), trusted=("*", "10.0.0.0/8"), peer=None)

    assert client == ("203.0.113.9", 0)


async def test_unix_socket():
    """A peer without an address, as behind a Unix socket, is trusted only if `unix` is listed."""
    header = ("x-forwarded-for", "203.0.113.9")

    listed, _ = await seen(header, trusted=("unix",), peer=None)
    other, _ = await seen(header, trusted=("unix",), peer=("10.0.0.1", 1))

    assert (listed, other) == (("203.0.113.9", 0), ("10.0.0.1", 1))


@pytest.mark.parametrize(
    ("lines", "scheme"),
    [
        (["https"], "https"),
        (["http"], "http"),
        (["HTTPS"], "https"),
        ([" https "], "https"),
        (["http, https"], "https"),
        (["https, http"], "http"),
        (["https", "http"], "http"),
        (["http", "http,https"], "https"),
        ([], "http"),
        ([""], "http"),
        ([","], "http"),
        (["https,"], "http"),
        (["https://"], "http"),
        (["wss"], "http"),
        (["javascript"], "http"),
        (["https\r\nX-Evil: 1"], "http"),
        ([b"\xff"], "http"),
        (["https" * 20_000], "http"),
    ],
)
async def test_scheme(lines, scheme):
    """The last value of the last X-Forwarded-Proto is the scheme, if it is http or https."""
    assert await seen(*(("x-forwarded-proto", line) for line in lines)) == (PEER, scheme)


@pytest.mark.parametrize(("value", "scheme"), [("https", "wss"), ("wss", "wss"), ("http", "ws"), ("ftp", "ws")])
async def test_scheme_of_a_websocket(value, scheme):
    """A WebSocket's scheme is ws or wss, whichever pair the proxy speaks."""
    assert await seen(("x-forwarded-proto", value), type="websocket", scheme="ws") == (PEER, scheme)


@pytest.mark.parametrize("name", ["x-real-ip", "forwarded", "x-forwarded-host", "cf-connecting-ip", "true-client-ip"])
async def test_headers_that_are_not_used(name):
    """No other header changes who the client is."""
    assert await seen((name, "203.0.113.9")) == (PEER, "http")


@pytest.mark.parametrize(
    "entry", ["10.0.0.256", "10.0.0.1/8", "10.0.0.0/33", "localhost", "alb.example.com", "", "10.0.0.1:80", "**"]
)
def test_malformed_entry(entry):
    """A malformed entry fails at construction, naming the variable, the entry and the remedy."""
    with pytest.raises(ConfigurationError, match=r"PROXY_TRUSTED: .* is neither an address nor a network") as failure:
        ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=("10.0.0.1", entry)))

    assert repr(entry) in str(failure.value)


@pytest.mark.parametrize("entry", ["0.0.0.0/0", "::/0", "::ffff:0:0/96"])
def test_everybody(entry):
    """A network of everybody would make an invented left-most entry count, so it fails at construction."""
    with pytest.raises(ConfigurationError, match="trusts every client as a proxy"):
        ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=(entry,)))


def who(request):
    return JSONResponse([*request.client, request.url.scheme])


def test_without_settings():
    """Added without arguments, the middleware believes nobody."""
    app = Starlette(routes=[Route("/", who)], middleware=[Middleware(ProxyHeadersMiddleware)])

    response = TestClient(app, client=PEER).get("/", headers={"X-Forwarded-For": "203.0.113.9"})

    assert response.json() == [*PEER, "http"]


def test_routing_stays_visible():
    """Outer layers see the client and what routing found, because the scope is not copied."""
    scopes = []
    inner = ProxyHeadersMiddleware(
        Starlette(routes=[Mount("/v1", routes=[Route("/{name}", who)])]), ProxySettings(trusted=BALANCERS)
    )

    async def outer(scope, receive, send):
        await inner(scope, receive, send)
        scopes.append(scope)

    response = TestClient(outer, client=PEER).get("/v1/a", headers={"X-Forwarded-For": "203.0.113.9"})

    assert response.json() == ["203.0.113.9", 0, "http"]
    assert scopes[0]["client"] == ("203.0.113.9", 0)
    assert scopes[0]["path_params"] == {"name": "a"}


def test_websocket():
    """A WebSocket has the client's address too."""

    async def tell(websocket):
        await websocket.accept()
        await websocket.send_json([*websocket.client, websocket.url.scheme])
        await websocket.close()

    app = ProxyHeadersMiddleware(Starlette(routes=[WebSocketRoute("/", tell)]), ProxySettings(trusted=BALANCERS))
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}

    with TestClient(app, client=PEER).websocket_connect("/", headers=headers) as session:
        assert session.receive_json() == ["203.0.113.9", 0, "wss"]


def test_streaming():
    """A streamed response passes through."""
    app = ProxyHeadersMiddleware(
        Starlette(routes=[Route("/", lambda request: StreamingResponse(iter(["a", "b"])))]),
        ProxySettings(trusted=BALANCERS),
    )

    assert TestClient(app, client=PEER).get("/").text == "ab"


def test_exception_below():
    """An exception from below passes as it is."""

    def fail(request):
        raise RuntimeError("boom")

    app = ProxyHeadersMiddleware(Starlette(routes=[Route("/", fail)]), ProxySettings(trusted=BALANCERS))

    with pytest.raises(RuntimeError, match="boom"):
        TestClient(app, client=PEER).get("/")


def test_lifespan():
    """The lifespan passes through."""
    app = ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=BALANCERS))

    with TestClient(app) as client:
        assert client.get("/").status_code == 404


async def test_two_apps():
    """Two apps in one process trust their own proxies only."""
    header = ("x-forwarded-for", "203.0.113.9")

    here, _ = await seen(header, trusted=("10.0.0.0/8",))
    there, _ = await seen(header, trusted=("192.0.2.0/24",))

    assert (here, there) == (("203.0.113.9", 0), PEER)
