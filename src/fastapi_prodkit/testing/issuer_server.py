"""The HTTP server of the test issuer: on loopback, in threads, with TLS or without."""

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

__all__ = ["Answer", "Fault", "IssuerRequest", "IssuerServer"]

Fault = Literal["refused", "silent", "slow", "garbage", "error"]

_POLL: Final = 0.01  # seconds until the server notices that it has to stop
_PAUSE: Final = 0.05  # seconds between two bytes of a slow answer
_LARGEST: Final = 65_536  # bytes of a form
_FORM: Final = "application/x-www-form-urlencoded"


class IssuerRequest(NamedTuple):
    """A request.

    Attributes:
        method: GET, POST or OPTIONS.
        path: Without the query.
        query: Without the question mark.
        form: The body; empty if it is not a form.
        origin: Of the page that sends it; empty if there is none.
    """

    method: str
    path: str
    query: str
    form: str
    origin: str


class Answer(NamedTuple):
    """An answer.

    Attributes:
        status: Of HTTP.
        headers: Without Content-Length.
        body: Its bytes.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @classmethod
    def of_json(cls, status: int, content: Any, **headers: str) -> "Answer":
        """Return an answer in JSON. Headers are named with underscores in place of hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, {"Content-Type": "application/json", **named}, json.dumps(content).encode())


class IssuerServer(ThreadingHTTPServer):
    """Serve on loopback, in threads.

    Args:
        port: 0 for a free one.
        context: Of TLS; None for plain http.
        answer: Called with each request; returns the answer, and a fault with which it is sent.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext | None,
        answer: Callable[[IssuerRequest], tuple[Answer, Fault | None]],
    ) -> None:
        self.answer = answer
        self.stopping = threading.Event()
        self.context = context
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL,), daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; the handshake is left to the thread that serves it."""
        connection, address = super().get_request()
        if self.context is None:
            return connection, address
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that has disconnected, or does not trust the certificate."""

    def stop(self) -> None:
        """Close the port, and end answers that are being sent."""
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: IssuerServer

    def setup(self) -> None:
        if self.server.context is not None:
            self.request.do_handshake()
        super().setup()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        request = IssuerRequest(self.command, url.path, url.query, self._read_form(), self.headers.get("Origin", ""))
        answer, fault = self.server.answer(request)
        if fault == "silent":
            self.server.stopping.wait()
            return
        body = b"<html>" if fault == "garbage" else answer.body
        self.send_response(500 if fault == "error" else answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for part in [body[index : index + 1] for index in range(len(body))] if fault == "slow" else [body]:
            self.wfile.write(part)
            if fault == "slow" and self.server.stopping.wait(_PAUSE):
                return

    def do_POST(self) -> None:
        self.do_GET()

    def do_OPTIONS(self) -> None:
        self.do_GET()

    def _read_form(self) -> str:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(min(length, _LARGEST))
        return body.decode("ascii", "replace") if self.headers.get_content_type() == _FORM else ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Say nothing."""
