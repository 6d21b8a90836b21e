"""A server that records what agents send."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

__all__ = ["Sink", "listening"]

_DECODERS = {"gzip": gzip.decompress, "deflate": zlib.decompress}


class Sink(ThreadingHTTPServer):
    """Answer every request with 200 and `{}`.

    Attributes:
        url: Where it listens, without a slash at the end.
        received: Path and decoded body of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.received: list[tuple[str, bytes]] = []

    def bodies(self, path: str) -> list[bytes]:
        """Return the bodies that have arrived at the path, and below it."""
        return [body for where, body in self.received if where.startswith(path)]


@contextmanager
def listening() -> Iterator[Sink]:
    """Run a sink in a thread."""
    with Sink() as sink:
        Thread(target=sink.serve_forever, daemon=True).start()
        yield sink
        sink.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def log_message(self, *_: object) -> None: ...

    def _take(self) -> None:
        body = self._body()
        decode = _DECODERS.get(self.headers.get("content-encoding", ""), bytes)
        self.server.received.append((self.path, decode(body)))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
