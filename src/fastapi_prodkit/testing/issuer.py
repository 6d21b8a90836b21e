"""A real OpenID issuer on this machine, for tests: discovery, keys and tokens over TLS, rotation and faults."""

import secrets
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.sections.auth import Algorithm, PresetName
from fastapi_prodkit.testing.authorization import AuthorizationServer, Grant, Person, is_on_this_machine
from fastapi_prodkit.testing.certificate import server_certificate
from fastapi_prodkit.testing.dpop import DPoPKey
from fastapi_prodkit.testing.issuer_server import Answer, Fault, IssuerRequest, IssuerServer
from fastapi_prodkit.testing.signing import new_private_key, public_jwk, sign, without_none
from fastapi_prodkit.testing.token_shapes import SHAPES, TokenRequest

__all__ = ["Fault", "Issuer"]

_PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, DPoP, X-Requested-With",
}


class Issuer:
    """An OpenID issuer with a TLS certificate of its own. It runs inside of `with`.

        with Issuer(preset="keycloak") as issuer:
            auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
            token = issuer.token("alice", roles=["admin"])

    Programs get tokens from its endpoints, too: `/authorize` and `/token` for the authorization code with PKCE, and
    `/token` for client credentials. Pages on this machine may call it.

    Args:
        preset: Whose tokens are imitated.
        audience: Name of the API for which the tokens are; AUTH_AUDIENCE.
        algorithm: With which tokens are signed.
        max_age: The `max-age` of the key set's Cache-Control, seconds; None leaves the header out.
        tls: Serve over https; without it over http.
        port: On loopback; a free one by default.

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
    _server: IssuerServer

    def __init__(  # noqa: PLR0913 - keywords
        self,
        preset: PresetName = "standard",
        *,
        audience: str = "test-api",
        algorithm: Algorithm = "ES256",
        max_age: int | None = None,
        tls: bool = True,
        port: int = 0,
    ) -> None:
        self.preset: PresetName = preset
        self.audience = audience
        self.algorithm: Algorithm = algorithm
        self.max_age = max_age
        self.requests: list[str] = []
        self._keys: dict[str, Any] = {}
        self._published: dict[str, Any] = {}
        self._fault: Fault | None = None
        self._authorization = AuthorizationServer(self._token_of)
        self.certificate, context = server_certificate()
        self.ssl_context = ssl.create_default_context(cadata=self.certificate)
        self._server_context = context if tls else None
        self._port = port
        self.rotate()

    def __enter__(self) -> Self:
        self._start()
        self._root = f"{'http' if self._server_context is None else 'https'}://127.0.0.1:{self._port}"
        self.url = f"{self._root}/" if self.preset == "auth0" else self._root
        self.jwks_url = f"{self._root}/jwks"
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

    def sign_in(self, sub: str | None, *, roles: Sequence[str] = ()) -> None:
        """Sign a person in at `/authorize` without a page; None shows the page, which asks for name and roles."""
        self._authorization.person = None if sub is None else Person(sub, tuple(roles))

    @property
    def private_key(self) -> Any:
        """The key with which tokens are signed now."""
        return self._keys[self.key_id]

    def rotate(self, *, withdraw: bool = False) -> None:
        """Sign with a new key, and publish it.

        Args:
            withdraw: Do not publish the earlier keys any more.
        """
        self.key_id = f"key-{secrets.token_hex(8)}"  # an issuer that starts again must not use an id for another key
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
        self._server = IssuerServer(self._port, self._server_context, self._answer)
        self._port = self._server.server_address[1]

    def _stop(self) -> None:
        self._server.stop()

    def _answer(self, request: IssuerRequest) -> tuple[Answer, Fault | None]:
        self.requests.append(request.path)
        if request.path == "/authorize":
            return self._authorization.authorize(request.query, request.form), self._fault
        answer = Answer(204, _PREFLIGHT) if request.method == "OPTIONS" else self._answer_for_pages(request)
        if is_on_this_machine(request.origin):
            shared = {"Access-Control-Allow-Origin": request.origin, "Vary": "Origin"}
            answer = answer._replace(headers={**answer.headers, **shared})
        return answer, self._fault

    def _answer_for_pages(self, request: IssuerRequest) -> Answer:
        """Answer a request that pages of other origins may make, too."""
        if (request.method == "POST") is not (request.path == "/token"):
            return Answer(405, {"Allow": "POST" if request.path == "/token" else "GET"})
        if request.path == "/token":
            if request.origin and not is_on_this_machine(request.origin):  # whose name may lead to this machine
                return Answer(403, {})
            return self._authorization.token(request.form)
        cache_control = "public" if self.max_age is None else f"public, max-age={self.max_age}"
        if request.path.endswith("/.well-known/openid-configuration"):
            return Answer.of_json(200, self._discovery(), Cache_Control=cache_control)
        return Answer.of_json(200, {"keys": list(self._published.values())}, Cache_Control=cache_control)

    def _discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "jwks_uri": self.jwks_url,
            "authorization_endpoint": f"{self._root}/authorize",
            "token_endpoint": f"{self._root}/token",
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code", "client_credentials"],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": ["none"],
        }

    def _token_of(self, grant: Grant) -> str:
        person = grant.person
        if person is None:
            return self.token(client=grant.client, is_client=True, scopes=grant.scopes)
        return self.token(person.sub, client=grant.client, roles=person.roles, scopes=grant.scopes)
