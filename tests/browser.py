"""Run a headless browser, for tests about what a page may load, and what a person can do with it."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from starlette.responses import FileResponse, Response
from websockets.sync.client import ClientConnection, connect
from wire import serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs the program chromium or google-chrome")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
_DUMPING = "--enable-logging=stderr --v=0 --virtual-time-budget=10000 --dump-dom"
_TIMEOUT = 20  # seconds that a page may take for one step


class Page(NamedTuple):
    """The result of a visit: the elements after all scripts have run, and the messages of the console."""

    dom: str
    complaints: list[str]


def visit(url: str, *flags: str) -> Page:
    """Open a page in a new browser."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        run = subprocess.run(
            [BROWSER, *_FLAGS.split(), *_DUMPING.split(), *flags, f"--user-data-dir={profile}", url],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    return Page(run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line])


class Tab:
    """A tab that stays open, driven by the Chrome DevTools Protocol.

    Attributes:
        complaints: The errors and warnings in the console, with their source.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = count(1)
        self._session: str | None = None
        self.complaints: list[tuple[str, str]] = []
        self._password: str | None = None
        self._is_loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, password: str | None = None) -> None:
        """Open a page with all that it names, and enter a password if the browser asks for one; later it knows it."""
        self._password, self._is_loaded = password, False
        if password is not None:
            self._call("Fetch.enable", handleAuthRequests=True)
        self._call("Page.navigate", url=url)
        while not self._is_loaded:
            self._handle(self._receive())
        self._call("Fetch.disable")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression as soon as it is true, as if a person had caused what it does."""
        wait = f"new Promise(done => {{ const look = () => {{ let found; try {{ found = {expression} }} catch {{}}"
        wait += " found ? done(found) : setTimeout(look, 20) }; look() })"
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        return self._call("Runtime.evaluate", expression=wait, **options)["result"].get("value")

    def click(self, selector: str) -> None:
        """Click an element as soon as it is there."""
        self.evaluate(f"(each => (each.click(), true))(document.querySelector({json.dumps(selector)}))")

    def enter(self, selector: str, text: str) -> None:
        """Replace the text of a field by another one."""
        self.evaluate(f"(each => (each.focus(), each.select(), true))(document.querySelector({json.dumps(selector)}))")
        self._call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        """Return the text of an element as soon as it has one."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, parameters)
        while (message := self._receive()).get("id") != number:
            self._handle(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def _send(self, method: str, parameters: Mapping[str, Any]) -> int:
        number = next(self._numbers)
        session = {} if self._session is None else {"sessionId": self._session}
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        return number

    def _receive(self) -> dict[str, Any]:
        return json.loads(self._connection.recv(_TIMEOUT))

    def _handle(self, message: Mapping[str, Any]) -> None:
        event, said = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._is_loaded = True
        elif event == "Log.entryAdded":
            self.complaints.append((said["entry"]["source"], said["entry"]["text"]))
        elif event == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": said["requestId"]})
        elif event == "Fetch.authRequired":
            entered = {"response": "ProvideCredentials", "username": "someone", "password": self._password}
            self._send("Fetch.continueWithAuth", {"requestId": said["requestId"], "authChallengeResponse": entered})


@contextmanager
def driven_tab() -> Iterator[Tab]:
    """Start a new browser, and yield a tab of it."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *_FLAGS.split(), "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            try:
                assert browser.stderr is not None
                address = next(line for line in browser.stderr if "DevTools listening on " in line).split()[-1]
                with connect(address, max_size=None) as connection:
                    yield Tab(connection)
            finally:
                browser.terminate()


@contextmanager
def opened(url: str) -> Iterator[None]:
    """Keep a page open in a new browser, in real time: `visit` does not wait for WebSockets."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *_FLAGS.split(), f"--user-data-dir={profile}", url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                yield
            finally:
                browser.terminate()


@contextmanager
def other_hosts(files: Mapping[str, Path]) -> Iterator[tuple[str, ...]]:
    """Serve files over TLS for all other hosts; yield the options with which a browser resolves these hosts to it."""

    async def app(scope, receive, send):
        file = files.get(scope["path"])
        response = FileResponse(file) if file else Response(status_code=404)
        await response(scope, receive, send)

    leaf = trustme.CA().issue_cert("*.example.com")  # the browser is started with the option to ignore it
    with leaf.private_key_and_cert_chain_pem.tempfile() as certificate, serving(app, certificate=certificate) as port:
        yield f"--host-resolver-rules=MAP *:443 127.0.0.1:{port}", "--ignore-certificate-errors"
