"""Security headers: on every response, once, and never in place of a header of the handler."""

from importlib import resources
from pathlib import Path

import pytest
from browser import needs_browser, other_hosts, visit
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse
from wire import serving

from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import HeadersSettings
from fastapi_prodkit.security_headers import (
    FASTAPI_DOCS_CSP,
    GRAPHIQL_CSP,
    SQLADMIN_CSP,
    PagePolicyMiddleware,
    SecurityHeadersMiddleware,
)

CSP = "default-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def client(endpoint, settings=None, *, url="https://testserver", **options):
    middleware = Middleware(SecurityHeadersMiddleware, settings)
    app = Starlette(routes=[Route("/", endpoint)], middleware=[middleware])
    return TestClient(app, base_url=url, **options)


def plain(request: Request) -> Response:
    return PlainTextResponse("ok")


async def respond(app, *, scheme="https", headers=()):
    """Run one ASGI exchange; return the sent messages."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "GET", "path": "/", "scheme": scheme}
    await app({**scope, "headers": list(headers)}, receive, send)
    return sent


def test_https_response_has_exactly_the_documented_headers():
    """A plain https response carries exactly the documented security headers besides its own headers."""
    response = client(plain).get("/")

    assert dict(response.headers) == {
        "content-length": "2",
        "content-type": "text/plain; charset=utf-8",
        "strict-transport-security": "max-age=63072000; includeSubDomains",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "content-security-policy": CSP,
        "referrer-policy": "no-referrer",
        "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    }


def test_http_response_has_no_hsts():
    """A response over plain http has no Strict-Transport-Security but has the other security headers."""
    response = client(plain, url="http://testserver").get("/")

    assert "strict-transport-security" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"


def test_html_alone_has_cross_origin_opener_policy():
    """In any case of its media type."""
    html = client(lambda request: HTMLResponse("<p>"))
    upper = client(lambda request: Response("<p>", headers={"Content-Type": "Text/HTML"}))

    assert html.get("/").headers["cross-origin-opener-policy"] == "same-origin"
    assert upper.get("/").headers["cross-origin-opener-policy"] == "same-origin"


@pytest.mark.parametrize("header", ["Authorization", "Cookie", "X-API-Key"])
def test_response_to_credentials_is_not_stored(header):
    """A response to a request with credentials gets `Cache-Control: no-store`."""
    response = client(plain).get("/", headers={header: "a=b"})

    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("status", [400, 404, 503])
def test_error_is_not_stored(status):
    """A response with a 4xx or 5xx status gets `Cache-Control: no-store`."""

    def fail(request):
        raise HTTPException(status)

    response = client(fail).get("/")

    assert response.status_code == status
    assert response.headers["cache-control"] == "no-store"


def test_header_of_the_handler_wins():
    """In any case."""
    own = {
        "Cache-Control": "private, max-age=60",
        "Content-Security-Policy": "default-src 'self'",
        "X-FRAME-OPTIONS": "SAMEORIGIN",
        "cross-origin-opener-policy": "unsafe-none",
    }
    app = client(lambda request: HTMLResponse("<p>", headers=own))

    response = app.get("/", headers={"Cookie": "a=b"})

    for name, value in own.items():
        assert response.headers.get_list(name) == [value]
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_capitalized_header_of_an_app_wins():
    """It violates ASGI."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"SAMEORIGIN")]})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert [value for name, value in start["headers"] if name.lower() == b"x-frame-options"] == [b"SAMEORIGIN"]


def test_repeated_headers_of_the_handler_stay():
    """Such as cookies."""

    def cookies(request):
        response = PlainTextResponse("ok", headers={"X-Frame-Options": "SAMEORIGIN"})
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    response = client(cookies).get("/")

    assert len(response.headers.get_list("set-cookie")) == 2


def test_server_and_x_powered_by_are_removed():
    """The middleware removes Server and X-Powered-By from the app's response."""
    app = client(lambda request: PlainTextResponse("ok", headers={"Server": "x/1", "X-Powered-By": "y/2"}))

    response = app.get("/")

    assert not {"server", "x-powered-by", "x-xss-protection"} & set(response.headers)


def test_empty_setting_leaves_its_header_out():
    """nosniff always stays."""
    settings = HeadersSettings(
        hsts_max_age=0,
        csp="",
        referrer_policy="",
        permissions_policy="",
        frame_options="",
        cross_origin_opener_policy="",
    )

    response = client(lambda request: HTMLResponse("x"), settings).get("/")

    assert set(response.headers) == {"content-length", "content-type", "x-content-type-options"}


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "é", "\x00"])
def test_unsafe_value_is_refused(value):
    """As a setting."""
    with pytest.raises(ValueError, match="printable ASCII"):
        HeadersSettings(csp=value)


async def test_messages_of_the_app_are_not_modified():
    """An app may send the same message again."""
    constant = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}

    async def app(scope, receive, send):
        await send(constant)
        await send({"type": "http.response.body"})

    wrapped = SecurityHeadersMiddleware(app)
    secure, _ = await respond(wrapped)
    insecure, _ = await respond(wrapped, scheme="http")

    assert b"strict-transport-security" in dict(secure["headers"])
    assert b"strict-transport-security" not in dict(insecure["headers"])
    assert constant == {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}


@pytest.mark.parametrize(
    "headers",
    [
        (),
        iter([(b"content-length", b"0")]),
        [[b"content-length", b"0"]],
        [(b"", b"")],
        [(b"x-caf\xe9", b"\xff" * 70_000)],
    ],
)
async def test_unusual_headers_pass(headers):
    """Absent, any iterable, lists as pairs, huge, or binary."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert (b"x-content-type-options", b"nosniff") in start["headers"]


async def test_response_without_headers_gets_ours():
    """A start message without the optional `headers` key still gets the security headers."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert (b"x-content-type-options", b"nosniff") in start["headers"]


async def test_stream_passes_chunk_by_chunk():
    """SecurityHeadersMiddleware sends each chunk on separately, after a single start message."""

    async def chunks():
        yield b"a"
        yield b"b"

    sent = await respond(SecurityHeadersMiddleware(StreamingResponse(chunks())))

    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 3
    assert [message.get("body") for message in sent[1:]] == [b"a", b"b", b""]


def test_accepted_websocket_passes_unchanged():
    """An accepted WebSocket exchanges messages through the middleware and gets no extra headers."""

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", echo)], middleware=[Middleware(SecurityHeadersMiddleware)])

    with TestClient(app).websocket_connect("/") as session:
        session.send_text("hello")
        assert session.receive_text() == "hello"

        assert not session.extra_headers


def test_refused_websocket_has_the_headers():
    """A WebSocket handshake that is refused with a response gets the headers of an error response."""

    async def refuse(websocket):
        await websocket.send_denial_response(PlainTextResponse("no", status_code=403))

    app = Starlette(routes=[WebSocketRoute("/", refuse)], middleware=[Middleware(SecurityHeadersMiddleware)])

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("wss://testserver/"):
        pass

    assert refused.value.headers["cache-control"] == "no-store"
    assert "strict-transport-security" in refused.value.headers


def test_exception_of_the_app_passes_unchanged():
    """An exception raised by the app leaves SecurityHeadersMiddleware with its type and message unchanged."""

    def fail(request):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        client(fail).get("/")


def test_lifespan_passes_unchanged():
    """SecurityHeadersMiddleware passes lifespan messages on, so that the app starts and stops."""
    app = FastAPI()
    app.add_middleware(SecurityHeadersMiddleware)

    with TestClient(app) as running:
        assert running.get("/openapi.json").headers["x-frame-options"] == "DENY"


def test_two_apps_have_separate_settings():
    """Two apps in one process each send the security headers of their own settings."""
    strict = client(plain)
    loose = client(plain, HeadersSettings(frame_options="SAMEORIGIN", hsts_max_age=300))

    assert strict.get("/").headers["x-frame-options"] == "DENY"
    assert loose.get("/").headers["x-frame-options"] == "SAMEORIGIN"
    assert loose.get("/").headers["strict-transport-security"] == "max-age=300; includeSubDomains"


POLICIES = {"/": "root", "/admin": "admin", "/admin/reports/": "reports", "/open": ""}


@pytest.mark.parametrize(
    ("path", "policy"),
    [
        ("/", ["root"]),
        ("/other", ["root"]),
        ("/admin", ["admin"]),
        ("/admin/", ["admin"]),
        ("/admin/users/7", ["admin"]),
        ("/administration", ["root"]),
        ("/admin/reports", ["reports"]),
        ("/admin/reports/2026", ["reports"]),
        ("/admin/reports-of-others", ["admin"]),
        ("//admin", ["root"]),
        ("/open/page", []),
    ],
)
def test_policy_of_the_longest_path_wins(path, policy):
    """By whole segments, also without a route; "" leaves the header out."""
    app = Starlette(routes=[Route("/admin/users/{id}", plain)])
    app.add_middleware(SecurityHeadersMiddleware, policies=POLICIES)

    response = TestClient(app).get(f"http://testserver{path}")

    assert response.headers.get_list("content-security-policy") == policy
    assert response.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
def test_policy_path_is_relative_to_the_app(kind):
    """A policy path is relative to the app with the middleware; an outer app's paths include the mount path."""
    inner = kind()
    inner.add_middleware(SecurityHeadersMiddleware, policies={"/pages": "inner"})
    app = Starlette(routes=[Mount("/own", app=inner), Mount("/bare", app=kind())])
    app.add_middleware(
        SecurityHeadersMiddleware, HeadersSettings(csp="outer"), policies={"/bare/pages": "below a mount"}
    )

    paths = ["/own/pages/1", "/own/other", "/bare/pages", "/bare/other", "/pages"]
    policies = [TestClient(app).get(path).headers.get_list("content-security-policy") for path in paths]

    assert policies == [["inner"], ["outer"], ["below a mount"], ["outer"], ["outer"]]


def test_policy_path_omits_the_root_path():
    """A policy path is matched without the root path that a proxy strips."""
    app = Starlette()
    app.add_middleware(SecurityHeadersMiddleware, policies={"/admin": "admin"})

    response = TestClient(app, root_path="/api").get("/api/admin/users")

    assert response.headers["content-security-policy"] == "admin"


def test_policy_of_the_handler_wins():
    """An empty value leaves the header out."""
    own = {"Content-Security-Policy": "own", "X-Frame-Options": "", "X-Other": ""}
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok", headers=own))])
    app.add_middleware(SecurityHeadersMiddleware, policies={"/": "general"})

    response = TestClient(app).get("/")

    assert response.headers.get_list("content-security-policy") == ["own"]
    assert "x-frame-options" not in response.headers
    assert response.headers["x-other"] == ""


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"admin": "x"}, "'admin' does not start with a slash"),
        ({"": "x"}, "'' does not start with a slash"),
        ({"/a": "x\r\nSet-Cookie: b"}, "the policy of '/a' must be printable ASCII"),
        ({"/a": "é"}, "the policy of '/a' must be printable ASCII"),
    ],
)
def test_invalid_policy_fails_at_construction(policies, message):
    """A policy with a path without leading slash, or with a value that is not printable ASCII, is refused."""
    with pytest.raises(ConfigurationError, match=message):
        SecurityHeadersMiddleware(plain, policies=policies)


@pytest.mark.parametrize("policy", [FASTAPI_DOCS_CSP, GRAPHIQL_CSP, SQLADMIN_CSP])
def test_presets_have_each_directive_once(policy):
    """And block what the pages do not need."""
    names = [directive.split()[0] for directive in policy.split("; ")]

    assert len(names) == len(set(names))
    assert {"default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert "'unsafe-eval'" not in policy


@pytest.mark.system
@needs_browser
def test_browser_renders_fastapi_docs_under_the_preset():
    """With files of the CDN from this machine."""
    assets, npm = Path(str(resources.files("fastapi_swagger"))) / "resources", "/npm/swagger-ui-dist@5"
    files = {f"{npm}/{name}": assets / name for name in ("swagger-ui-bundle.js", "swagger-ui.css")}
    files["/img/favicon.png"] = assets / "favicon-32x32.png"
    sub, app = FastAPI(), FastAPI()
    sub.add_api_route("/items/{item_id}", lambda item_id: item_id)
    app.mount("/sub", sub)
    app.add_middleware(SecurityHeadersMiddleware, policies={"/sub": FASTAPI_DOCS_CSP})

    with serving(app) as port, other_hosts(files) as flags:
        allowed = visit(f"http://127.0.0.1:{port}/sub/docs", *flags)
        blocked = visit(f"http://127.0.0.1:{port}/docs", *flags)

    assert "opblock-summary-path" in allowed.dom
    assert allowed.complaints == []
    assert "opblock" not in blocked.dom
    assert "violates the following Content Security Policy" in blocked.complaints[0]


def reported(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fastapi_prodkit.security_headers"]


@pytest.mark.parametrize(
    ("policy", "blocked"),
    [
        (CSP, "no scripts and no styles"),
        ("default-src 'self'; script-src 'none'", "no scripts"),
        ("default-src 'self'; style-src", "no styles"),
        ("DEFAULT-SRC 'NONE'; Script-Src 'self'", "no styles"),
        ("default-src 'none'; script-src-elem 'self'; style-src-elem 'self'", None),
        ("default-src 'none'; default-src 'self'", "no scripts and no styles"),
        ("default-src 'self'", None),
        ("frame-ancestors 'none'; ;", None),
        ("", None),
    ],
)
def test_page_blocked_by_its_policy_logs_a_warning(policy, blocked, caplog):
    """With route, blocked content and remedy."""
    app = Starlette(routes=[Route("/pages/{name}", lambda request: HTMLResponse("<p>"))])
    app.add_middleware(SecurityHeadersMiddleware, HeadersSettings(csp=policy))
    app.add_middleware(PagePolicyMiddleware)

    TestClient(app).get("/pages/one")

    assert [
        f"at /pages/{{name}} is sent under a Content-Security-Policy that allows {blocked}: " in text
        for text in reported(caplog)
    ] == [True] * (blocked is not None)


def test_page_warning_is_logged_once_per_route(caplog):
    """For HTML only."""
    app = Starlette(routes=[Route("/pages/{name}", lambda request: HTMLResponse("<p>")), Route("/text", plain)])
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(PagePolicyMiddleware)

    for path in ("/pages/one", "/pages/two", "/text"):
        TestClient(app).get(path)

    assert len(reported(caplog)) == 1


def test_page_warning_without_a_route_has_the_path(caplog, tmp_path):
    """Their number is bounded."""
    (tmp_path / "index.html").write_text("<p>")
    directories = [Mount(path, StaticFiles(directory=tmp_path, html=True)) for path in ("/site", "/shop")]
    answer = Mount("/any", HTMLResponse("<p>"))
    app = Starlette(routes=[*directories, answer])
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(PagePolicyMiddleware)

    with TestClient(app) as client:
        for path in ("/site/", "/shop/index.html", "/shop/index.html", *(f"/any/{number}" for number in range(200))):
            client.get(path)

    assert "the page at /site is sent" in reported(caplog)[0]
    assert "the page at /shop/index.html is sent" in reported(caplog)[1]
    assert len(reported(caplog)) == 100
