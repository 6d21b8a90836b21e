"""DPoP (RFC 9449): a token that is bound to a key, and a proof with each request that its client has the key.

    Authorization: DPoP <token>
    DPoP: <proof>

    the proof:  one header line > parse strictly > typ > alg and jwk > signature > htm, htu > iat > ath > jti > nonce
    the token:  as every token > its cnf.jkt is the thumbprint of the proof's jwk
    at last:    the jti is new, in the store of the rate limit

A proof is a JWT that its client has signed with the key in its header. The key proves nothing before the token, which
the issuer has signed, is found to be bound to it. Only then is the proof used up, so nobody without such a token can
fill the store.
"""

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._config.worker_count import is_one_of_several_workers
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit.auth.jose import Token, is_text, parse
from fastapi_prodkit.auth.keys import Key
from fastapi_prodkit.auth.nonces import Nonces
from fastapi_prodkit.auth.proof_keys import ProofKeys, base64url_sha256
from fastapi_prodkit.auth.refusal import Code, Refused
from fastapi_prodkit.auth.request_url import is_url_of, requested_url
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import AuthSettings

__all__ = ["DPoP", "OnceStore", "Proof", "SentProof"]

OLDEST: Final = 60  # seconds since a proof was made, beside the clock skew that is tolerated
LONGEST_JTI: Final = 256  # characters
LONGEST_LOGGED: Final = 200  # characters of a URL


@runtime_checkable
class OnceStore(Protocol):
    """Where proofs are remembered, such as the store of a rate limit."""

    @property
    def shared(self) -> bool:
        """Whether all processes remember together."""
        ...

    async def add_once(self, key: str, seconds: int) -> bool:
        """Remember a key for at least so many seconds; return False if it is remembered already.

        Raises:
            ProblemError: 503: the store cannot tell.
        """
        ...


class SentProof(NamedTuple):
    """A proof of which nothing is verified.

    Attributes:
        token: Its parts.
        key: The key in its header.
        thumbprint: SHA-256 of the key (RFC 7638), base64url.
    """

    token: Token
    key: Key
    thumbprint: str


class Proof(NamedTuple):
    """A proof that was verified, of a key that is not yet known to be the access token's.

    Attributes:
        id: Hash of the key's thumbprint and the `jti`, by which the proof is remembered.
        has_old_nonce: The nonce becomes invalid soon.
    """

    id: str
    has_old_nonce: bool


class DPoP:
    """Verify proofs, and accept each of them once.

    Args:
        settings: With DPoP switched on.
        store: Remembers proofs.
        clock: Seconds since the epoch.

    Attributes:
        nonces: The nonces that proofs need; None if they need none.

    Raises:
        ConfigurationError: There is no store, or it cannot remember the proofs of all workers.
    """

    def __init__(self, settings: AuthSettings, store: OnceStore | None, clock: Callable[[], float]) -> None:
        self._store = _checked_store(store)
        self._clock = clock
        self._leeway = settings.leeway
        # A proof can be used until it is too old, and the clocks of the client and of two servers may differ.
        self._remembered = math.ceil(OLDEST + 3 * settings.leeway) + 1
        self._keys = ProofKeys()
        self.nonces = Nonces(_nonce_secret(settings, self._store), clock) if settings.dpop_nonce else None

    def read(self, scope: Scope) -> SentProof:
        """Return the proof of a request, and the key in its header.

        Raises:
            Refused: There is none, there are several, or it cannot be a proof.
        """
        line = _only_line(scope)
        with _refusing_proof():
            token = parse(line, with_jwk=True)
            if token.type != "dpop+jwt":
                raise Refused("header", "the token's typ is not dpop+jwt")
            return SentProof(token, *self._keys.read(token.algorithm, token.jwk))

    def verify(self, sent: SentProof, scope: Scope, access_token: bytes) -> Proof:
        """Return the proof, which is signed with its key, and one of this request and this access token.

        Raises:
            Refused: It is not.
        """
        with _refusing_proof():
            sent.key.verify(sent.token.signed, sent.token.signature)
        claims = sent.token.claims
        _check_request(claims, scope)
        self._check_age(claims)
        if not is_text(claims.get("ath"), base64url_sha256(access_token)):
            raise Refused("proof", "the DPoP proof's ath is not the hash of the token")
        jti = claims.get("jti")
        if not (isinstance(jti, str) and 0 < len(jti) <= LONGEST_JTI):
            raise Refused("proof", f"the DPoP proof's jti is not text of 1 to {LONGEST_JTI} characters")
        has_old_nonce = self.nonces is not None and not self.nonces.check(claims.get("nonce"))
        named = f"{sent.thumbprint} {jti}".encode(errors="surrogatepass")
        return Proof(base64url_sha256(named), has_old_nonce)

    async def use_up(self, scope: Scope, proof: Proof) -> None:
        """Accept a proof once. Called when the access token was verified and found to be bound to its key.

        Raises:
            Refused: The proof was used before, by another request.
            ProblemError: 503: the store cannot tell.
        """
        if scope.get(_scope.PROOF) == proof.id:
            return  # the request is authenticated a second time, such as by a dependency behind the guard
        if not await self._store.add_once(f"dpop/{proof.id}", self._remembered):
            raise Refused("proof_replayed", "the DPoP proof was used before")
        scope[_scope.PROOF] = proof.id
        exchange = Exchange.innermost(scope)
        if self.nonces is not None and proof.has_old_nonce and exchange is not None:
            exchange.response_headers[b"dpop-nonce"] = self.nonces.current().encode()

    def _check_age(self, claims: Mapping[str, Any]) -> None:
        made = claims.get("iat")
        if isinstance(made, bool) or not isinstance(made, int | float):
            raise Refused("proof", "the DPoP proof's iat is not a number of seconds")
        now = self._clock()
        if not now - OLDEST - self._leeway <= made <= now + self._leeway:
            raise Refused("proof", "the DPoP proof's iat is too old, or in the future")


@contextmanager
def _refusing_proof() -> Iterator[None]:
    """Refuse the proof if it is refused as a token: it is parsed and verified in the same way."""
    try:
        yield
    except Refused as refused:
        code: Code = "proof_signature" if refused.code == "signature" else "proof"
        raise Refused(code, refused.text.replace("the token", "the DPoP proof")) from None


def _checked_store(store: OnceStore | None) -> OnceStore:
    if store is None:
        raise ConfigurationError(
            "with AUTH_DPOP, proofs are remembered in the rate limit's store, and there is none: leave out "
            "RATE_LIMIT_ENABLED=false (RATE_LIMIT_DEFAULT=none counts no requests), or give Auth(store=MemoryStore())"
        )
    if not isinstance(store, OnceStore):
        raise ConfigurationError(f"with AUTH_DPOP, a {type(store).__name__} needs the members shared and add_once")
    if not store.shared and is_one_of_several_workers():
        raise ConfigurationError(
            "with AUTH_DPOP, each worker process would accept a proof that another one has accepted: set "
            "RATE_LIMIT_STORAGE_URL=redis://..., which all of them share, or run one worker (WEB_CONCURRENCY=1)"
        )
    return store


def _nonce_secret(settings: AuthSettings, store: OnceStore) -> bytes:
    given = settings.dpop_nonce_secret or settings.secret
    if given is not None:
        return given.get_secret_value().encode()
    if store.shared:
        raise ConfigurationError(
            "AUTH_DPOP_NONCE needs AUTH_DPOP_NONCE_SECRET if processes share a store, because each of them has to "
            "accept the nonces of the others"
        )
    return secrets.token_bytes()


def _only_line(scope: Scope) -> bytes:
    lines = [value for name, value in scope["headers"] if name == b"dpop"]
    if len(lines) != 1:
        raise Refused("proof", "there are several DPoP lines" if lines else "there is no DPoP line")
    found: bytes = lines[0]
    return found


def _check_request(claims: Mapping[str, Any], scope: Scope) -> None:
    if claims.get("htm") != scope.get("method", "GET"):  # the handshake of a WebSocket is a GET
        raise Refused("proof", "the DPoP proof's htm is not the method of the request")
    url = claims.get("htu")
    if not (isinstance(url, str) and is_url_of(scope, url)):
        here = (requested_url(scope) or "not certain")[:LONGEST_LOGGED]
        raise Refused("proof", f"the DPoP proof's htu is not the URL of the request, which is {here} for this service")
