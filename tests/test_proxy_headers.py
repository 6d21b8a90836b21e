"""Proxy headers: those of trusted proxies are used, others are ignored."""

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
    """Send these header lines; return the client and the scheme that the app sees."""
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
async def test_client_is_the_address_that_the_proxy_appended(forwarded_for, client):
    """With its port if it has one, in its shortest form."""
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
async def test_client_is_the_right_most_address_without_proxies(forwarded_for, client):
    """If all are proxies, the left-most."""
    assert await seen(("x-forwarded-for", forwarded_for)) == ((client, 0), "http")


async def test_several_lines_are_one_list():
    """Several X-Forwarded-For lines count as one list, in the order in which they arrived."""
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
async def test_invalid_entry_ends_the_search(entry):
    """The client is the last proxy before it, or the peer."""
    entry = entry if isinstance(entry, bytes) else entry.encode()

    assert await seen(("x-forwarded-for", entry)) == (PEER, "http")
    assert await seen(("x-forwarded-for", b"203.0.113.9, " + entry)) == (PEER, "http")
    assert await seen(("x-forwarded-for", entry + b", 10.0.0.2")) == (("10.0.0.2", 0), "http")


async def test_length_of_a_chain_is_bounded():
    """Evaluating X-Forwarded-For stops after a fixed number of entries, even if all are trusted proxies."""
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
async def test_headers_of_an_untrusted_peer_are_ignored(peer, believed):
    """Forwarded headers change client and scheme only if the peer is in the trusted networks."""
    client, scheme = await seen(("x-forwarded-for", "203.0.113.9"), ("x-forwarded-proto", "https"), peer=peer)

    assert (client, scheme) == ((("203.0.113.9", 0), "https") if believed else (peer, "http"))


async def test_ipv4_mapped_network_trusts_the_ipv4_address():
    """A network written in IPv4-mapped IPv6 form trusts a peer with the corresponding IPv4 address."""
    client, _ = await seen(("x-forwarded-for", "203.0.113.9"), trusted=("::ffff:10.0.0.0/104", "::ffff:1.2.3.4"))

    assert client == ("203.0.113.9", 0)


async def test_headers_without_trusted_proxies_are_ignored():
    """Even from the local machine."""
    client, scheme = await seen(
        ("x-forwarded-for", "203.0.113.9"), ("x-forwarded-proto", "https"), trusted=(), peer=("127.0.0.1", 1)
    )

    assert (client, scheme) == (("127.0.0.1", 1), "http")


@pytest.mark.parametrize("peer", [("203.0.113.1", 1), ("testclient", 1), None])
async def test_wildcard_uses_the_right_most_address(peer):
    """`*` trusts any peer and takes the right-most address, because a client can forge those to its left."""
    client, _ = await seen(("x-forwarded-for", "1.1.1.1, 203.0.113.9"), trusted=("*",), peer=peer)

    assert client == ("203.0.113.9", 0)


async def test_wildcard_beside_networks_skips_listed_proxies():
    """Beside `*`, addresses in a listed network are skipped as proxies."""
    client, _ = await seen(("x-forwarded-for", "203.0.113.9, 10.0.0.2"), trusted=("*", "10.0.0.0/8"), peer=None)

    assert client == ("203.0.113.9", 0)


async def test_peer_without_an_address_requires_unix():
    """A peer without an address, as with a Unix socket, is trusted only if `unix` is listed."""
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
async def test_scheme_is_the_last_value(lines, scheme):
    """Of the last X-Forwarded-Proto, if it is http or https."""
    assert await seen(*(("x-forwarded-proto", line) for line in lines)) == (PEER, scheme)


@pytest.mark.parametrize(("value", "scheme"), [("https", "wss"), ("wss", "wss"), ("http", "ws"), ("ftp", "ws")])
async def test_scheme_of_a_websocket_is_ws_or_wss(value, scheme):
    """The scheme of a WebSocket is wss for https or wss, and otherwise ws."""
    assert await seen(("x-forwarded-proto", value), type="websocket", scheme="ws") == (PEER, scheme)


@pytest.mark.parametrize("name", ["x-real-ip", "forwarded", "x-forwarded-host", "cf-connecting-ip", "true-client-ip"])
async def test_other_headers_are_ignored(name):
    """X-Real-IP, Forwarded and vendor headers change neither the client address nor the scheme."""
    assert await seen((name, "203.0.113.9")) == (PEER, "http")


@pytest.mark.parametrize(
    "entry", ["10.0.0.256", "10.0.0.1/8", "10.0.0.0/33", "localhost", "alb.example.com", "", "10.0.0.1:80", "**"]
)
def test_invalid_entry_fails_at_construction(entry):
    """The error names variable, entry and remedy."""
    with pytest.raises(ConfigurationError, match=r"PROXY_TRUSTED: .* is neither an address nor a network") as failure:
        ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=("10.0.0.1", entry)))

    assert repr(entry) in str(failure.value)


@pytest.mark.parametrize("entry", ["0.0.0.0/0", "::/0", "::ffff:0:0/96"])
def test_network_of_all_addresses_fails_at_construction(entry):
    """A forged left-most entry would count."""
    with pytest.raises(ConfigurationError, match="trusts every client as a proxy"):
        ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=(entry,)))


def who(request):
    return JSONResponse([*request.client, request.url.scheme])


def test_middleware_without_arguments_trusts_no_peer():
    """ProxyHeadersMiddleware without arguments ignores X-Forwarded-For, because no peer is trusted by default."""
    app = Starlette(routes=[Route("/", who)], middleware=[Middleware(ProxyHeadersMiddleware)])

    response = TestClient(app, client=PEER).get("/", headers={"X-Forwarded-For": "203.0.113.9"})

    assert response.json() == [*PEER, "http"]


def test_scope_is_changed_in_place():
    """Outer layers see the client and the entries of routing."""
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


def test_websocket_has_the_client():
    """A WebSocket scope gets the client address and the scheme `wss` from the headers of a trusted proxy."""

    async def tell(websocket):
        await websocket.accept()
        await websocket.send_json([*websocket.client, websocket.url.scheme])
        await websocket.close()

    app = ProxyHeadersMiddleware(Starlette(routes=[WebSocketRoute("/", tell)]), ProxySettings(trusted=BALANCERS))
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}

    with TestClient(app, client=PEER).websocket_connect("/", headers=headers) as session:
        assert session.receive_json() == ["203.0.113.9", 0, "wss"]


def test_stream_passes_chunk_by_chunk():
    """A streamed response passes through ProxyHeadersMiddleware with all its chunks in order."""
    app = ProxyHeadersMiddleware(
        Starlette(routes=[Route("/", lambda request: StreamingResponse(iter(["a", "b"])))]),
        ProxySettings(trusted=BALANCERS),
    )

    assert TestClient(app, client=PEER).get("/").text == "ab"


def test_exception_of_the_app_passes_unchanged():
    """An exception raised by the app leaves ProxyHeadersMiddleware with its type and message unchanged."""

    def fail(request):
        raise RuntimeError("boom")

    app = ProxyHeadersMiddleware(Starlette(routes=[Route("/", fail)]), ProxySettings(trusted=BALANCERS))

    with pytest.raises(RuntimeError, match="boom"):
        TestClient(app, client=PEER).get("/")


def test_lifespan_passes_unchanged():
    """ProxyHeadersMiddleware passes lifespan messages on, so that the app starts and stops."""
    app = ProxyHeadersMiddleware(Starlette(), ProxySettings(trusted=BALANCERS))

    with TestClient(app) as client:
        assert client.get("/").status_code == 404


async def test_two_apps_have_separate_proxies():
    """Two apps in one process each trust only the proxies of their own settings."""
    header = ("x-forwarded-for", "203.0.113.9")

    here, _ = await seen(header, trusted=("10.0.0.0/8",))
    there, _ = await seen(header, trusted=("192.0.2.0/24",))

    assert (here, there) == (("203.0.113.9", 0), PEER)
