"""The claims of access tokens, in the shape of each kind of issuer; `auth.presets` names the sources."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi_prodkit.sections.auth import PresetName

__all__ = ["LIFETIME", "SHAPES", "TokenRequest"]

LIFETIME: Final = 3600  # seconds for which a token is valid


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What a token is about.

    Attributes:
        issuer: The `iss`.
        audience: Name of the API.
        subject: Id of the person; of a client, its client id.
        client: Client id of the app.
        is_client: Whether the token is the client's own.
        roles: Roles of the person.
        scopes: Scopes that the app was granted.
    """

    issuer: str
    audience: str
    subject: str
    client: str
    is_client: bool
    roles: Sequence[str]
    scopes: Sequence[str]

    def registered(self, subject: str, **claims: Any) -> dict[str, Any]:
        """Return the claims that all tokens have (RFC 7519 section 4.1), and further ones."""
        now = int(time.time())
        common = {"iss": self.issuer, "sub": subject, "iat": now, "exp": now + LIFETIME, "jti": secrets.token_hex(8)}
        return {**common, **claims}


def _standard(request: TokenRequest) -> dict[str, Any]:
    return request.registered(
        request.subject,
        aud=request.audience,
        client_id=request.client,
        scope=" ".join(request.scopes),
        roles=list(request.roles),
    )


def _auth0(request: TokenRequest) -> dict[str, Any]:
    granted = {"azp": request.client, "scope": " ".join(request.scopes), "permissions": list(request.roles)}
    if request.is_client:
        subject = f"{request.client}@clients"
        return request.registered(subject, aud=request.audience, **granted)
    return request.registered(request.subject, aud=[request.audience, f"{request.issuer}userinfo"], **granted)


def _cognito(request: TokenRequest) -> dict[str, Any]:
    client = {"client_id": request.audience, "token_use": "access", "version": 2, "scope": " ".join(request.scopes)}
    if request.is_client:
        return request.registered(request.audience, **client)
    return request.registered(
        request.subject,
        **{"cognito:groups": list(request.roles)},
        username=request.subject,
        origin_jti=secrets.token_hex(8),
        **client,
    )


def _entra(request: TokenRequest) -> dict[str, Any]:
    directory = {"azp": request.client, "oid": request.subject, "tid": "9188040d", "uti": "x1", "ver": "2.0"}
    roles = {"roles": list(request.roles)} if request.roles else {}
    if request.is_client:
        return request.registered(request.subject, aud=request.audience, azpacr="1", **directory, **roles)
    return request.registered(
        f"pairwise-{request.subject}",
        aud=request.audience,
        azpacr="0",
        scp=" ".join(request.scopes),
        preferred_username=f"{request.subject}@example.com",
        **directory,
        **roles,
    )


def _keycloak(request: TokenRequest) -> dict[str, Any]:
    service_account = {"client_id": request.client, "clientHost": "10.0.0.1"} if request.is_client else {}
    return request.registered(
        request.subject,
        aud=[request.audience, "account"],
        typ="Bearer",
        azp=request.client,
        sid=secrets.token_hex(8),
        realm_access={"roles": list(request.roles)},
        resource_access={"account": {"roles": ["view-profile"]}},
        scope=" ".join(request.scopes),
        preferred_username=request.subject,
        **service_account,
    )


def _google(request: TokenRequest) -> dict[str, Any]:
    return request.registered(
        request.subject,
        aud=request.audience,
        azp=request.subject if request.is_client else request.audience,
        at_hash="HK6E_P6Dh8Y93mRNtsDB1Q",
        email=f"{request.subject}@example.com",
        email_verified=True,
    )


def _clerk(request: TokenRequest) -> dict[str, Any]:
    organization = {"o": {"id": "org_1", "rol": request.roles[0], "slg": "acme"}} if request.roles else {}
    return request.registered(
        request.subject,
        aud=request.audience,
        azp="https://app.example.com",
        sid="sess_1",
        v=2,
        scope=" ".join(request.scopes),
        **organization,
    )


SHAPES: Final[Mapping[PresetName, Callable[[TokenRequest], dict[str, Any]]]] = {
    "standard": _standard,
    "auth0": _auth0,
    "cognito": _cognito,
    "entra": _entra,
    "keycloak": _keycloak,
    "google": _google,
    "clerk": _clerk,
}
