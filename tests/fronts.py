"""A fake of a deployed service, for tests of scripts that check its answers."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["answering"]


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        statuses = self.server.statuses[self.path]
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(statuses: dict[str, list[int]]) -> Iterator[str]:
    """Serve a sequence of statuses for each path, the last one repeatedly; yield the URL. Needs curl."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        server.statuses = statuses
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
