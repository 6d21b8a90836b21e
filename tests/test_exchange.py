"""The exchange: hooks of layers alone, side by side, and nested."""

import asyncio
import json
import logging
import sys
from contextlib import suppress
from types import coroutine

import pytest
from garbage import none_left

from fastapi_prodkit import _context
from fastapi_prodkit._pipeline.edge import Edge
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, LayerStack
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.logging import configure_logging
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.sections import LimitsSettings, ProxySettings


def scope_of(kind="http", *headers):
    return {"type": kind, "method": "GET", "path": "/", "headers": list(headers)}


class Server:
    """Record what the app sends, and offer messages to receive; after the last one, the client has disconnected."""

    def __init__(self, *messages):
        self.messages = list(messages)
        self.sent = []

    async def receive(self):
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def call(self, app, scope=None):
        await app(scope or scope_of(), self.receive, self.send)
        return self.sent


async def ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"ok"})


class Note(Layer):
    """Record each call, and add a header with the layer's name."""

    def __init__(self, app, name, notes, *, answer=None):
        self.app = app
        self.name = name
        self.notes = notes
        self.answer = answer
        self.may_answer = answer is not None

    def on_request(self, exchange):
        self.notes.append(f"{self.name} enters")
        return self.answer

    def on_response_start(self, exchange, headers, present):
        self.notes.append(f"{self.name} sees {exchange.status}")
        headers.append((b"x-name", self.name.encode()))

    def on_end(self, exchange):
        self.notes.append(f"{self.name} leaves with {exchange.status}")


class Keep(Layer):
    """Keep the exchange, and set a header in place of the app's."""

    may_answer = False

    def __init__(self, app, *, settles=False):
        self.app = app
        self.settles = settles
        self.exchange = None

    def on_request(self, exchange):
        self.exchange = exchange
        exchange.response_headers[b"x-kept"] = b"ours"

    def on_end(self, exchange):
        self.exchange = exchange

    def on_error(self, exchange, error):
        return self.settles


ORDER = ["a enters", "b enters", "b sees 200", "a sees 200", "b leaves with 200", "a leaves with 200"]


async def test_nested_layers_run_outside_in_and_inside_out():
    """Nested layers see the request from the outside in, and the response from the inside out."""
    notes = []

    start, _ = await Server().call(Note(Note(ok, "b", notes), "a", notes))

    assert notes == ORDER
    assert start["headers"] == [(b"x-name", b"b"), (b"x-name", b"a")]


async def test_layers_of_one_stack_run_outside_in_and_inside_out():
    """Layers of one LayerStack see the request in list order, and the response in reverse order."""
    notes = []

    start, _ = await Server().call(LayerStack([Note(None, "a", notes), Note(None, "b", notes)], ok))

    assert notes == ORDER
    assert start["headers"] == [(b"x-name", b"b"), (b"x-name", b"a")]


async def test_layer_serves_many_requests():
    """A layer runs all its hooks for each request and keeps no state of an earlier request."""
    notes = []
    app = Note(Note(ok, "b", notes), "a", notes)

    for _ in range(2):
        await Server().call(app)

    assert notes == ORDER * 2


@pytest.mark.parametrize("nested", [True, False])
async def test_answering_layer_hides_the_request_from_inner_layers(nested):
    """Outer layers see the answer."""
    notes = []

    async def app(scope, receive, send):
        raise AssertionError

    if nested:
        app = Note(Note(app, "b", notes, answer=ok), "a", notes)
    else:
        app = LayerStack([Note(None, "a", notes), Note(None, "b", notes, answer=ok), Named("c")], app)

    _, body = await Server().call(app)

    assert notes == ORDER
    assert body["body"] == b"ok"


async def test_layer_without_hooks_changes_nothing():
    """A layer that overrides no hook passes on the response of the app unchanged."""
    piece = Layer()
    piece.app = ok

    start, body = await Server().call(piece)

    assert (start, body["body"]) == ({"type": "http.response.start", "status": 200}, b"ok")


async def test_layer_ignores_other_scope_types():
    """An HTTP layer passes WebSocket and lifespan scopes to the app without running its hooks."""
    notes, seen = [], []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    piece = Note(app, "a", notes)
    await Server().call(piece, scope_of("websocket"))
    await Server().call(piece, {"type": "lifespan"})

    assert (notes, seen) == ([], ["websocket", "lifespan"])


@pytest.mark.parametrize("name", [b"x-kept", b"X-Kept"])
async def test_header_of_a_layer_replaces_that_of_the_app(name):
    """Names are sent in lower case."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Own", b"A"), (name, b"app's")]})
        await send({"type": "http.response.body"})

    start, _ = await Server().call(Keep(app))

    assert start["headers"] == [(b"x-own", b"A"), (b"x-kept", b"ours")]


async def test_repeated_headers_of_the_app_stay():
    """Repeated headers of the app, such as Set-Cookie, stay separate lines if a layer adds a header."""
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": cookies})
        await send({"type": "http.response.body"})

    start, _ = await Server().call(Keep(app))

    assert start["headers"] == [*cookies, (b"x-kept", b"ours")]


async def test_header_values_returns_every_line():
    """`headers` has the last one."""
    keep = Keep(ok)

    await Server().call(keep, scope_of("http", (b"host", b"a"), (b"accept", b"b"), (b"host", b"c")))

    assert keep.exchange.headers == {b"host": b"c", b"accept": b"b"}
    assert keep.exchange.header_values(b"host") == [b"a", b"c"]
    assert keep.exchange.header_values(b"cookie") == []


@pytest.mark.parametrize("root_path", ["", "/sub"])
async def test_stack_inside_of_a_layer_serves(root_path):
    """Mounted or not."""
    notes = []
    inner = LayerStack([Note(None, "b", notes)], ok)

    async def mount(scope, receive, send):
        scope["root_path"] = root_path
        await inner(scope, receive, send)

    start, _ = await Server().call(Note(mount, "a", notes))

    assert notes == ["a enters", "b enters", "b sees 200", "a sees 200", "b leaves with 200", "a leaves with 200"]
    assert start["headers"] == [(b"x-name", b"b"), (b"x-name", b"a")]


async def test_layer_of_a_mounted_app_sees_its_paths():
    """A layer of a mounted app sees the path below root_path, while an outer layer sees the full path."""
    keep = Keep(ok)

    async def mount(scope, receive, send):
        scope["root_path"] = "/sub"
        await keep(scope, receive, send)

    outer = Keep(mount)
    await Server().call(outer, {**scope_of(), "path": "/sub/health/"})

    assert (outer.exchange.path, keep.exchange.path) == ("/sub/health", "/health")


async def test_finished_exchange_is_not_in_the_scope():
    """It would be a reference cycle."""
    scope = scope_of()

    await Server().call(Note(Keep(ok), "a", []), scope)

    assert not any(isinstance(value, Exchange) for value in scope.values())


async def test_layer_may_add_to_the_context():
    """The context ends with the request."""
    seen = []

    class Add(Layer):
        app = None

        def on_request(self, exchange):
            exchange.context["user"] = "u1"

    async def app(scope, receive, send):
        seen.append(_context.current())
        _context.bind(step=1)
        await ok(scope, receive, send)

    await Server().call(LayerStack([Add()], app))

    assert seen == [{"user": "u1", "step": 1}]
    assert _context.current() is None


async def test_layer_may_swallow_an_exception():
    """A layer whose on_error returns True suppresses the exception of the app, and the status is 500."""

    async def app(scope, receive, send):
        raise RuntimeError

    keep = Keep(app, settles=True)

    await Server().call(keep)

    assert keep.exchange.status == 500
    assert _context.current() is None


@pytest.mark.parametrize("make", [Keep, lambda app: Note(app, "a", [])])
async def test_exception_has_the_context_of_its_request(make, capsys):
    """For the server's own record."""

    async def app(scope, receive, send):
        _context.bind(user="u1")
        raise RuntimeError("at once")

    configure_logging()
    server = logging.getLogger("server")

    try:
        await Server().call(make(app))
    except RuntimeError as error:
        server.error("failed", exc_info=error)
    server.error("another")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("user") for line in lines] == ["u1", None]
    assert _context.current() is None


async def test_answer_of_a_layer_has_the_body_timeout():
    """body_timeout also ends an answer of an inner layer that waits for the body, with a 408."""

    class Reading(Layer):
        def on_request(self, exchange):
            return read

    async def read(scope, receive, send):
        await receive()

    async def never():
        await asyncio.Event().wait()

    limited = LayerStack([BodyLimitMiddleware(None, LimitsSettings(body_timeout=0.01)), Reading()], ok)

    for _ in range(2):
        server = Server()
        server.receive = never
        start, _ = await server.call(limited, {**scope_of("http", (b"content-length", b"1")), "http_version": "1.1"})
        assert start["status"] == 408


async def test_exception_is_reraised_by_default():
    """An exception of the app is raised to the server if the layer uses on_error of the base class."""

    class Noting(Layer):
        app = None

        def on_error(self, exchange, error):
            noted.append(error)
            return super().on_error(exchange, error)

    async def app(scope, receive, send):
        raise KeyError("noted")

    noted = []

    with pytest.raises(KeyError, match="noted"):
        await Server().call(LayerStack([Noting()], app))
    assert [type(error) for error in noted] == [KeyError]


@pytest.mark.parametrize("answers", [True, False])
async def test_disconnect_stays_recorded(answers):
    """Whatever the app sends before it is cancelled."""

    async def app(scope, receive, send):
        await receive()
        if answers:
            await ok(scope, receive, send)
        raise asyncio.CancelledError

    keep = Keep(app)

    with pytest.raises(asyncio.CancelledError):
        await Server().call(keep)

    assert (keep.exchange.status, keep.exchange.complete) == (499, answers)


async def test_layer_below_a_copied_scope_uses_the_copy():
    """In the same context."""
    seen = {}

    async def app(scope, receive, send):
        seen.update(client=scope["client"], context=_context.current())
        await ok(scope, receive, send)

    proxy = ProxyHeadersMiddleware(app, ProxySettings(trusted=("10.0.0.0/8",)))

    async def copying(scope, receive, send):
        await proxy(dict(scope), receive, send)

    scope = scope_of() | {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"198.51.100.7")]}
    await Server().call(RequestIDMiddleware(copying), scope)

    assert seen["client"] == ("198.51.100.7", 0)
    assert "request_id" in seen["context"]


class Named(Layer):
    """A layer with `on_request` only."""

    def __init__(self, name):
        self.name = name

    def on_request(self, exchange): ...


class Ending(Layer):
    """A layer with `on_end` only."""

    def on_end(self, exchange): ...


class Delay(Layer):
    """A layer that delays the request."""

    def __init__(self, app):
        self.app = app

    def on_request(self, exchange):
        async def wait(scope, receive, send):
            await asyncio.sleep(0)
            exchange.response_headers[b"x-door"] = b"open"
            await exchange.call_inner(receive, send)

        return wait


async def test_cancelling_layer_alone_opens_an_exchange():
    """Which sends its headers."""
    start, _ = await Server().call(Delay(ok))

    assert (b"x-door", b"open") in start["headers"]


async def test_cancelling_layer_in_a_stack_uses_its_exchange():
    """Cancelling layers in one stack share one exchange, so that each message is processed once."""
    seen = []

    async def app(scope, receive, send):
        seen.append(Exchange.innermost(scope))
        await ok(scope, receive, send)

    await Server().call(LayerStack([Delay(None)], Delay(Delay(app))))

    assert seen[0].response_headers == {b"x-door": b"open"}


@pytest.mark.parametrize("nested", [True, False])
async def test_exempt_request_calls_no_hook_of_the_layer(nested):
    """For GET and HEAD; other layers and methods as usual."""
    notes, statuses = [], []
    outer, inner = Note(ok, "a", notes), Note(ok, "b", notes)
    outer.exempt, inner.exempt = {"/health", "/"}, ["/health"]
    outer.app = inner
    app = outer if nested else LayerStack([outer, inner], ok)

    for method, path in (("GET", "/health/"), ("HEAD", "/health"), ("GET", "/"), ("POST", "/"), ("GET", "/other")):
        start, _ = await Server().call(app, scope_of() | {"method": method, "path": path})
        statuses.append([value.decode() for name, value in start.get("headers", ())])

    assert statuses == [[], [], ["b"], ["b", "a"], ["b", "a"]]
    assert notes == [*ORDER[1:3], ORDER[4], *ORDER * 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [Delay(None), Note(None, "a", [])],
            "Note is behind Delay.*on_response_start and on_end of Note",
        ),
        ([Note(None, "a", [], answer=ok), Keep(None)], "Keep is behind Note, .*; on_end of Keep"),
        ([Delay(None), Delay(None), Ending()], "Ending is behind Delay"),
    ],
)
def test_layer_with_response_hooks_behind_an_answering_layer_is_refused(layers, message):
    """A layer with response hooks behind a layer that may answer is a ConfigurationError at construction."""
    for make in (lambda: LayerStack(layers, ok), lambda: Edge(layers)):
        with pytest.raises(ConfigurationError, match=message):
            make()


def test_answering_layer_may_have_response_hooks():
    """LayerStack accepts response hooks on an answering layer and behind layers that never answer."""
    LayerStack([Note(None, "a", []), Keep(None), Note(None, "b", [], answer=ok), Delay(None), Named("c")], ok)


class Start(Layer):
    """Record since when the app has the request."""

    may_cancel_app = True

    def __init__(self, app=None):
        self.app = app
        self.told = []

    def on_wait(self, exchange, since):
        self.told.append((exchange, since, exchange.task))


async def test_on_wait_is_called_once_before_the_app():
    """In the task that serves the request."""

    async def app(scope, receive, send):
        told.append(len(watch.told))
        await asyncio.sleep(0)
        await ok(scope, receive, send)

    told, watch = [], Start(app)
    sent = await Server().call(watch)

    [(exchange, since, task)] = watch.told
    assert (told, len(sent)) == ([1], 2)
    assert (since, task) == (exchange.started_at, asyncio.current_task())


async def test_on_wait_does_not_count_a_delay_by_a_layer():
    """The start time passed to on_wait lies after the delay by a layer, not at the arrival of the request."""
    watch = Start()

    await Server().call(LayerStack([watch, Delay(None)], ok))

    [(exchange, since, task)] = watch.told
    assert since > exchange.started_at
    assert task is asyncio.current_task()


async def test_handled_exception_is_not_current_later():
    """An exception that the app has handled is not in sys.exc_info or in the context of a later exception."""

    async def fail():
        await asyncio.sleep(0)
        raise LookupError

    async def app(scope, receive, send):
        with suppress(LookupError):
            await asyncio.create_task(fail())
        seen.append(sys.exc_info()[1])
        raise KeyError

    seen = []

    with pytest.raises(KeyError) as caught:
        await Server().call(RequestIDMiddleware(app))

    assert seen == [None]
    assert caught.value.__context__ is None


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError])
async def test_failed_request_leaves_no_reference_cycle(error, waits):
    """A request that fails with an error or a cancellation leaves no cycle for the garbage collector."""

    async def app(scope, receive, send):
        if waits:
            await asyncio.sleep(0)
        raise error

    served = RequestIDMiddleware(app)
    with none_left(), suppress(error):
        await Server().call(served)


@pytest.mark.parametrize("further", [0, 1, 2])
async def test_cancellation_arrives_where_the_app_awaits(further):
    """The app may await again."""

    async def app(scope, receive, send):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(30)
        for _ in range(further):
            await asyncio.sleep(0)
        await ok(scope, receive, send)

    server = Server()
    task = asyncio.create_task(server.call(Start(app)))
    await asyncio.sleep(0)
    task.cancel()
    await task

    assert [message.get("status") for message in server.sent] == [200, None]


def test_layer_without_cancellation_runs_under_trio():
    """A layer that never cancels the app does not need asyncio, so another event loop can run the layer."""

    @coroutine
    def turn():
        return (yield "to the event loop")

    async def app(scope, receive, send):
        answers.append([await turn() for _ in range(3)])
        await ok(scope, receive, send)

    server, answers = Server(), []
    serving = server.call(RequestIDMiddleware(app))

    for answer in (None, "first", None):
        assert serving.send(answer) == "to the event loop"
    with pytest.raises(StopIteration):
        serving.send("third")
    assert answers == [["first", None, "third"]]
    assert len(server.sent) == 2


async def test_call_inner_continues_with_the_inner_layers():
    """Layers behind a layer that waits see the request after the wait, in the order of the stack."""
    order = []

    class Named(Layer):
        def __init__(self, name):
            self.name = name

        def on_request(self, exchange):
            order.append(self.name)

    await Server().call(LayerStack([Named("a"), Delay(None), Named("b"), Delay(None), Named("c")], ok))

    assert order == ["a", "b", "c"]


class Interrupting(Layer):
    """Interrupts the app shortly after its start."""

    may_cancel_app = True

    def __init__(self, app, *, times=1):
        self.app = app
        self.times = times
        self.exchange = None

    def on_request(self, exchange):
        self.exchange = exchange
        exchange.task = asyncio.current_task()
        for _ in range(self.times):
            asyncio.get_running_loop().call_soon(exchange.interrupt, ok)

    def on_end(self, exchange): ...


async def late(scope, receive, send):
    await asyncio.sleep(60)


async def stubborn(scope, receive, send):
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"late"})


@pytest.mark.parametrize("app", [late, stubborn])
@pytest.mark.parametrize("times", [1, 2])
async def test_interruption_answers_in_place_of_the_app(app, times):
    """Once; later messages of the app are dropped, and the task continues."""
    bell = Interrupting(app, times=times)

    start, body = await Server().call(bell)

    assert (start["status"], body["body"]) == (200, b"ok")
    assert (bell.exchange.status, bell.exchange.client_disconnected) == (200, False)
    assert asyncio.current_task().cancelling() == 0


async def test_exception_of_an_interrupted_app_is_reraised():
    """After the answer."""

    async def app(scope, receive, send):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("while it ended") from None

    bell = Interrupting(app)
    server = Server()

    with pytest.raises(ValueError, match="while it ended"):
        await server.call(bell)

    assert [message["type"] for message in server.sent] == ["http.response.start", "http.response.body"]


async def test_started_response_is_not_interrupted():
    """An interruption has no effect once the response has started: the app's response is sent in full."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"mine"})

    start, body = await Server().call(Interrupting(app))

    assert (start["status"], body["body"]) == (201, b"mine")


async def test_cancellation_from_outside_passes_an_interruption():
    """A task that is cancelled from outside ends as cancelled, even if a layer has interrupted the app."""
    server = Server()
    task = asyncio.create_task(server.call(Interrupting(late)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert task.cancelled()
