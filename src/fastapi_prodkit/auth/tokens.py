"""Verify a token: parse it, find its issuer and its key, verify the signature, then check the claims.

The order matters. What a token says about itself chooses among what is configured, and nothing else: its `iss` an
issuer, its `kid` and `alg` a key of this issuer. No claim is believed before the signature is verified.
"""

import ssl
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, Protocol

from fastapi_prodkit import _extras
from fastapi_prodkit.auth.claims import ClaimRules, UserT
from fastapi_prodkit.auth.fetching import Fetcher
from fastapi_prodkit.auth.issuers import IssuerKeys
from fastapi_prodkit.auth.jose import Token, parse
from fastapi_prodkit.auth.keys import Key, secret_key
from fastapi_prodkit.auth.presets import PRESETS, SHARED_SECRET
from fastapi_prodkit.auth.refusal import Refused
from fastapi_prodkit.sections import AuthSettings

__all__ = ["TokenVerifier"]


class _Keys(Protocol):
    async def key_of(self, token: Token) -> Key: ...


class _Trusted(NamedTuple, Generic[UserT]):
    """An issuer whose tokens are accepted, or the shared secret."""

    rules: ClaimRules[UserT]
    keys: _Keys


class TokenVerifier(Generic[UserT]):
    """Verify the tokens of all issuers in the settings, or of the shared secret.

    Args:
        settings: With an issuer or a secret.
        user: Makes a user from the fields of one; a class, such as `User`.
        ssl_context: Certificates that the issuers' servers may have; those of the system unless given.
        clock: Seconds since the epoch.

    Attributes:
        issuers: The keys of the issuers.
        fetchers: What fetches them, in the same order.

    Raises:
        MissingExtraError: The extra `auth` is not installed.
    """

    def __init__(
        self,
        settings: AuthSettings,
        *,
        user: Callable[..., UserT],
        ssl_context: ssl.SSLContext | None,
        clock: Callable[[], float],
    ) -> None:
        for package in ("jwt", "cryptography"):
            _extras.require(package, extra="auth")
        self._clock = clock
        self.issuers: list[IssuerKeys] = []
        self.fetchers: list[Fetcher] = []
        if settings.secret is not None:
            rules = _rules(settings, user, None, 0)
            keys: _Keys = _SharedSecret(settings.secret.get_secret_value())
            self._trusted: Mapping[str | None, _Trusted[UserT]] = {None: _Trusted(rules, keys)}
            return
        trusted: dict[str | None, _Trusted[UserT]] = {}
        for index, issuer in enumerate(settings.issuer):
            fetcher = Fetcher(issuer, settings.jwks_url[index] if settings.jwks_url else None, ssl_context)
            self.fetchers.append(fetcher)
            self.issuers.append(IssuerKeys(issuer, fetcher, settings.algorithms))
            rules = _rules(settings, user, issuer, index)
            trusted |= dict.fromkeys(rules.issuers, _Trusted(rules, self.issuers[-1]))
        self._trusted = trusted

    async def verify(self, sent: bytes, thumbprint: str | None = None) -> tuple[UserT, Key]:
        """Return the user of a token, and the key with which it was verified.

        Args:
            sent: The token.
            thumbprint: Of the key that a DPoP proof was signed with; None for a bearer token.

        Raises:
            Refused: The token is not valid.
            NoKeysError: The keys of its issuer cannot be fetched.
        """
        token = parse(sent)
        rules, keys = self._trusted_for(token)
        rules.check_type(token)
        key = await keys.key_of(token)
        key.verify(token.signed, token.signature)
        return rules.user(token, self._clock(), thumbprint), key

    def _trusted_for(self, token: Token) -> _Trusted[UserT]:
        issuer = token.claims.get("iss") if self.issuers else None
        if not (issuer is None or isinstance(issuer, str)) or issuer not in self._trusted:
            raise Refused("issuer", "the token's iss is missing, or not exactly one of AUTH_ISSUER")
        return self._trusted[issuer]


class _SharedSecret:
    """The key of a shared secret, whatever key id a token has."""

    def __init__(self, secret: str) -> None:
        self._key = secret_key(secret)

    async def key_of(self, token: Token) -> Key:
        if token.algorithm != "HS256":
            raise Refused("algorithm", "the token's alg is not HS256")
        return self._key


def _rules(settings: AuthSettings, user: Callable[..., UserT], issuer: str | None, index: int) -> ClaimRules[UserT]:
    """Return the rules of the issuer with this index; without an issuer, of the shared secret."""
    presets = settings.preset or ("standard",)
    return ClaimRules(
        SHARED_SECRET if issuer is None else PRESETS[presets[index if len(presets) > 1 else 0]],
        issuer=issuer,
        audience=settings.audience,
        leeway=settings.leeway,
        user=user,
        roles=settings.roles_claim,
        scopes=settings.scopes_claim,
    )
