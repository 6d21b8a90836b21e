"""`Auth`: the caller of a request, or the response that refuses its credentials."""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, Literal

from starlette.requests import HTTPConnection
from starlette.types import Scope

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._bearer import WrongTokens, too_many_wrong_tokens
from fastapi_prodkit._context import Reason
from fastapi_prodkit._counting import client_key
from fastapi_prodkit._instruments import instrument
from fastapi_prodkit.auth.api_keys import ApiKeys, FindKey
from fastapi_prodkit.auth.cache import VerifiedCredentials
from fastapi_prodkit.auth.caller import note_caller
from fastapi_prodkit.auth.challenges import Challenges, answer_to
from fastapi_prodkit.auth.claims import UserT
from fastapi_prodkit.auth.credentials import Credentials, Scheme, bearer_line, read_credentials
from fastapi_prodkit.auth.dpop import DPoP, OnceStore
from fastapi_prodkit.auth.hierarchy import with_implied_roles
from fastapi_prodkit.auth.issuers import NoKeysError
from fastapi_prodkit.auth.refusal import Code, Refused
from fastapi_prodkit.auth.tokens import TokenVerifier
from fastapi_prodkit.auth.user import User
from fastapi_prodkit.auth.websockets import GuardedWebSocket
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError, ProblemError
from fastapi_prodkit.sections import AuthSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Auth"]

_logger = logging.getLogger("fastapi_prodkit.auth")


class Auth(Generic[UserT]):
    """Find out who calls, from the token or the API key of a request.

        auth = Auth(AuthSettings(issuer=("https://login.example.com/",), audience=("orders",)))
        app = FastAPI(lifespan=auth.lifespan)

        @app.get("/me")
        async def me(user: Annotated[User, Depends(auth.current_user)]) -> str:
            return user.id

    It protects the routes that depend on it, and no others.

    A client, identified by address as in rate limits, may send ten forged tokens or API keys a minute to each
    process. After that, what it sends is refused until the minute is over, unless it was verified before.

    Args:
        settings: Whose tokens and keys are accepted. May be left out if `find_key` is given.
        user: Class of the users: `User`, or a subclass of it.
        default: Whether a route without a rule of its own needs a caller, in place of AUTH_DEFAULT; for `guard_routes`.
        hierarchy: Roles that imply others, such as `["admin>editor>viewer"]`, in place of AUTH_ROLE_HIERARCHY.
        find_key: Called with the SHA-256 of an API key, 64 hexadecimal digits; returns the `ApiKey`, or None. Sync or
            async. It is called for each request, so that a key that is removed is invalid at once.
        ssl_context: Certificates that the issuers' servers may have; those of the system unless given.
        store: Remembers DPoP proofs, such as a `MemoryStore` or a `SharedStore`; required with AUTH_DPOP.
        registry: Where the metric is shown; prometheus_client's default registry unless given.
        clock: Seconds since the epoch.

    Attributes:
        default: Whether a route without a rule of its own needs a caller.
        schemes: With which a client may authenticate.

    Raises:
        ConfigurationError: There are neither settings nor `find_key`; the hierarchy has a cycle; or AUTH_DPOP is on,
            and the store cannot be used.
        MissingExtraError: Tokens are accepted, and the extra `auth` is not installed.
    """

    def __init__(  # noqa: PLR0913 - keywords
        self,
        settings: AuthSettings | None = None,
        *,
        user: type[UserT] = User,  # type: ignore[assignment]  # the default of UserT
        default: Literal["required", "optional"] | None = None,
        hierarchy: Sequence[str] | None = None,
        find_key: FindKey | None = None,
        ssl_context: ssl.SSLContext | None = None,
        store: OnceStore | None = None,
        registry: "CollectorRegistry | None" = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if settings is None and find_key is None:
            raise ConfigurationError("Auth: accepts nothing; give AuthSettings(issuer=...), or find_key=")
        self.default = default or (settings.default if settings is not None else "required")
        if hierarchy is None:
            hierarchy = settings.role_hierarchy if settings is not None else ()
        self._user = with_implied_roles(user, hierarchy)
        self._clock = clock
        self._leeway = settings.leeway if settings is not None else 0.0
        self._close_websockets = settings is None or settings.close_websockets
        self._registry = registry
        self._cache = VerifiedCredentials[UserT](clock)
        self._wrong = WrongTokens(time.monotonic)
        self._tokens: TokenVerifier[UserT] | None = None
        self._dpop: DPoP | None = None
        schemes: list[Scheme] = []
        if settings is not None and (settings.issuer or settings.secret):
            self._tokens = TokenVerifier(settings, user=self._user, ssl_context=ssl_context, clock=clock)
            schemes.append("bearer")
            if settings.dpop != "off":
                self._dpop = DPoP(settings, store, clock)
                schemes.append("dpop")
        configured = settings.api_keys if settings is not None else ()
        self._api_keys = ApiKeys(configured, find_key, clock)
        if configured or find_key is not None:
            schemes.append("apikey")
        self._schemes = tuple(schemes)
        self._bearer_is_refused = settings is not None and settings.dpop == "required"
        self.schemes = tuple(each for each in schemes if each != "bearer" or not self._bearer_is_refused)
        self._challenges = Challenges(self.schemes)

    @property
    def issuers(self) -> list[str]:
        """URLs of the issuers."""
        return [keys.name for keys in self._tokens.issuers] if self._tokens is not None else []

    def token_endpoints(self) -> list[str]:
        """Return the URLs where issuers exchange codes for tokens, as far as they are discovered."""
        fetchers = self._tokens.fetchers if self._tokens is not None else []
        return [each.token_endpoint for each in fetchers if each.token_endpoint is not None]

    async def authenticate(self, connection: HTTPConnection) -> UserT | None:
        """Return the caller; None if the request has no credentials.

        Credentials are `Authorization: Bearer <token>`, `Authorization: ApiKey <key>` or `X-API-Key: <key>`; with
        AUTH_DPOP `Authorization: DPoP <token>` and `DPoP: <proof>`; and in the handshake of a WebSocket a token among
        the subprotocols. Other schemes, and tokens in the query or the body, are not read.

        Raises:
            ProblemError: 401 if the credentials are refused; 400 if there are several; 429 after too many forged ones;
                503 while the keys of the token's issuer cannot be fetched, or a proof cannot be remembered.
        """
        websocket = GuardedWebSocket.of(connection)
        user = await self._authenticate(connection.scope)
        if user is None:
            return None
        note_caller(connection.scope, self, user)
        if websocket is not None and user.expires_at is not None and self._close_websockets:
            leeway = 0.0 if user.kind == "key" else self._leeway
            websocket.close_in(user.expires_at + leeway - self._clock())
        return user

    async def _authenticate(self, scope: Scope) -> UserT | None:
        scheme = self._schemes[0]
        try:
            credentials = read_credentials(scope, self._schemes)
            if credentials is None:
                return None
            scheme = credentials.scheme
            if self._dpop is not None and scheme == "dpop":
                return await self._verify_bound(credentials, scope, self._dpop)
            user = self._cache.get(credentials.line)
            return user if user is not None else await self._verify(credentials, scope)
        except Refused as refused:
            problem = self._refusal(refused, scheme, client_key(scope))
        raise problem  # outside of `except`, so that the response's exception has no other one as its context

    async def current_user(self, connection: HTTPConnection) -> UserT:
        """Return the caller, for `Depends(auth.current_user)`.

        Raises:
            ProblemError: 401 if the request has no credentials; otherwise as `authenticate`.
        """
        user = await self.authenticate(connection)
        if user is None:
            raise self.unauthenticated()
        return user

    def known_user(self, scope: Scope) -> UserT | None:
        """Return the caller if the bearer token was verified before; None if `authenticate` has to be asked.

        A token with a DPoP proof is never known: each proof has to be verified. Nor is that of a WebSocket, which has
        to be closed when it expires.
        """
        if _scope.WEBSOCKET in scope:
            return None
        line = bearer_line(scope)
        return None if line is None else self._cache.get(line)

    def unauthenticated(self) -> ProblemError:
        """Return the 401 of a request without credentials, and record the reason (RFC 6750 section 3.1: no error)."""
        _context.refuse(Reason("unauthenticated", "there are no credentials"))
        headers = {"WWW-Authenticate": self._challenges.offered}
        return ProblemError(401, "Authentication is required.", headers=headers)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:  # noqa: ARG002 - the app, as in FastAPI
        """Fetch the issuers' keys in the background, now and before they expire. Nothing waits for the first fetch.

        Without it keys are fetched with the first token, and refreshed by later ones.
        """
        issuers = self._tokens.issuers if self._tokens is not None else []
        refreshing = [asyncio.create_task(keys.keep_fresh()) for keys in issuers]
        try:
            yield
        finally:
            for task in refreshing:
                task.cancel()
            await asyncio.gather(*refreshing, return_exceptions=True)
            for keys in issuers:
                await keys.close()

    async def check(self) -> None:
        """Warn about issuers without fresh keys; a readiness check.

        Raises:
            CheckWarning: Names the issuers, and says why.
        """
        issuers = self._tokens.issuers if self._tokens is not None else []
        warnings = [warning for keys in issuers if (warning := keys.warning()) is not None]
        if warnings:
            raise CheckWarning("; ".join(warnings))

    async def _verify_bound(self, credentials: Credentials, scope: Scope, dpop: DPoP) -> UserT:
        """Return the caller whose token is bound to the key of the request's proof; a known token costs the proof."""
        sent = dpop.read(scope)
        bound = credentials.bound_to(sent.thumbprint)
        user = self._cache.get(bound.line)
        if user is None:
            self._refuse_guesses(scope)
        proof = dpop.verify(sent, scope, credentials.value)
        if user is None:
            user = await self._verify(bound, scope, sent.thumbprint)
        await dpop.use_up(scope, proof)
        return user

    def _refuse_guesses(self, scope: Scope) -> None:
        """Refuse what was not verified before, if the client has sent too many forged ones."""
        wait = self._wrong.seconds_to_wait(client_key(scope))
        if wait:
            problem, reason = too_many_wrong_tokens(wait)
            _context.refuse(reason)
            self._count("too_many")
            raise problem

    async def _verify(self, credentials: Credentials, scope: Scope, thumbprint: str | None = None) -> UserT:
        if not self._cache.knows(credentials.line):
            self._refuse_guesses(scope)
        if credentials.scheme == "apikey" or self._tokens is None:
            return await self._verify_api_key(credentials)
        if thumbprint is None and self._bearer_is_refused:
            raise Refused("not_bound", "a bearer token is not bound to a key, which AUTH_DPOP requires")
        try:
            user, key = await self._tokens.verify(credentials.value, thumbprint)
        except NoKeysError as error:
            _context.refuse(Reason("issuer_unavailable", error.text))
            detail, headers = "Tokens cannot be verified at the moment.", {"Retry-After": str(error.retry_after)}
            raise ProblemError(503, detail, headers=headers) from error
        self._cache.add(credentials.line, user, key)
        return user

    async def _verify_api_key(self, credentials: Credentials) -> UserT:
        try:
            key, is_configured = await self._api_keys.find(credentials.value)
        except Refused:
            self._cache.forget(credentials.line)
            raise
        expires_at = None if key.expires is None else key.expires.timestamp()
        user = self._user(id=key.name, kind="key", roles=key.roles, scopes=key.scopes, expires_at=expires_at)
        self._cache.add(credentials.line, user, ask_again=not is_configured)
        return user

    def _refusal(self, refused: Refused, scheme: Scheme, client: str) -> ProblemError:
        """Count and log a refusal, and return the response: what is wrong is in the log, and not in the response."""
        self._count(refused.code)
        _context.refuse(Reason("unauthenticated", refused.text))
        if refused.is_forgery:
            self._wrong.add(client)
            _logger.warning("credentials of %s are refused: %s", client, refused.text)
        answer = answer_to(refused.code)
        headers = {"WWW-Authenticate": self._challenges.refusing(scheme, answer)}
        if refused.code == "proof_nonce" and self._dpop is not None and self._dpop.nonces is not None:
            headers["DPoP-Nonce"] = self._dpop.nonces.current()
        return ProblemError(answer.status, answer.detail, headers=headers)

    def _count(self, code: Code) -> None:
        import prometheus_client  # noqa: PLC0415 - on first use

        counter = instrument(
            prometheus_client.Counter,
            "http_server_refused_credentials_total",
            "Requests whose token or API key was refused.",
            ["reason"],
            registry=self._registry,
        )
        counter.labels(code).inc()
