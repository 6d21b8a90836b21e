"""A real OpenID issuer on this machine, for tests: discovery and keys over TLS, tokens, rotation and faults."""

import json
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Literal, Self

from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.sections.auth import Algorithm, PresetName
from fastapi_prodkit.testing.certificate import server_certificate
from fastapi_prodkit.testing.dpop import DPoPKey
from fastapi_prodkit.testing.signing import new_private_key, public_jwk, sign, without_none
from fastapi_prodkit.testing.token_shapes import SHAPES, TokenRequest

__all__ = ["Fault", "Issuer"]

Fault = Literal["refused", "silent", "slow", "garbage", "error"]

_POLL: Final = 0.01  # seconds until the server notices that it has to stop
_PAUSE: Final = 0.05  # seconds between two bytes of a slow answer


class Issuer:
    """An OpenID issuer with a TLS certificate of its own. It runs inside of `with`.

        with Issuer(preset="keycloak") as issuer:
            auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
            token = issuer.token("alice", roles=["admin"])

    Args:
        preset: Whose tokens are imitated.
        audience: Name of the API for which the tokens are; AUTH_AUDIENCE.
        algorithm: With which tokens are signed.
        max_age: The `max-age` of the key set's Cache-Control, seconds; None leaves the header out.

    Attributes:
        url: The `iss` of the tokens; AUTH_ISSUER.
        certificate: The certificate of its server, in PEM.
        ssl_context: Trusts this certificate only.
        jwks_url: Where its discovery document says that the keys are.
        requests: The paths of all requests.

    Raises:
        MissingExtraError: The extra `auth` is not installed.
    """

    url: str
    jwks_url: str
    _server: "_Server"

    def __init__(
        self,
        preset: PresetName = "standard",
        *,
        audience: str = "test-api",
        algorithm: Algorithm = "ES256",
        max_age: int | None = None,
    ) -> None:
        self.preset: PresetName = preset
        self.audience = audience
        self.algorithm: Algorithm = algorithm
        self.max_age = max_age
        self.requests: list[str] = []
        self._keys: dict[str, Any] = {}
        self._published: dict[str, Any] = {}
        self._fault: Fault | None = None
        self.certificate, self._server_context = server_certificate()
        self.ssl_context = ssl.create_default_context(cadata=self.certificate)
        self._port = 0
        self.rotate()

    def __enter__(self) -> Self:
        self._start()
        self.url = f"https://127.0.0.1:{self._port}{'/' if self.preset == 'auth0' else ''}"
        self.jwks_url = f"{self.url.rstrip('/')}/jwks"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def settings(self, **fields: Any) -> AuthSettings:
        """Return settings that accept the tokens of this issuer, with further fields."""
        values: dict[str, Any] = {
            "issuer": (self.url,),
            "audience": (self.audience,),
            "preset": (self.preset,),
            "algorithms": (self.algorithm,),
        }
        return AuthSettings(**(values | fields))

    def token(  # noqa: PLR0913 - keywords
        self,
        sub: str = "alice",
        *,
        roles: Sequence[str] = (),
        scopes: Sequence[str] = (),
        client: str = "test-app",
        is_client: bool = False,
        bound_to: DPoPKey | None = None,
        headers: Mapping[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        """Return an access token that is valid for an hour; of the preset `google`, an ID token.

        Args:
            sub: Id of the person.
            roles: Their roles. Clerk's tokens have one, Google's have none.
            scopes: Scopes that the app was granted.
            client: Client id of the app.
            is_client: Make a token of the client itself.
            bound_to: The client's key, whose proofs the token needs.
            headers: Further header parameters; None leaves one out.
            claims: Further claims; None leaves one out.
        """
        request = TokenRequest(
            issuer=self.url,
            audience=self.audience,
            subject=client if is_client else sub,
            client=client,
            is_client=is_client,
            roles=roles,
            scopes=scopes,
        )
        typ = "at+jwt" if self.preset == "standard" else "JWT"
        header = {"typ": typ, "kid": self.key_id, "alg": self.algorithm, **(headers or {})}
        confirmation = {} if bound_to is None else {"cnf": {"jkt": bound_to.thumbprint}}
        return self.sign(without_none(header), without_none(SHAPES[self.preset](request) | confirmation | claims))

    def sign(self, header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
        """Return a token with exactly this header and these claims, signed with the current key."""
        return sign(self.algorithm, self.private_key, header, claims)

    @property
    def private_key(self) -> Any:
        """The key with which tokens are signed now."""
        return self._keys[self.key_id]

    def rotate(self, *, withdraw: bool = False) -> None:
        """Sign with a new key, and publish it.

        Args:
            withdraw: Do not publish the earlier keys any more.
        """
        self.key_id = f"key-{len(self._keys) + 1}"
        self._keys[self.key_id] = new_private_key(self.algorithm)
        if withdraw:
            self._published.clear()
        public = public_jwk(self.algorithm, self.private_key)
        self._published[self.key_id] = {**public, "kid": self.key_id, "use": "sig", "alg": self.algorithm}

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Answer requests with a fault, inside of `with`.

        Args:
            fault: "refused" closes the port; "silent" never answers; "slow" sends a byte every 50 ms; "garbage" answers
                with something else than JSON; "error" answers 500.
        """
        if fault == "refused":
            self._stop()
        self._fault = fault
        try:
            yield
        finally:
            self._fault = None
            if fault == "refused":
                self._start()

    def _start(self) -> None:
        self._server = _Server(self._port, self._server_context, self._answer)
        self._port = self._server.server_address[1]

    def _stop(self) -> None:
        self._server.stop()

    def _answer(self, path: str) -> tuple[Fault | None, str, bytes]:
        """Return the fault, the Cache-Control and the body of an answer."""
        self.requests.append(path)
        if path.endswith("/.well-known/openid-configuration"):
            document: Any = {"issuer": self.url, "jwks_uri": self.jwks_url}
        else:
            document = {"keys": list(self._published.values())}
        cache_control = "public" if self.max_age is None else f"public, max-age={self.max_age}"
        return self._fault, cache_control, json.dumps(document).encode()


class _Server(ThreadingHTTPServer):
    """Serve on loopback with TLS, in threads."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, context: ssl.SSLContext, answer: Any) -> None:
        self.answer = answer
        self.stopping = threading.Event()
        self._context = context
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL,), daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that has disconnected, or does not trust the certificate."""

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def setup(self) -> None:
        self.request.do_handshake()
        super().setup()

    def do_GET(self) -> None:
        fault, cache_control, body = self.server.answer(self.path)
        if fault == "silent":
            self.server.stopping.wait()
            return
        if fault == "garbage":
            body = b"<html>"
        self.send_response(500 if fault == "error" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Cache-Control", cache_control)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for part in [body[index : index + 1] for index in range(len(body))] if fault == "slow" else [body]:
            self.wfile.write(part)
            if fault == "slow" and self.server.stopping.wait(_PAUSE):
                return

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Say nothing."""
