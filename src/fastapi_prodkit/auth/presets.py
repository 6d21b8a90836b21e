"""What the access tokens of each kind of issuer look like, and how they differ from its ID tokens.

Sources: RFC 9068 (JWT profile for access tokens) and the vendors' documentation:

    auth0      https://auth0.com/docs/secure/tokens/access-tokens/access-token-profiles
    clerk      https://clerk.com/docs/guides/sessions/session-tokens, and .../jwt-templates
    cognito    https://docs.aws.amazon.com/cognito/latest/developerguide, "Understanding the access token"
    entra      https://learn.microsoft.com/entra/identity-platform/access-token-claims-reference
    google     https://developers.google.com/identity/gsi/web/guides/verify-google-id-token
    keycloak   https://www.keycloak.org/docs/latest/server_admin, "OIDC token and SAML assertion mappings"
    okta       https://developer.okta.com/docs/reference/api/oidc, a standard issuer

An ID token tells an app who has signed in. An API that accepts one lets every app of the issuer act as the people who
sign in there, so an access token must be recognised by what only access tokens have (RFC 8725 section 3.12).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_prodkit.sections.auth import PresetName

__all__ = ["PRESETS", "SHARED_SECRET", "Preset", "claim_at", "keys_to"]

Claims = Mapping[str, Any]

_ACCESS_TOKEN: Final = "at+jwt"  # noqa: S105 - the `typ` of RFC 9068 section 2.1, which no ID token has
_ANY_TYPE: Final = frozenset({_ACCESS_TOKEN, "jwt", ""})
_URL: Final = re.compile(r"[a-z]+://")
_LEADS_INTO: Final = re.compile(r"(?<!\\)\.")
_ONLY_ID_TOKENS: Final = ("nonce", "at_hash", "c_hash", "s_hash")  # OpenID Connect Core, sections 2 and 3.3.2.11


def _is_own_subject(claims: Claims) -> bool:
    """Return whether a client is its own subject (RFC 9068 section 2.2: client credentials)."""
    return "sub" in claims and claims["sub"] in (claims.get("client_id"), claims.get("cid"))


def _never(claims: Claims) -> bool:  # noqa: ARG001 - the signature of `is_client`
    return False


def _always(claims: Claims) -> bool:  # noqa: ARG001 - the signature of `accepts`
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What the access tokens of one kind of issuer look like.

    Attributes:
        roles: Claims with roles; a dot leads into a nested object, except in the name of a claim that is a URL.
        scopes: Claims with scopes: text with spaces between them, or a list.
        id: Claim that identifies a person.
        client: Claims with the client id; the first that a token has.
        audience: Claim that must have one of AUTH_AUDIENCE; so must `aud`, if a token has it.
        types: Values of the header's `typ` that are accepted, in lower case; empty is a header without one.
        marks: A token that is not `at+jwt` must have one of these claims, which only access tokens have.
        accepts: What the claims of a token must say, as well.
        id_tokens: Whether ID tokens are what is accepted.
        is_client: Whether a token is a client's own, and not a person's.
        is_bare_host: Whether the `iss` may also be the host of the issuer alone, without `https://`.
    """

    roles: tuple[str, ...] = ("roles",)
    scopes: tuple[str, ...] = ("scope",)
    id: str = "sub"
    client: tuple[str, ...] = ("client_id", "azp")
    audience: str = "aud"
    types: frozenset[str] = _ANY_TYPE
    marks: tuple[str, ...] = ()
    accepts: Callable[[Claims], bool] = _always
    id_tokens: bool = False
    is_client: Callable[[Claims], bool] = _is_own_subject
    is_bare_host: bool = False

    def names_of(self, issuer: str) -> tuple[str, ...]:
        """Return the values of `iss` that mean an issuer."""
        return (issuer, issuer.removeprefix("https://")) if self.is_bare_host else (issuer,)

    def is_access_token(self, kind: str, claims: Claims) -> bool:
        """Return whether the token is meant for APIs, by its header's `typ` and its claims."""
        if not self.accepts(claims):
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
    # Profile "auth0": `azp`; profile "rfc9068": `client_id`. `permissions` is what the person may do, while `scope` is
    # what the app has asked for. The `iss` ends with a slash. An app is its own subject with `@clients` after its id.
    "auth0": Preset(
        roles=("permissions",),
        marks=("azp", "client_id"),
        is_client=lambda claims: claims.get("sub") == f"{claims.get('client_id', claims.get('azp'))}@clients",
    ),
    # AUTH_AUDIENCE is the list of app client ids. Access tokens have an `aud` only if the app has asked for one
    # (resource binding), which apps without a person cannot.
    "cognito": Preset(
        roles=("cognito:groups",),
        client=("client_id",),
        audience="client_id",
        accepts=lambda claims: claims.get("token_use") == "access",
    ),
    # `sub` is another one for each app, so people are identified by `oid`. Tokens of apps have no `scp`; `idtyp` is
    # "the most accurate way" to tell, and optional.
    "entra": Preset(
        scopes=("scp",),
        id="oid",
        client=("azp",),
        marks=("azp",),
        accepts=lambda claims: claims.get("ver") == "2.0",
        is_client=lambda claims: claims.get("idtyp", "user" if "scp" in claims else "app") != "user",
    ),
    # ID tokens have `typ: ID`, refresh tokens `typ: Refresh`, tokens that are bound to a key `typ: DPoP`. The tokens of
    # service accounts have a `client_id`.
    "keycloak": Preset(
        roles=("realm_access.roles",),
        client=("client_id", "azp"),
        accepts=lambda claims: claims.get("typ") == "Bearer" or (claims.get("typ") == "DPoP" and "cnf" in claims),
        is_client=lambda claims: "client_id" in claims and claims["client_id"] == claims.get("azp"),
    ),
    # Access tokens for Google's own APIs are not JWTs. ID tokens have no roles and no scopes. Those of service accounts
    # have their own id as `azp`.
    "google": Preset(
        roles=(),
        scopes=(),
        client=("azp",),
        types=frozenset({"jwt"}),
        id_tokens=True,
        is_client=lambda claims: claims.get("azp") == claims.get("sub"),
        is_bare_host=True,
    ),
    # Session tokens have no `aud`: customize them, or use a JWT template. Version 2 has the role in `o`, version 1 has
    # it in `org_role`. A session is pending until the person has done what sign-in still requires. `azp` is the origin
    # of a web page, which other apps do not have, so nothing but the `aud` tells these tokens from ID tokens without a
    # nonce: choose one that is no client id.
    "clerk": Preset(
        roles=("o.rol", "org_role"),
        client=("client_id",),
        accepts=lambda claims: claims.get("sts", "active") == "active",
        is_client=_never,
    ),
}

# Tokens that the service signs itself: there is no issuer, and there are no ID tokens.
SHARED_SECRET: Final = Preset(scopes=("scope", "scopes"))


def keys_to(path: str) -> list[str]:
    r"""Return the names that lead to a claim.

    A dot leads into an object, except `\.` (as in Keycloak's mappers) and in a name that is a URL.
    """
    return [path] if _URL.match(path) else [key.replace("\\.", ".") for key in _LEADS_INTO.split(path)]


def claim_at(path: str) -> Callable[[Claims], Any]:
    """Return a function that reads the claim at a path; of a token without it, None."""
    keys = keys_to(path)

    def read(claims: Claims) -> Any:
        found: Any = claims
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read
