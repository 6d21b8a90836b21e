"""Security headers: on every response, once, and never over what a handler decided."""

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
    """Run one exchange at the level of ASGI; return what was sent."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "GET", "path": "/", "scheme": scheme}
    await app({**scope, "headers": list(headers)}, receive, send)
    return sent


def test_response():
    """An ordinary response over https carries exactly the documented headers beside its own."""
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


def test_plain_http():
    """Strict-Transport-Security is not sent over plain http."""
    response = client(plain, url="http://testserver").get("/")

    assert "strict-transport-security" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"


def test_html():
    """HTML alone gets a Cross-Origin-Opener-Policy, whatever the case of its media type."""
    html = client(lambda request: HTMLResponse("<p>"))
    upper = client(lambda request: Response("<p>", headers={"Content-Type": "Text/HTML"}))

    assert html.get("/").headers["cross-origin-opener-policy"] == "same-origin"
    assert upper.get("/").headers["cross-origin-opener-policy"] == "same-origin"


@pytest.mark.parametrize("header", ["Authorization", "Cookie"])
def test_answer_to_credentials(header):
    """What was answered to somebody in particular is not stored."""
    response = client(plain).get("/", headers={header: "a=b"})

    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("status", [400, 404, 503])
def test_error(status):
    """Errors are not stored."""

    def fail(request):
        raise HTTPException(status)

    response = client(fail).get("/")

    assert response.status_code == status
    assert response.headers["cache-control"] == "no-store"


def test_handler_wins():
    """A header that the handler set, in any case, stays as it is and alone."""
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


async def test_handler_wins_at_the_level_of_asgi():
    """Names that an app sends with capitals, against the specification, count as the same header."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"SAMEORIGIN")]})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert [value for name, value in start["headers"] if name.lower() == b"x-frame-options"] == [b"SAMEORIGIN"]


def test_lines_of_the_handler():
    """Several lines that the handler sent itself, such as cookies, all stay."""

    def cookies(request):
        response = PlainTextResponse("ok", headers={"X-Frame-Options": "SAMEORIGIN"})
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    response = client(cookies).get("/")

    assert len(response.headers.get_list("set-cookie")) == 2


def test_product_names():
    """Server and X-Powered-By are removed."""
    app = client(lambda request: PlainTextResponse("ok", headers={"Server": "x/1", "X-Powered-By": "y/2"}))

    response = app.get("/")

    assert not {"server", "x-powered-by", "x-xss-protection"} & set(response.headers)


def test_empty_settings():
    """An empty value leaves its header out; nosniff always stays."""
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
def test_values_that_could_break_a_header_line(value):
    """A value with a line break or foreign letters is refused as a setting."""
    with pytest.raises(ValueError, match="printable ASCII"):
        HeadersSettings(csp=value)


async def test_constants_of_the_app():
    """An app that sends the same message again and again gets it completed each time, and unchanged back."""
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
async def test_strange_headers(headers):
    """Headers may be absent, any iterable, lists for pairs, huge, or not text at all."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert (b"x-content-type-options", b"nosniff") in start["headers"]


async def test_no_headers():
    """A response without the optional `headers` gets ours."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    start, _ = await respond(SecurityHeadersMiddleware(app))

    assert (b"x-content-type-options", b"nosniff") in start["headers"]


async def test_streaming():
    """Chunks pass one by one, as they come, behind a single start."""

    async def chunks():
        yield b"a"
        yield b"b"

    sent = await respond(SecurityHeadersMiddleware(StreamingResponse(chunks())))

    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 3
    assert [message.get("body") for message in sent[1:]] == [b"a", b"b", b""]


def test_websocket():
    """An accepted WebSocket passes through."""

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", echo)], middleware=[Middleware(SecurityHeadersMiddleware)])

    with TestClient(app).websocket_connect("/") as session:
        session.send_text("hello")
        assert session.receive_text() == "hello"

        assert not session.extra_headers


def test_refused_websocket():
    """A WebSocket handshake that is refused with a response has the headers of any error."""

    async def refuse(websocket):
        await websocket.send_denial_response(PlainTextResponse("no", status_code=403))

    app = Starlette(routes=[WebSocketRoute("/", refuse)], middleware=[Middleware(SecurityHeadersMiddleware)])

    with pytest.raises(WebSocketDenialResponse) as refused, TestClient(app).websocket_connect("wss://testserver/"):
        pass

    assert refused.value.headers["cache-control"] == "no-store"
    assert "strict-transport-security" in refused.value.headers


def test_exception_below():
    """An exception from below passes as it is."""

    def fail(request):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        client(fail).get("/")


def test_lifespan():
    """The lifespan passes through."""
    app = FastAPI()
    app.add_middleware(SecurityHeadersMiddleware)

    with TestClient(app) as running:
        assert running.get("/openapi.json").headers["x-frame-options"] == "DENY"


def test_two_apps():
    """Two apps in one process keep their own settings."""
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
def test_policies_by_path(path, policy):
    """The longest path that fits counts, in whole segments, for routes and for what has none; "" leaves it out."""
    app = Starlette(routes=[Route("/admin/users/{id}", plain)])
    app.add_middleware(SecurityHeadersMiddleware, policies=POLICIES)

    response = TestClient(app).get(f"http://testserver{path}")

    assert response.headers.get_list("content-security-policy") == policy
    assert response.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
def test_policies_of_mounted_apps(kind):
    """A path is relative to the app that has the layer: for an outer app it begins with the path of the mount."""
    inner = kind()
    inner.add_middleware(SecurityHeadersMiddleware, policies={"/pages": "inner"})
    app = Starlette(routes=[Mount("/own", app=inner), Mount("/bare", app=kind())])
    app.add_middleware(
        SecurityHeadersMiddleware, HeadersSettings(csp="outer"), policies={"/bare/pages": "below a mount"}
    )

    paths = ["/own/pages/1", "/own/other", "/bare/pages", "/bare/other", "/pages"]
    policies = [TestClient(app).get(path).headers.get_list("content-security-policy") for path in paths]

    assert policies == [["inner"], ["outer"], ["below a mount"], ["outer"], ["outer"]]


def test_policies_under_a_root_path():
    """A prefix that a proxy strips is no part of the path."""
    app = Starlette()
    app.add_middleware(SecurityHeadersMiddleware, policies={"/admin": "admin"})

    response = TestClient(app, root_path="/api").get("/api/admin/users")

    assert response.headers["content-security-policy"] == "admin"


def test_a_handler_wins_over_a_policy_by_path():
    """What a handler sets stays, and an empty value leaves the header out."""
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
def test_policies_that_cannot_be_used(policies, message):
    """They are refused when the app is made."""
    with pytest.raises(ConfigurationError, match=message):
        SecurityHeadersMiddleware(plain, policies=policies)


@pytest.mark.parametrize("policy", [FASTAPI_DOCS_CSP, GRAPHIQL_CSP, SQLADMIN_CSP])
def test_presets(policy):
    """A preset names each directive once, and closes what pages have no use for."""
    names = [directive.split()[0] for directive in policy.split("; ")]

    assert len(names) == len(set(names))
    assert {"default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert "'unsafe-eval'" not in policy


@pytest.mark.system
@needs_browser
def test_a_browser_renders_the_docs_of_a_mounted_app():
    """FastAPI's own page works under its preset, in a real browser that finds the CDN's files on this machine."""
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
def test_a_page_under_a_policy_that_blocks_it(policy, blocked, caplog):
    """A line names the route and what the policy does not allow, and says what to do."""
    app = Starlette(routes=[Route("/pages/{name}", lambda request: HTMLResponse("<p>"))])
    app.add_middleware(SecurityHeadersMiddleware, HeadersSettings(csp=policy))
    app.add_middleware(PagePolicyMiddleware)

    TestClient(app).get("/pages/one")

    assert [
        f"at /pages/{{name}} is sent under a Content-Security-Policy that allows {blocked}: " in text
        for text in reported(caplog)
    ] == [True] * (blocked is not None)


def test_a_page_is_reported_once_for_each_route(caplog):
    """A second request says nothing new, and what is not HTML says nothing at all."""
    app = Starlette(routes=[Route("/pages/{name}", lambda request: HTMLResponse("<p>")), Route("/text", plain)])
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(PagePolicyMiddleware)

    for path in ("/pages/one", "/pages/two", "/text"):
        TestClient(app).get(path)

    assert len(reported(caplog)) == 1


def test_pages_without_a_route_are_reported_by_path(caplog, tmp_path):
    """Each page of a mounted directory, for instance; scanners of paths do not fill the log."""
    (tmp_path / "index.html").write_text("<p>")
    directories = [Mount(path, StaticFiles(directory=tmp_path, html=True)) for path in ("/site", "/shop")]
    answer = Mount("/any", HTMLResponse("<p>"))
    app = Starlette(routes=[*directories, answer])
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(PagePolicyMiddleware)
    client = TestClient(app)

    for path in ("/site/", "/shop/index.html", "/shop/index.html", *(f"/any/{number}" for number in range(200))):
        client.get(path)

    assert "the page at /site is sent" in reported(caplog)[0]
    assert "the page at /shop/index.html is sent" in reported(caplog)[1]
    assert len(reported(caplog)) == 100
