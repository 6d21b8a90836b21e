"""Call apps through their ASGI interface, without a server, and time the calls.

Rounds are short and interleaved, and the fastest third of the rounds counts, in CPU time: what else runs on the machine
spoils the others.
"""

import asyncio
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "App",
    "Output",
    "Request",
    "answer",
    "call",
    "fastest_third",
    "in_another_process",
    "interleave",
    "output",
    "scope_of",
    "time_calls",
]

CALLS_PER_ROUND = 30

App = Callable[..., Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]


class Request(NamedTuple):
    method: str
    path: str
    body: bytes = b""
    headers: Headers = ()  # beside those of every request


class Answer(NamedTuple):
    """What an app has sent; `whole` if that was one start of a response, and then its body to the end."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    whole: bool
    client: str  # as the app has left it


def scope_of(method: str, path: str, body: bytes = b"", headers: Headers = ()) -> dict[str, Any]:
    """Return what uvicorn hands over for a request that a browser sent through a load balancer."""
    lines = [
        (b"host", b"api.example.com"),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64)"),
        (b"accept", b"application/json"),
        (b"accept-encoding", b"gzip, deflate, br"),
        (b"origin", b"https://app.example.com"),
        (b"x-forwarded-for", b"198.51.100.7"),
        (b"x-forwarded-proto", b"https"),
    ]
    if body:
        lines += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": lines,
        "client": ("10.0.0.5", 40000),
        "server": ("10.0.0.9", 8000),
        "state": {},
    }


async def call(app: App, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> int:
    """Return the status of the answer."""
    status, connection = 0, Connection(body)

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif not message.get("more_body", False):
            connection.close()

    await app(scope_of(method, path, body, headers), connection.receive, send)
    return status


class Connection:
    """What a server lets an app receive: the body, and after the response that the client has gone."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._closed = False
        self._waiting: asyncio.Event | None = None

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._closed:
            self._waiting = self._waiting or asyncio.Event()
            await self._waiting.wait()
        return {"type": "http.disconnect"}

    def close(self) -> None:
        self._closed = True
        if self._waiting is not None:
            self._waiting.set()


async def answer(app: App, request: Request, **entries: Any) -> Answer:
    """Return all of the answer to a request whose scope has these entries; an app that raises has answered 500."""
    messages: list[dict[str, Any]] = []
    scope, connection = scope_of(*request) | entries, Connection(request.body)

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            connection.close()

    try:
        await app(scope, connection.receive, send)
    except Exception as error:  # noqa: BLE001 - reported by the caller, which expects another status
        return Answer(500, {}, repr(error).encode(), whole=False, client="")
    start, *chunks = messages
    whole = all(chunk["type"] == "http.response.body" for chunk in chunks) and not chunks[-1].get("more_body", False)
    return Answer(
        status=start["status"],
        headers={name.lower(): value for name, value in start["headers"]},
        body=b"".join(chunk.get("body", b"") for chunk in chunks),
        whole=whole,
        client=scope["client"][0],
    )


async def time_calls(
    app: App, request: Request, calls: int = CALLS_PER_ROUND, clock: Callable[[], float] = time.process_time
) -> float:
    """Return seconds per call."""
    start = clock()
    for _ in range(calls):
        await call(app, *request)
    return (clock() - start) / calls


async def interleave(
    apps: Mapping[str, App], request: Request, rounds: int, calls: int = CALLS_PER_ROUND
) -> dict[str, float]:
    """Return CPU seconds per call of each app, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds):
        for name, app in apps.items():
            times[name].append(await time_calls(app, request, calls))
    return {name: fastest_third(own) for name, own in times.items()}


def fastest_third(seconds: list[float]) -> float:
    """Return the mean of the rounds that nothing else on the machine has slowed down."""
    return statistics.mean(sorted(seconds)[: math.ceil(len(seconds) / 3)])


_CALL = """
import importlib, json, sys
module, function, *arguments = json.loads(sys.argv[1])
print(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))
"""


def in_another_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function of a module here returns in a new process, which nothing has configured yet.

    Arguments and result are sent as JSON. It is no child of `multiprocessing`, which `create_app` would take for one of
    several workers.
    """
    module = Path(function.__code__.co_filename)
    named = json.dumps([module.stem, function.__name__, *arguments])
    run = subprocess.run(
        [sys.executable, "-c", _CALL, named],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(module.parent)},
    )
    if run.returncode != 0:
        raise SystemExit(f"{named} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


class Output:
    """Standard output while apps are measured: lines go to /dev/null, or to a file while they are counted."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    @contextmanager
    def kept(self) -> Iterator[Callable[[], str]]:
        """Return a function that returns what was written since then."""
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), self._stream.fileno())

            def text() -> str:
                self._stream.flush()
                file.seek(0)
                return file.read().decode()

            try:
                yield text
            finally:
                _discard(self._stream)


def _discard(stream: io.TextIOWrapper) -> None:
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def output() -> Iterator[Output]:
    """Take standard output away from the apps; what is written to the former `sys.stdout` still arrives."""
    with io.TextIOWrapper(open(os.devnull, "wb"), write_through=True) as stream:  # noqa: PTH123 - a device
        stdout, sys.stdout = sys.stdout, stream
        try:
            yield Output(stream)
        finally:
            sys.stdout = stdout
