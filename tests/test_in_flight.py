"""Requests in flight at the end of the process; `test_shutdown.py` ends real processes."""

import asyncio
import json
import threading

import pytest

from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.in_flight import abandon, cut_requests, exchanges_in, frames_of
from fastapi_prodkit._pipeline.layers import LayerStack
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware

START = {"type": "http.response.start", "status": 200}


@pytest.fixture(autouse=True)
def _lines_of_every_level(caplog):
    caplog.set_level("INFO", "fastapi_prodkit")


class InFlight:
    """A request that is served in a task, and the messages that it has sent."""

    def __init__(self, *messages, kind="http", ending=(), inner=LayerStack):
        self.messages = messages
        self.ending = ending  # further messages, for an app that swallows its cancellation
        self.sent = []
        self.waiting = asyncio.Event()
        self.scope = {"type": kind, "method": "GET", "path": "/", "headers": []}
        app = inner([ErrorBoundaryMiddleware(self.app)], self.app)
        self.app_around = LayerStack([AccessLogMiddleware(app)], app)

    async def app(self, scope, receive, send):
        for message in self.messages:
            await send(message)
        self.waiting.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            if not self.ending:
                raise
        for message in self.ending:
            await send(message)

    async def receive(self):
        return {"type": "http.request"}

    async def send(self, message):
        self.sent.append(message)

    async def start(self):
        self.task = asyncio.create_task(self.app_around(self.scope, self.receive, self.send))
        await self.waiting.wait()
        return self

    def exchanges(self):
        return list(exchanges_in(frames_of(self.task)))


async def cut(request):
    """Cut the requests of this event loop, and wait for the given one."""
    assert cut_requests(asyncio.get_running_loop()) == 1
    await asyncio.wait([request.task])
    return request


def lines(caplog):
    return [(record.http_status, record.levelname, getattr(record, "reason", None)) for record in caplog.records]


async def test_exchanges_in_finds_the_outermost_exchange():
    """A task without a request has none."""
    request = await InFlight().start()

    [exchange] = request.exchanges()

    assert isinstance(exchange, Exchange)
    assert exchange.outer is None
    assert list(exchanges_in(frames_of(asyncio.current_task()))) == []
    await cut(request)


@pytest.mark.parametrize("ending", [(), (START, {"type": "http.response.body"})])
async def test_cut_request_without_a_response_is_a_503_problem(ending, caplog):
    """Even if the app ignores its cancellation."""
    request = await cut(await InFlight(ending=ending).start())

    start, body = request.sent
    assert start["status"] == 503
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert json.loads(body["body"])["status"] == 503
    reason = "no response before the process ended; SHUTDOWN_GRACE limits the time for it"
    assert lines(caplog) == [(503, "WARNING", reason)]


async def test_cut_request_with_a_response_is_aborted(caplog):
    """A request cut after its response has started gets no second response and is logged as cancelled with 499."""
    request = await cut(await InFlight(START).start())

    assert request.sent == [START]
    assert request.task.cancelled()
    assert lines(caplog) == [(499, "INFO", None)]
    assert caplog.records[0].end_reason == "cancelled"


async def test_cut_request_cancels_background_tasks(caplog):
    """Its status stays."""
    await cut(await InFlight(START, {"type": "http.response.body"}).start())

    assert lines(caplog) == [(200, "INFO", None)]


async def test_cut_skips_cancelled_requests_and_websockets():
    """Cutting requests leaves out those that a deadline has already cancelled, and WebSockets."""
    late = await InFlight().start()
    [exchange] = late.exchanges()
    exchange.task = late.task
    exchange.interrupt(Answer())
    websocket = await InFlight(kind="websocket").start()

    assert cut_requests(asyncio.get_running_loop()) == 0

    websocket.task.cancel()
    await asyncio.wait([late.task, websocket.task])
    assert [message.get("status") for message in late.sent] == [504, None]


class Answer:
    """An answer in place of the app's."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 504})
        await send({"type": "http.response.body"})


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ((), (503, "WARNING", "no response: the process exited while the handler ran")),
        ((START,), (499, "INFO", None)),
        ((START, {"type": "http.response.body"}), (200, "INFO", None)),
    ],
)
async def test_abandon_writes_the_line_of_a_request(messages, line, caplog):
    """In the thread that ends the process."""
    request = await InFlight(*messages).start()
    [exchange] = request.exchanges()

    thread = threading.Thread(target=abandon, args=[exchange])
    thread.start()
    thread.join()

    assert lines(caplog) == [line]
    request.task.cancel()
    await asyncio.wait([request.task])
