"""The caller of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["User"]


def _no_claims() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class User:
    """The caller of a request, known by a token or an API key that was verified.

    A subclass with properties is a class of your own, for `Auth(user=Employee)`:

        class Employee(User):
            @property
            def email(self) -> str:
                return self.claims["email"]

    Attributes:
        id: The `sub` of a user's token, the client id of a client's token, or the name of an API key. It is unique
            together with `issuer` and `kind`.
        kind: A person ("user"), a program with a token of its own ("client"), or one with an API key ("key").
        roles: The roles, exactly as the issuer writes them, and those that they imply by AUTH_ROLE_HIERARCHY.
        scopes: The scopes, exactly as the issuer writes them.
        issuer: The `iss` of the token; None for a shared secret or an API key.
        claims: All claims of the token, which were verified; read-only, and not in the repr.
        expires_at: When the token or key becomes invalid, seconds since the epoch; None if it does not.
    """

    id: str
    kind: Literal["user", "client", "key"] = "user"
    roles: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    issuer: str | None = None
    claims: Mapping[str, Any] = field(default_factory=_no_claims, repr=False, compare=False)
    expires_at: float | None = None
