"""What the access tokens of each kind of issuer look like, and how they differ from its ID tokens.

Sources: RFC 9068 (JWT profile for access tokens) and the vendors' documentation:

    auth0      Access Token Profiles; Enable RBAC for APIs (`permissions`)     https://auth0.com/docs/secure/tokens
    cognito    Understanding the access token                                  https://docs.aws.amazon.com/cognito
    entra      Access token claims reference, version 2.0            https://learn.microsoft.com/entra/identity-platform
    keycloak   Server Administration Guide, protocol mappers                   https://www.keycloak.org/docs
    google     Verify the Google ID token on your server side        https://developers.google.com/identity
    clerk      Session tokens; JWT templates                                   https://clerk.com/docs

An ID token tells an app who has signed in. An API that accepts one lets every app of the issuer act as the people who
sign in there, so an access token must be recognised by what only access tokens have (RFC 8725 section 3.12).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_prodkit.sections.auth import PresetName

__all__ = ["PRESETS", "SHARED_SECRET", "Preset", "claim_at"]

Claims = Mapping[str, Any]

_ACCESS_TOKEN: Final = "at+jwt"  # noqa: S105 - the `typ` of RFC 9068 section 2.1, which no ID token has
_ANY_TYPE: Final = frozenset({_ACCESS_TOKEN, "jwt", ""})
_ONLY_ID_TOKENS: Final = ("nonce", "at_hash", "c_hash", "s_hash")  # OpenID Connect Core, sections 2 and 3.3.2.11


def _is_own_subject(claims: Claims) -> bool:
    """Return whether a client is its own subject (RFC 9068 section 2.2: client credentials)."""
    return "sub" in claims and claims["sub"] in (claims.get("client_id"), claims.get("cid"))


def _never(claims: Claims) -> bool:  # noqa: ARG001 - the signature of `is_client`
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What the access tokens of one kind of issuer look like.

    Attributes:
        roles: Claims with roles; a dot leads into a nested object, except in the name of a claim that is a URL.
        scopes: Claims with scopes: text with spaces between them, or a list.
        id: Claim that identifies a person.
        client: Claims with the client id; the first that a token has.
        audience: Claim that must have one of AUTH_AUDIENCE.
        types: Values of the header's `typ` that are accepted, in lower case; empty is a header without one.
        marks: A token that is not `at+jwt` must have one of these claims, which only access tokens have.
        values: Claims that must have exactly this value.
        id_tokens: Whether ID tokens are what is accepted.
        is_client: Whether a token is a client's own, and not a person's.
    """

    roles: tuple[str, ...] = ("roles",)
    scopes: tuple[str, ...] = ("scope",)
    id: str = "sub"
    client: tuple[str, ...] = ("client_id", "azp")
    audience: str = "aud"
    types: frozenset[str] = _ANY_TYPE
    marks: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    id_tokens: bool = False
    is_client: Callable[[Claims], bool] = _is_own_subject

    def is_access_token(self, kind: str, claims: Claims) -> bool:
        """Return whether the token is meant for APIs, by its header's `typ` and its claims."""
        if any(claims.get(name) != value for name, value in self.values):
            return False
        if self.id_tokens or kind == _ACCESS_TOKEN:
            return True
        has_mark = not self.marks or any(name in claims for name in self.marks)
        return has_mark and not any(name in claims for name in _ONLY_ID_TOKENS)


PRESETS: Final[Mapping[PresetName, Preset]] = {
    # RFC 9068. Issuers that do not set `at+jwt` are accepted if the token has a claim that ID tokens have not.
    "standard": Preset(
        scopes=("scope", "scp"), client=("client_id", "cid", "azp"), marks=("client_id", "cid", "scope", "scp")
    ),
    # Profile "auth0": `azp` and `gty`; profile "rfc9068": `client_id`. `permissions` is what the person may do, while
    # `scope` is what the app has asked for. The `iss` ends with a slash.
    "auth0": Preset(
        roles=("permissions",),
        marks=("azp", "client_id"),
        is_client=lambda claims: claims.get("gty") == "client-credentials" or _is_own_subject(claims),
    ),
    # Access tokens have no `aud` unless one was asked for: AUTH_AUDIENCE is the list of app client ids.
    "cognito": Preset(
        roles=("cognito:groups",), client=("client_id",), audience="client_id", values=(("token_use", "access"),)
    ),
    # `sub` is another one for each app, so people are identified by `oid`. Tokens of apps have no `scp`.
    "entra": Preset(
        scopes=("scp",),
        id="oid",
        client=("azp",),
        marks=("azp",),
        values=(("ver", "2.0"),),
        is_client=lambda claims: "scp" not in claims,
    ),
    # ID tokens have `typ: ID`, refresh tokens `typ: Refresh`. The tokens of service accounts have a `client_id`.
    "keycloak": Preset(
        roles=("realm_access.roles",),
        client=("client_id", "azp"),
        values=(("typ", "Bearer"),),
        is_client=lambda claims: "client_id" in claims and claims["client_id"] == claims.get("azp"),
    ),
    # Access tokens for Google's own APIs are not JWTs. ID tokens have no roles and no scopes.
    "google": Preset(roles=(), scopes=(), client=("azp",), types=frozenset({"jwt"}), id_tokens=True, is_client=_never),
    # Session tokens have no `aud`: use a JWT template that adds it. Version 2 has the role in `o`, version 1 has it in
    # `org_role`. `azp` is the origin of a web page, which other apps do not have, so nothing but the `aud` of the
    # template tells them from ID tokens without a nonce: choose one that is no client id.
    "clerk": Preset(roles=("o.rol", "org_role"), client=("client_id",), is_client=_never),
}

# Tokens that the service signs itself: there is no issuer, and there are no ID tokens.
SHARED_SECRET: Final = Preset(scopes=("scope", "scopes"))


def claim_at(path: str) -> Callable[[Claims], Any]:
    """Return a function that reads the claim at a path; of a token without it, None."""
    keys = (path,) if "://" in path else tuple(path.split("."))

    def read(claims: Claims) -> Any:
        found: Any = claims
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read
