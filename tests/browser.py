"""Run a headless browser, for tests about what a page may load."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from starlette.responses import FileResponse, Response
from wire import serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs the program chromium or google-chrome")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
_DUMPING = "--enable-logging=stderr --v=0 --virtual-time-budget=10000 --dump-dom"


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
