"""Check the claims of a token whose signature is right, and make the user of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Generic

from typing_extensions import TypeVar

from fastapi_prodkit.auth.jose import Token
from fastapi_prodkit.auth.presets import Preset, claim_at
from fastapi_prodkit.auth.refusal import Refused
from fastapi_prodkit.auth.user import User

__all__ = ["ClaimRules", "UserT"]

UserT = TypeVar("UserT", bound=User, default=User)

LONGEST_ID: Final = 255  # characters; OpenID Connect Core section 2, of `sub`
_FARTHEST: Final = 10 * 366 * 86400  # seconds; a date more than ten years away is not in seconds, or never meant


class ClaimRules(Generic[UserT]):
    """What the claims of one issuer's tokens must be, and which of them make the user.

    Args:
        preset: The kind of the issuer.
        issuer: The exact `iss`; None for a shared secret, whose tokens need none.
        audience: Names of this API, one of which the token must have. If there are none, it must have no `aud`.
        leeway: Clock skew that is tolerated, seconds.
        roles: Claims with the roles, in place of the preset's.
        scopes: Claims with the scopes, in place of the preset's.
        user: Makes a user from the fields of one; a class, such as `User`.
    """

    def __init__(  # noqa: PLR0913 - keywords
        self,
        preset: Preset,
        *,
        issuer: str | None,
        audience: Sequence[str],
        leeway: float,
        user: Callable[..., UserT],
        roles: Sequence[str] = (),
        scopes: Sequence[str] = (),
    ) -> None:
        self._preset = preset
        self._issuer = issuer
        self.issuers = () if issuer is None else preset.names_of(issuer)  # values of `iss` that mean the issuer
        self._audience = frozenset(audience)
        self._leeway = leeway
        self._user = user
        self._roles = [claim_at(path) for path in roles or preset.roles]
        self._scopes = [claim_at(path) for path in scopes or preset.scopes]

    def check_type(self, token: Token) -> None:
        """Refuse a token whose `typ` is another than those of access tokens.

        Raises:
            Refused: It is.
        """
        if token.type not in self._preset.types:
            raise Refused("header", "the token's typ is not that of an access token")

    def user(self, token: Token, now: float, thumbprint: str | None = None) -> UserT:
        """Return the user of a token whose signature is right.

        Args:
            token: What was sent.
            now: Seconds since the epoch.
            thumbprint: Of the key that a DPoP proof was signed with; None for a bearer token.

        Raises:
            Refused: The token is not valid now, or is not for this API.
        """
        claims = token.claims
        if self.issuers and claims.get("iss") not in self.issuers:
            raise Refused("issuer", "the token's iss is another")
        expires_at = self._check_dates(claims, now)
        self._check_audience(claims)
        if not self._preset.is_access_token(token.type, claims):
            raise Refused("not_access_token", "the token is not an access token, but perhaps an ID token")
        _check_binding(claims, thumbprint)
        is_client = self._preset.is_client(claims)
        return self._user(
            id=self._id(claims, is_client=is_client),
            kind="client" if is_client else "user",
            roles=frozenset(role for read in self._roles for role in _items(read(claims))),
            scopes=frozenset(scope for read in self._scopes for scope in _words(read(claims))),
            issuer=self._issuer,
            claims=MappingProxyType(claims),
            expires_at=expires_at,
        )

    def _check_dates(self, claims: Mapping[str, Any], now: float) -> float:
        """Return when the token expires."""
        dates = {name: _date(claims, name, now) for name in ("exp", "nbf", "iat")}
        expires, starts, issued = dates["exp"], dates["nbf"], dates["iat"]
        if expires is None:
            raise Refused("claims", "the token has no exp")
        if now >= expires + self._leeway:
            raise Refused("expired", "the token has expired")
        if (starts is not None and starts > now + self._leeway) or (issued is not None and issued > now + self._leeway):
            raise Refused("not_yet_valid", "the token's nbf or iat is in the future")
        return expires

    def _check_audience(self, claims: Mapping[str, Any]) -> None:
        # A token that is bound to another API is refused, whatever else its issuer identifies this one by.
        for claim in {self._preset.audience} | (claims.keys() & {"aud"}):
            found = claims.get(claim)
            names = [found] if isinstance(found, str) else found
            if not self._audience and found is None:
                continue
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise Refused("audience", f"the token has no {claim}, or it is not text")
            if self._audience.isdisjoint(names):
                raise Refused("audience", f"the token's {claim} has no item of AUTH_AUDIENCE")

    def _id(self, claims: Mapping[str, Any], *, is_client: bool) -> str:
        names = self._preset.client if is_client else (self._preset.id,)
        found = next((claims[name] for name in names if name in claims), None)
        if not (isinstance(found, str) and 0 < len(found) <= LONGEST_ID and found.isprintable()):
            raise Refused("claims", f"the token's {' or '.join(names)} is missing, or is not plain text")
        return found


def _date(claims: Mapping[str, Any], name: str, now: float) -> float | None:
    """Return a date of the token, seconds since the epoch; None if it has none.

    Raises:
        Refused: It is no number, or too far away.
    """
    if name not in claims:
        return None
    found = claims[name]
    if isinstance(found, bool) or not isinstance(found, int | float) or not now - _FARTHEST < found < now + _FARTHEST:
        raise Refused("claims", f"the token's {name} is not a number of seconds, or is more than ten years away")
    return float(found)


def _check_binding(claims: Mapping[str, Any], thumbprint: str | None) -> None:
    """Refuse a token that is bound to another key than the one whose possession was proven (RFC 7800, RFC 9449).

    Raises:
        Refused: It is, or it is bound without a proof, or there is a proof and it is not bound.
    """
    if thumbprint is None and "cnf" not in claims:
        return
    if thumbprint is None:
        raise Refused("sender_constrained", "the token is bound to a key (cnf), so it is no bearer token")
    if "cnf" not in claims:
        raise Refused("not_bound", "the token is not bound to a key (cnf), so a proof says nothing about it")
    if not isinstance(claims["cnf"], dict) or claims["cnf"].keys() != {"jkt"}:
        raise Refused("sender_constrained", "the token's cnf is not a jkt alone, so a DPoP proof is not enough")
    if claims["cnf"]["jkt"] != thumbprint:
        raise Refused("proof_key", "the token is bound to another key than that of the DPoP proof")


def _items(value: Any) -> Iterator[str]:
    """Yield the texts of a list; a text alone is a list of one."""
    for item in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        if isinstance(item, str):
            yield item


def _words(value: Any) -> Iterator[str]:
    """Yield the scopes of a claim: words with spaces between them (RFC 6749 section 3.3), or a list."""
    return iter(value.split()) if isinstance(value, str) else _items(value)
