"""The section of authentication."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from fastapi_prodkit.sections.roles import implied_roles
from fastapi_prodkit.sections.section import Section

__all__ = ["ApiKey", "AuthSettings", "is_secure_url", "may_have_keys_at"]

SHORTEST_SECRET: Final = 32  # bytes; RFC 7518 section 3.2: a key of HS256 is at least as long as its hash

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
PresetName = Literal["standard", "auth0", "cognito", "entra", "keycloak", "google", "clerk"]


class ApiKey(BaseModel):
    """An API key that is accepted, without the key itself.

    In a variable it is text, `billing 9f86d081... scope=reports:read role=auditor expires=2027-01-31`: its name, its
    hash, and any number of scopes and roles. Several keys of one name are valid at a time, so that a key can be
    replaced.

    Attributes:
        name: Of the machine that has the key; the id of its user.
        hash: SHA-256 of the key, 64 hexadecimal digits.
        scopes: What the key may be used for.
        roles: Roles of the machine.
        expires: When the key becomes invalid; a time without a zone is in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    hash: str
    scopes: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    expires: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Read the text of a variable."""
        if not isinstance(value, str):
            return value
        words = value.split()
        options = [word.partition("=") for word in words[2:]]
        if len(words) < len(("name", "hash")) or any(name not in ("scope", "role", "expires") for name, *_ in options):
            raise ValueError("must be a name, a hash, and any of scope=..., role=... and expires=..., between spaces")
        found: dict[str, Any] = {
            "scopes": frozenset(text for name, _, text in options if name == "scope"),
            "roles": frozenset(text for name, _, text in options if name == "role"),
        }
        expires = [text for name, _, text in options if name == "expires"]
        if len(expires) > 1:
            raise ValueError("must not have two dates, expires=")
        return {"name": words[0], "hash": words[1], "expires": expires[0] if expires else None, **found}

    @field_validator("hash")
    @classmethod
    def _hashed(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must have the hash of a key, 64 hexadecimal digits, as fastapi-prodkit key writes it")
        return value

    @field_validator("expires")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class AuthSettings(Section):
    """Whose tokens and API keys are accepted: those of OpenID issuers, of a shared secret, or keys of your own."""

    issuer: tuple[str, ...] = Field((), description="URLs of the OpenID issuers, exactly as in the `iss` of a token.")
    audience: tuple[str, ...] = Field(
        (), description="Names of this API, one of which must be in the `aud` of a token."
    )
    preset: tuple[PresetName, ...] = Field(
        (), description="Kind of issuer, one for all or one for each: auth0, clerk, cognito, entra, google, keycloak."
    )
    jwks_url: tuple[str, ...] = Field((), description="URLs of the issuers' keys; discovered by default.")
    algorithms: tuple[Algorithm, ...] = Field(
        ("RS256", "ES256"), min_length=1, description="Signature algorithms that are accepted from issuers."
    )
    roles_claim: tuple[str, ...] = Field(
        (), description="Claims with the roles, such as realm_access.roles; those of the preset by default."
    )
    scopes_claim: tuple[str, ...] = Field((), description="Claims with the scopes; those of the preset by default.")
    default: Literal["required", "optional"] = Field(
        "required", description="Whether a route without a rule of its own needs a caller: required or optional."
    )
    role_hierarchy: tuple[str, ...] = Field(
        (), description="Roles that imply others, such as admin>editor>viewer,owner>editor."
    )
    leeway: float = Field(60.0, ge=0, le=300, description="Clock skew that is tolerated, seconds.")
    close_websockets: bool = Field(True, description="Close a WebSocket when the token or key of its caller expires.")
    secret: SecretStr | None = Field(
        None, min_length=SHORTEST_SECRET, description="Shared secret of HS256 tokens, in place of an issuer."
    )
    dpop: Literal["off", "allowed", "required"] = Field(
        "off", description="Tokens that are bound to a key of the client (RFC 9449): off, allowed or required."
    )
    dpop_nonce: bool = Field(False, description="Require a nonce of this service in each DPoP proof.")
    dpop_nonce_secret: SecretStr | None = Field(
        None, min_length=SHORTEST_SECRET, description="From which nonces are made, equal in all processes."
    )
    api_keys: tuple[ApiKey, ...] = Field((), description="API keys: name, hash, and scope=, role=, expires= of each.")

    @field_validator("issuer", "jwks_url")
    @classmethod
    def _secure(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(is_secure_url, urls)):
            raise ValueError(
                "must have https, a host, and no user, query or fragment; http only for a server on this machine"
            )
        if len(set(urls)) < len(urls):
            raise ValueError("must not repeat a URL")
        return urls

    @field_validator("roles_claim", "scopes_claim", "audience")
    @classmethod
    def _named(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(names):
            raise ValueError("must not have an empty item")
        return names

    @field_validator("role_hierarchy")
    @classmethod
    def _acyclic(cls, hierarchy: tuple[str, ...]) -> tuple[str, ...]:
        implied_roles(hierarchy)  # the error is a ValueError
        return hierarchy

    @model_validator(mode="after")
    def _consistent(self) -> "AuthSettings":
        """Refuse fields that are incomplete, or contradict each other."""
        problems = [
            InitErrorDetails(type=PydanticCustomError("inconsistent", text), loc=(name,), input=None)
            for name, text in self._contradictions()
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    def _contradictions(self) -> Iterator[tuple[str, Any]]:
        yield from self._contradictions_of_dpop()
        issuers = len(self.issuer)
        if not (self.issuer or self.secret or self.api_keys):
            yield "issuer", "is required, or AUTH_SECRET or AUTH_API_KEYS: set one, or remove the others of the section"
            return
        if not issuers:
            for name in {"preset", "jwks_url", "algorithms"}.intersection(self.model_fields_set):
                yield name, "has no effect without AUTH_ISSUER: remove it"
            if self.audience and not self.secret:
                yield "audience", "has no effect without AUTH_ISSUER or AUTH_SECRET: remove it"
            return
        if self.secret:
            yield "secret", "cannot be used with AUTH_ISSUER, whose tokens are signed with keys: remove one of them"
        if not self.audience:
            yield "audience", "is required with AUTH_ISSUER, whose tokens for other APIs would be accepted without it"
        if len(self.preset) not in (0, 1, issuers):
            yield "preset", "must be one for all issuers, or as many as AUTH_ISSUER has, in its order"
        if len(self.jwks_url) not in (0, issuers):
            yield "jwks_url", "must have as many items as AUTH_ISSUER, in its order"
        elif any(not may_have_keys_at(*urls) for urls in zip(self.issuer, self.jwks_url, strict=False)):
            yield "jwks_url", "must be https, like its issuer"

    def _contradictions_of_dpop(self) -> Iterator[tuple[str, Any]]:
        if self.dpop == "off":
            for name in {"dpop_nonce", "dpop_nonce_secret"}.intersection(self.model_fields_set):
                yield name, "has no effect without AUTH_DPOP: remove it"
        elif not (self.issuer or self.secret):
            yield "dpop", "has no effect without AUTH_ISSUER or AUTH_SECRET, whose tokens are bound: remove it"
        elif self.dpop_nonce_secret and not self.dpop_nonce:
            yield "dpop_nonce_secret", "has no effect without AUTH_DPOP_NONCE: remove it"


def is_secure_url(url: str) -> bool:
    """Return whether the URL has https, or http to this machine, and no user, query, fragment or white space."""
    if not re.fullmatch(r"https?://[!-~]+", url) or re.search(r"[?#@\\]", url):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return bool(parts.hostname) and (parts.scheme == "https" or is_loopback(str(parts.hostname)))


def may_have_keys_at(issuer: str, url: str) -> bool:
    """Return whether the keys of an issuer may be at a URL: http only if the issuer has no https either."""
    return is_secure_url(url) and (url.startswith("https:") or issuer.startswith("http:"))


def is_loopback(host: str) -> bool:
    """Return whether the host is this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
