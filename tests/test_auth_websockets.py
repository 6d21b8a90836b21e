"""WebSockets: tokens among the subprotocols and in the first message, and what happens when they expire."""

import asyncio
import json
import threading
import time
from datetime import UTC, datetime

import pytest
from browser import needs_browser, opened
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse
from fastapi.testclient import TestClient
from forging import SECRET, hs256, secret_token, token
from prometheus_client import CollectorRegistry
from starlette.requests import HTTPConnection
from starlette.testclient import WebSocketDenialResponse
from wire import serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import (
    Auth,
    CurrentUser,
    authenticate_first_message,
    guard_routes,
    hash_api_key,
    new_api_key,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.auth.websockets import GuardedWebSocket
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.sections import AuthSettings

pytest.importorskip("jwt", reason="the extra auth is not installed")

NOW = time.time()
SOON = NOW + 0.05
KEY = new_api_key()


def now():
    """Return the same time always, so that a token is valid however long a test takes to use it."""
    return NOW


def settings(**values):
    expires = datetime.fromtimestamp(SOON, UTC).isoformat()
    key = f"bot {hash_api_key(KEY)} expires={expires}"
    return AuthSettings(**{"secret": SECRET, "audience": ["orders"], "api_keys": [key], "leeway": 0, **values})


def valid(**claims):
    return secret_token(iat=None, **{"exp": NOW + 3600, "roles": ["reader"], **claims})


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture(params=["guard", "dependency"])
def app(request, registry):
    """An app with a WebSocket, for which a guard or only a dependency asks who calls."""
    return service(request.param == "guard", registry)


def service(guarded, registry=None, **values):
    app = FastAPI()
    add_problem_handlers(app)
    app.state.auth = Auth(settings(**values), registry=registry, clock=now)
    app.state.ended = []
    if guarded:
        guard_routes(app, app.state.auth)

    @app.websocket("/echo")
    async def echo(websocket: WebSocket, user: CurrentUser, select: str | None = None):
        await websocket.accept(select)
        seen = {"user": user.id, "protocols": websocket.scope["subprotocols"]}
        await websocket.send_json({**seen, "header": websocket.headers.get("sec-websocket-protocol")})
        await until_closed(websocket)

    @app.websocket("/first")
    @public
    async def first(websocket: WebSocket):
        user = await authenticate_first_message(websocket, require_roles("reader"), require_scopes("read"), timeout=0.2)
        await websocket.send_text(user.id)
        await until_closed(websocket)

    return app


async def until_closed(websocket):
    """Record how receiving ends, and how sending fails after that."""
    ended = websocket.app.state.ended
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect as error:
        ended.append((error.code, error.reason))
    try:
        await websocket.send_text("more")
    except WebSocketDisconnect as error:
        ended.append(error.code)


def connect(app, path="/echo", subprotocols=None, **headers):
    return TestClient(app).websocket_connect(path, subprotocols=subprotocols, headers=headers)


def refusal(app, *offered, **headers):
    """Return the response to a handshake that is refused."""
    with pytest.raises(WebSocketDenialResponse) as refused, connect(app, "/echo", offered, **headers):
        pass
    return refused.value


def closing(websocket):
    """Return code and reason with which the server closes the WebSocket."""
    with pytest.raises(WebSocketDisconnect) as closed:
        websocket.receive_text()
    return closed.value.code, closed.value.reason


class TestSubprotocols:
    def test_token_is_read(self, app):
        """The marker is selected, and the handler sees neither the marker nor the token among the subprotocols."""
        with connect(app, "/echo", ["bearer", valid()]) as websocket:
            seen = websocket.receive_json()

        assert websocket.accepted_subprotocol == "bearer"
        assert seen == {"user": "alice", "protocols": [], "header": None}

    def test_handler_selects_another(self, app):
        """The others stay, in their order."""
        with connect(app, "/echo?select=v2", ["v1", "bearer", valid(), "v2"]) as websocket:
            seen = websocket.receive_json()

        assert websocket.accepted_subprotocol == "v2"
        assert seen == {"user": "alice", "protocols": ["v1", "v2"], "header": "v1, v2"}

    def test_handshake_without_the_marker_stays_as_it_is(self, app):
        """Nothing is selected for the handler."""
        with connect(app, "/echo", ["v1"], authorization=f"Bearer {valid()}") as websocket:
            seen = websocket.receive_json()

        assert (websocket.accepted_subprotocol, seen["protocols"], seen["header"]) == (None, ["v1"], "v1")

    @pytest.mark.parametrize(
        ("offered", "headers", "status", "reason"),
        [
            (["bearer"], {}, 401, "malformed"),
            (["v1", "bearer", ""], {}, 401, "malformed"),
            (["bearer", "v1"], {}, 401, "malformed"),
            (["bearer", secret_token(exp=NOW - 1, iat=None)], {}, 401, "expired"),
            (["bearer", token({"alg": "HS256"}, {"sub": "alice"}, hs256("x" * 40)).decode()], {}, 401, "signature"),
            (["bearer", valid(), "bearer", valid()], {}, 400, "several_credentials"),
            (["bearer", "T", "T"], {}, 400, "several_credentials"),
            (["T", "bearer", "T"], {}, 400, "several_credentials"),
            (["bearer", valid()], {"authorization": f"Bearer {valid()}"}, 400, "several_credentials"),
            (["bearer", valid()], {"authorization": "Basic YTpi"}, 400, "several_credentials"),
            (["bearer", valid()], {"x-api-key": KEY}, 400, "several_credentials"),
        ],
    )
    def test_what_is_not_one_valid_token_is_refused(self, app, registry, caplog, offered, headers, status, reason):
        """With the status and the metric of the same token in a header; neither response nor log repeats the token."""
        answer = refusal(app, *offered, **headers)

        assert answer.status_code == status
        assert registry.get_sample_value("http_server_refused_credentials_total", {"reason": reason}) == 1
        assert "sec-websocket-protocol" not in answer.headers
        told = f"{answer.headers} {answer.text} {caplog.text}"
        assert not any(each in told for each in offered if "." in each)

    @pytest.mark.parametrize("offered", [(), ("v1",), (valid(),), ("Bearer", valid()), (valid(), "bearers")])
    def test_token_without_the_marker_is_not_read(self, app, offered):
        """The marker is written exactly so."""
        assert refusal(app, *offered).status_code == 401

    def test_token_is_refused_where_only_keys_are_accepted(self):
        """As in the header."""
        app = service(guarded=True, secret=None, audience=[])

        answer = refusal(app, "bearer", valid())

        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "ApiKey")

    @pytest.mark.parametrize(
        "lines",
        [[b"v1,bearer", b"TOKEN"], []],
    )
    def test_server_has_parsed_the_header(self, lines):
        """It may come in several lines (RFC 6455 section 11.3.4), and some servers do not pass it on."""
        headers = [(b"sec-websocket-protocol", line) for line in lines]
        scope = {"type": "websocket", "headers": [*headers, (b"host", b"a")], "subprotocols": ["v1", "bearer", "TOKEN"]}

        GuardedWebSocket(scope, None, None)

        assert scope["headers"] == [
            (b"host", b"a"),
            (b"authorization", b"Bearer TOKEN"),
            (b"sec-websocket-protocol", b"v1"),
        ]
        assert scope["subprotocols"] == ["v1"]

    def test_time_grows_with_the_number_of_subprotocols(self):
        """And not with its square, which would stop the process for half a minute with one request."""
        looked_at = 0

        class Counted(str):
            __slots__ = ()

            def __eq__(self, other):
                nonlocal looked_at
                looked_at += 1
                return str.__eq__(self, other)

            __hash__ = str.__hash__

        names = [name for number in range(500) for name in ("bearer", Counted(number))]
        scope = {"type": "websocket", "headers": [], "subprotocols": names + [Counted("x")] * 1000}

        GuardedWebSocket(scope, None, None)

        assert looked_at < 10_000

    def test_public_route_does_not_see_the_token_either(self):
        """It is not looked at, and the marker is selected all the same."""
        app = service(guarded=True)

        @app.websocket("/open")
        @public
        async def opened(websocket: WebSocket):
            await websocket.accept()
            await websocket.send_json(websocket.scope["subprotocols"])

        with connect(app, "/open", ["bearer", "forged"]) as websocket:
            assert websocket.receive_json() == []
        assert websocket.accepted_subprotocol == "bearer"

    def test_mounted_app_has_the_same_caller(self):
        """Its own guard finds the token where the guard outside has put it."""
        outer = service(guarded=True)
        outer.mount("/sub", service(guarded=True))

        with connect(outer, "/sub/echo", ["bearer", valid()]) as websocket:
            assert websocket.receive_json()["user"] == "alice"
        assert websocket.accepted_subprotocol == "bearer"

    async def test_connection_whose_messages_nobody_guards_needs_the_header(self):
        """Nothing could select the marker, as in middleware of one's own."""
        scope = {"type": "websocket", "headers": [], "subprotocols": ["bearer", valid()]}

        assert await Auth(settings(), clock=now).authenticate(HTTPConnection(scope)) is None


class TestExpiry:
    def test_websocket_is_closed_when_the_token_expires(self, app):
        """With 3000; the handler sees a disconnect, and cannot send any more."""
        with connect(app, "/echo", ["bearer", valid(exp=SOON)]) as websocket:
            websocket.receive_json()
            assert closing(websocket) == (3000, "The token or key has expired.")

        assert app.state.ended == [(3000, "The token or key has expired."), 1006]

    @pytest.mark.parametrize(
        ("leeway", "headers"),
        [(60, {"authorization": f"Bearer {valid(exp=SOON - 60)}"}), (300, {"x-api-key": KEY})],
    )
    def test_leeway_is_for_the_clocks_of_issuers(self, leeway, headers):
        """A token is accepted for as much longer; an API key, whose expiry is of this clock, is not."""
        with connect(service(guarded=True, leeway=leeway), "/echo", **headers) as websocket:
            websocket.receive_json()
            assert closing(websocket)[0] == 3000

    def test_first_message_expires_too(self, app):
        """From then on it is as with a token of the handshake."""
        with connect(app, "/first") as websocket:
            websocket.send_text(f"Bearer {valid(exp=SOON)}")
            assert websocket.receive_text() == "alice"
            assert closing(websocket)[0] == 3000

        assert app.state.ended == [(3000, "The token or key has expired."), 1006]

    def test_messages_before_the_end_are_passed_on(self, app):
        """Each waits anew for the end."""
        with connect(app, "/echo", ["bearer", valid(exp=SOON)]) as websocket:
            websocket.receive_json()
            for _ in range(3):
                websocket.send_text("x")
            assert closing(websocket)[0] == 3000

    @pytest.mark.parametrize("values", [{"close_websockets": False}, {"leeway": 300}])
    def test_websocket_stays_open(self, values):
        """With AUTH_CLOSE_WEBSOCKETS=false, and before the token expires."""
        app = service(guarded=True, **values)

        @app.websocket("/later")
        async def later(websocket: WebSocket):
            await websocket.accept()
            await asyncio.sleep(0.1)
            await websocket.send_text("open")

        with connect(app, "/later", ["bearer", valid(exp=SOON)]) as websocket:
            assert websocket.receive_text() == "open"

    def test_websocket_that_is_accepted_late_is_closed_at_once(self, app):
        """A handshake is not closed: the server would answer it with 403."""

        @app.websocket("/late")
        async def late(websocket: WebSocket, user: CurrentUser):
            await asyncio.sleep(0.1)
            await websocket.accept()
            await until_closed(websocket)

        with connect(app, "/late", ["bearer", valid(exp=SOON)]) as websocket:
            assert closing(websocket)[0] == 3000

    def test_websocket_that_is_accepted_before_its_caller_is_known_is_closed(self):
        """Where the handler asks `Auth` itself, without a guard."""
        app = service(guarded=False)

        @app.websocket("/ask")
        async def ask(websocket: WebSocket):
            await websocket.accept()
            await app.state.auth.current_user(websocket)
            await until_closed(websocket)

        with connect(app, "/ask", authorization=f"Bearer {valid(exp=SOON)}") as websocket:
            assert closing(websocket)[0] == 3000

    def test_first_of_two_credentials_to_expire_counts(self):
        """Whichever is verified first."""
        app = service(guarded=True)
        other = Auth(settings(), clock=now)

        @app.websocket("/two", dependencies=[Depends(other.current_user)])
        async def two(websocket: WebSocket):
            other._clock = lambda: NOW - 3600
            await other.current_user(websocket)
            await websocket.accept()
            await until_closed(websocket)

        with connect(app, "/two", ["bearer", valid(exp=SOON)]) as websocket:
            assert closing(websocket)[0] == 3000

    def test_access_line_says_why_it_has_ended(self, capsys):
        """That is no refusal."""
        app = create_app(
            Settings(environment="test", log={"format": "json"}, auth=settings()), auth=Auth(settings(), clock=now)
        )

        @app.websocket("/echo")
        async def echo(websocket: WebSocket):
            await websocket.accept()
            await websocket.receive_text()

        with connect(app, "/echo", ["bearer", valid(exp=SOON)]) as websocket:
            assert closing(websocket)[0] == 3000

        line = access_line(capsys)
        assert (line["level"], line["end_reason"], line["user_id"]) == ("info", "token_expired", "alice")
        assert "reason" not in line


def access_line(capsys):
    [line] = [each for each in map(json.loads, capsys.readouterr().out.splitlines()) if each["event"] == "request"]
    return line


class TestMessages:
    """`GuardedWebSocket` alone, with a server that is a queue."""

    @pytest.fixture
    def server(self):
        return Server()

    async def test_timer_is_cancelled_when_the_app_closes(self, server):
        """So nothing is sent after it."""
        websocket = await server.opened(0.01)

        await websocket.send({"type": "websocket.close"})
        await asyncio.sleep(0.03)

        assert [each["type"] for each in server.sent] == ["websocket.accept", "websocket.close"]

    async def test_timer_is_cancelled_when_the_client_disconnects(self, server):
        """The app may take its time to end."""
        websocket = await server.opened(0.01)
        server.queue.put_nowait({"type": "websocket.disconnect", "code": 1001})

        await websocket.receive()
        await asyncio.sleep(0.03)

        assert [each["type"] for each in server.sent] == ["websocket.accept"]

    async def test_timer_ends_with_the_app(self):
        """However the app ends; the server closes the WebSocket."""
        app = service(guarded=True)
        found = []

        @app.websocket("/broken")
        async def broken(websocket: WebSocket):
            found.append(websocket.scope["fastapi_prodkit.websocket"])
            await websocket.accept()
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"), connect(app, "/broken", ["bearer", valid()]):
            pass

        assert found[0]._timer.cancelled()

    async def test_timer_ends_with_the_websocket_where_there_is_no_guard(self, server):
        """Nothing else tells when the app has ended."""
        websocket = WebSocket({"type": "websocket", "headers": []}, server.receive, server.send)
        guarded = GuardedWebSocket.of(websocket)
        guarded.close_in(60)
        server.queue.put_nowait({"type": "websocket.connect"})
        await websocket.accept()

        del websocket

        assert guarded._timer.cancelled()

    async def test_app_that_does_not_receive_cannot_send_any_more(self, server):
        """As after a disconnect (ASGI 2.4)."""
        websocket = await server.opened(0.01)
        await asyncio.sleep(0.03)

        with pytest.raises(OSError, match="has expired"):
            await websocket.send({"type": "websocket.send", "text": "x"})
        assert [each["type"] for each in server.sent] == ["websocket.accept", "websocket.close"]

    async def test_client_that_does_not_read_is_closed_for_the_app(self, server, monkeypatch):
        """The app does not wait for it any longer."""
        monkeypatch.setattr("fastapi_prodkit.auth.websockets._CLOSE_TIME", 0.01)
        websocket = await server.opened(0.01)
        server.is_blocked = True

        assert (await websocket.receive())["code"] == 3000
        assert (await websocket.receive())["code"] == 3000

    async def test_connection_that_is_lost_meanwhile_is_no_error(self, server):
        """Servers raise an OSError, or a RuntimeError."""
        for error in (OSError, RuntimeError):
            websocket = await server.opened(0.01)
            server.error = error

            assert (await websocket.receive())["code"] == 3000
            server.error = None

    async def test_time_out_of_the_server_is_its_own(self, server):
        """It is not taken for the end of the token."""
        websocket = await server.opened(60)
        server.queue.put_nowait(TimeoutError("mine"))

        with pytest.raises(TimeoutError, match="mine"):
            await websocket.receive()
        websocket.end()


class Server:
    """The side of the server: messages that it has got, and those that it will give."""

    def __init__(self):
        self.sent = []
        self.queue = asyncio.Queue()
        self.is_blocked = False
        self.error = None

    async def receive(self):
        message = await self.queue.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message):
        if self.is_blocked:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.sent.append(message)

    async def opened(self, seconds):
        websocket = GuardedWebSocket({"type": "websocket", "headers": []}, self.receive, self.send)
        websocket.close_in(seconds)
        await websocket.send({"type": "websocket.accept"})
        return websocket


class TestFirstMessage:
    def test_caller_is_known(self, app):
        """By what an Authorization header would be."""
        with connect(app, "/first") as websocket:
            websocket.send_text(f"Bearer {valid()}")
            assert websocket.receive_text() == "alice"

    @pytest.mark.parametrize(
        ("message", "expected", "reason"),
        [
            ("", (3000, "Unauthorized"), None),
            ("hello", (3000, "Unauthorized"), None),
            (b"Bearer", (3000, "Unauthorized"), None),
            (valid(), (3000, "Unauthorized"), None),
            ("Bearer ", (3000, "Unauthorized"), "malformed"),
            ("Bearer " + "\ud800", (3000, "Unauthorized"), "malformed"),
            ("Bearer " + valid() + "x" * 10_000, (3000, "Unauthorized"), "malformed"),
            (f"Bearer {secret_token(exp=NOW - 1, iat=None)}", (3000, "Unauthorized"), "expired"),
            (f"Bearer {valid(roles=[])}", (3003, "Forbidden"), None),
            (f"Bearer {valid(scope='write')}", (3003, "Forbidden"), None),
        ],
    )
    def test_what_is_not_a_caller_with_its_rights_is_refused(self, app, registry, message, expected, reason):
        """With a code that says whether another token would help, and the metric of the same token in a header."""
        with connect(app, "/first") as websocket:
            websocket.send_bytes(message) if isinstance(message, bytes) else websocket.send_text(message)
            assert closing(websocket) == expected

        if reason is not None:
            assert registry.get_sample_value("http_server_refused_credentials_total", {"reason": reason}) == 1

    def test_forged_messages_are_limited(self, app):
        """As forged tokens in a header are; 1013 says that the client may try again later."""
        codes = []
        for _ in range(11):
            with connect(app, "/first") as websocket:
                websocket.send_text("Bearer forged")
                codes.append(closing(websocket)[0])

        assert codes == [3000] * 10 + [1013]

    def test_message_that_does_not_come_is_a_time_out(self, app):
        """With 3008."""
        with connect(app, "/first") as websocket:
            assert closing(websocket) == (3008, "Request Timeout")

    @pytest.mark.parametrize("subprotocols", [None, ["bearer", valid()]])
    def test_credentials_of_the_handshake_count(self, app, subprotocols):
        """With them there are several."""
        headers = {} if subprotocols else {"authorization": f"Bearer {valid()}"}
        with connect(app, "/first", subprotocols, **headers) as websocket:
            websocket.send_text(f"Bearer {valid()}")
            assert closing(websocket) == (1008, "Bad Request")

    def test_client_may_disconnect_before(self, app):
        """That is no refusal, but a disconnect as of any other `receive`."""
        with pytest.raises(WebSocketDisconnect) as ended, connect(app, "/first") as websocket:
            websocket.close(1001)

        assert ended.value.code == 1001

    def test_handler_may_have_accepted_it(self, app):
        """With a subprotocol of its own; dependencies know the caller from then on."""

        @app.websocket("/accepted")
        @public
        async def accepted(websocket: WebSocket):
            await websocket.accept("v2")
            user = await authenticate_first_message(websocket)
            await websocket.send_text(user.id)

        with connect(app, "/accepted", ["v2"]) as websocket:
            websocket.send_text(f"Bearer {valid()}")
            assert (websocket.receive_text(), websocket.accepted_subprotocol) == ("alice", "v2")

    @pytest.mark.parametrize(
        ("message", "reason", "code"),
        [
            ("hello", "there are no credentials", "unauthenticated"),
            (f"Bearer {valid(roles=[])}", "the caller does not have the role reader", "forbidden"),
            (None, "no first message within 0.01 seconds", "request_timeout"),
        ],
    )
    def test_refusal_has_its_reason(self, registry, capsys, message, reason, code):
        """On the access line, and in the metric of all refusals."""
        auth = Auth(settings(), clock=now)
        app = create_app(
            Settings(environment="test", log={"format": "json"}, auth=settings()), auth=auth, registry=registry
        )

        @app.websocket("/first")
        @public
        async def first(websocket: WebSocket):
            await authenticate_first_message(websocket, require_roles("reader"), timeout=10 if message else 0.01)

        with connect(app, "/first") as websocket:
            if message:
                websocket.send_text(message)
            closing(websocket)

        line = access_line(capsys)
        assert (line["http_status"], line["level"], line["reason"]) == (101, "warning", reason)
        assert registry.get_sample_value("http_server_refusals_total", {"reason": code}) == 1

    def test_caller_is_on_the_access_line(self, capsys):
        """From the first message on."""
        app = create_app(
            Settings(environment="test", log={"format": "json"}, auth=settings()), auth=Auth(settings(), clock=now)
        )

        @app.websocket("/first")
        @public
        async def first(websocket: WebSocket):
            await authenticate_first_message(websocket)

        with connect(app, "/first") as websocket:
            websocket.send_text(f"Bearer {valid()}")

        assert access_line(capsys)["user_id"] == "alice"


def test_real_server_and_client_agree(registry):
    """On the marker, and on the close frame when the token expires."""
    client = pytest.importorskip("websockets.sync.client")
    exceptions = pytest.importorskip("websockets.exceptions")
    app = service(guarded=True, registry=registry)

    with serving(app) as port:
        url = f"ws://127.0.0.1:{port}"
        with client.connect(f"{url}/echo", subprotocols=["bearer", valid(exp=SOON)]) as websocket:
            assert json.loads(websocket.recv())["user"] == "alice"
            with pytest.raises(exceptions.ConnectionClosed) as closed:
                websocket.recv()
        with client.connect(f"{url}/first") as other:
            other.send("Bearer forged")
            with pytest.raises(exceptions.ConnectionClosed) as refused:
                other.recv()
        with pytest.raises(exceptions.InvalidStatus) as denied:
            client.connect(f"{url}/echo", subprotocols=["bearer", "forged"])

    assert websocket.subprotocol == "bearer"
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (3000, "The token or key has expired.")
    assert refused.value.rcvd.code == 3000
    assert denied.value.response.status_code == 401
    assert app.state.ended == [(3000, "The token or key has expired."), 1006]


PAGE = """<!doctype html><script>
const report = (text) => fetch(`/report/${text}`);
const marked = new WebSocket(`ws://${location.host}/echo`, ["bearer", "TOKEN", "v2"]);
marked.onmessage = () => report(`marked ${marked.protocol}`);
const first = new WebSocket(`ws://${location.host}/first`);
first.onopen = () => first.send("Bearer TOKEN");
first.onmessage = (event) => report(`first ${event.data}`);
first.onclose = (event) => report(`first closed ${event.code}`);
const ignored = new WebSocket(`ws://${location.host}/ignored`, ["other"]);
ignored.onopen = () => report("ignored is open");
ignored.onerror = () => report("ignored fails");
</script>"""


@pytest.mark.system
@needs_browser
def test_browser_opens_both():
    """And fails a handshake whose subprotocols were all ignored, which is why the marker is selected."""
    app = service(guarded=True)
    reports, complete = set(), threading.Event()

    @app.get("/")
    @public
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.replace("TOKEN", valid(exp=SOON)))

    @app.get("/report/{text}")
    @public
    async def report(text: str):
        reports.add(text)
        if len(reports) == 4:
            complete.set()

    @app.websocket("/ignored")
    @public
    async def ignored(websocket: WebSocket):
        await websocket.accept()
        await until_closed(websocket)

    with serving(app) as port, opened(f"http://127.0.0.1:{port}/"):
        complete.wait(20)

    assert reports == {"marked bearer", "first alice", "first closed 3000", "ignored fails"}
