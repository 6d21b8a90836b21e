"""Requests of any caller in a test, without cryptography.

A caller has a random token, which only the test knows. While the test runs, `Auth` knows whose this token is, without
verifying anything. All that follows is as in production: the guard, rules, log lines and limits. Other tokens and API
keys are verified as ever. The library itself accepts no such token: the test replaces the method that verifies them.
"""

import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack
from unittest.mock import patch

from starlette.applications import Starlette
from starlette.types import Scope

from fastapi_prodkit._asgi import header
from fastapi_prodkit.testing.sessions import client_of

if TYPE_CHECKING:
    from httpx2 import AsyncClient

    from fastapi_prodkit.auth import Auth

__all__ = ["Caller", "ClientAs", "HeadersAs"]


class Caller(TypedDict, total=False):
    """What a caller is, beside the id; the fields are those of `User`.

    Attributes:
        roles: The roles.
        scopes: The scopes.
        kind: A person ("user"), a program with a token of its own ("client"), or one with an API key ("key").
        issuer: The `iss` of the token.
        claims: The claims of the token, which a class of your own may read.
        expires_at: When the token expires, seconds since the epoch. A request is not refused because of it.
    """

    roles: Collection[str]
    scopes: Collection[str]
    kind: Literal["user", "client", "key"]
    issuer: str | None
    claims: Mapping[str, Any]
    expires_at: float | None


class HeadersAs:
    """Make headers with which requests come from a caller: the fixture `headers_as`.

    client = TestClient(app, headers=headers_as("alice", roles=["admin"]))
    """

    def __init__(self) -> None:
        self._callers: dict[bytes, dict[str, Any]] = {}

    def __call__(self, user_id: str | None = None, **caller: Unpack[Caller]) -> dict[str, str]:
        """Return the headers of a new caller.

        Args:
            user_id: Id of the caller; None for requests without credentials.
            caller: What the caller is; see `Caller`.

        Raises:
            TypeError: A keyword is not a field of `Caller`, or roles or scopes are one text and not a list.
        """
        from fastapi_prodkit.auth import User  # noqa: PLC0415 - tests without callers do not need it

        fields: dict[str, Any] = {"id": user_id, **caller}
        fields |= {name: _names(fields.get(name, ())) for name in ("roles", "scopes")}
        fields["claims"] = MappingProxyType(dict(fields.get("claims", {})))
        User(**fields)  # an error of the test is raised here, not in the app
        if user_id is None:
            return {}
        line = f"Bearer test.{secrets.token_hex()}"
        self._callers[line.encode()] = fields
        return {"Authorization": line}

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Make every `Auth` accept these callers, inside of `with`."""
        from fastapi_prodkit.auth import Auth  # noqa: PLC0415 - tests without callers do not need it

        verify = Auth._authenticate  # noqa: SLF001 - nothing else is to be replaced

        async def authenticate(auth: "Auth[Any]", scope: Scope) -> Any:
            fields = self._callers.get(header(scope["headers"], b"authorization") or b"")
            return await verify(auth, scope) if fields is None else auth._user(**fields)  # noqa: SLF001 - as it does

        with patch.object(Auth, "_authenticate", authenticate):
            yield


class ClientAs:
    """Open a client whose requests come from a caller: the fixture `client_as`.

    async with client_as("alice", roles=["admin"]) as client: ...
    """

    def __init__(self, app: Starlette, headers_as: HeadersAs) -> None:
        self._app = app
        self._headers_as = headers_as

    def __call__(
        self, user_id: str | None = None, **caller: Unpack[Caller]
    ) -> AbstractAsyncContextManager["AsyncClient"]:
        """Return a context that runs the app's lifespan and yields a client, as `client_of` does.

        Args:
            user_id: Id of the caller; None for a client without credentials.
            caller: What the caller is; see `Caller`.

        Raises:
            TypeError: As of `HeadersAs`.
        """
        return client_of(self._app, headers=self._headers_as(user_id, **caller))


def _names(names: Collection[str]) -> frozenset[str]:
    if isinstance(names, str):
        raise TypeError(f"{names!r} is one text: give a list of names")
    return frozenset(names)
