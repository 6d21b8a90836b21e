"""Functions that identify the client: requests with equal keys share a quota."""

import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from uuid import UUID

from starlette.requests import HTTPConnection

from fastapi_prodkit import _scope
from fastapi_prodkit._counting import client_key
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["Key", "by_address", "by_header", "by_user"]

# None: the request is not limited.
KeyValue = str | bytes | int | UUID | None
Key = Callable[[HTTPConnection], KeyValue | Awaitable[KeyValue]]

_PLAIN = re.compile("[!-~]{0,64}")  # a key that every store accepts; other keys are replaced by their hash


def by_address(connection: HTTPConnection) -> str:
    """Count requests by the client's address; the default."""
    return client_key(connection.scope)


def by_header(name: str) -> Key:
    """Count requests by the value of a header, such as `X-API-Key`.

    Only a hash of the value is stored. Requests without the header count by address.
    """

    def key(connection: HTTPConnection) -> str:
        value = connection.headers.get(name)
        return by_address(connection) if value is None else hashed(value)

    return key


def by_user(connection: HTTPConnection) -> str:
    """Count requests by the caller that `auth` has authenticated, wherever they come from; others by address.

        @app.post("/reports", dependencies=[Depends(RateLimit("5/minute", key=by_user))])

    The caller is known behind the guard of `create_app` and `guard_routes`; in an app without a guard, once a
    dependency further up has authenticated it. A caller is an issuer, a kind and an id; only their hash is stored. The
    default limit counts by address, because it counts before a token is verified.
    """
    user = _scope.caller(connection.scope)
    if user is None:
        return by_address(connection)
    return hashed(f"{user.issuer or ''}\n{user.kind}\n{user.id}")


def hashed(value: str) -> str:
    """Return a hash of the value, of fixed length, that is safe to store."""
    return f"#{blake2b(value.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def bounded(key: object) -> str:
    """Return the text of a key, or its hash if it is long or has special characters: the client may control it.

    Raises:
        ConfigurationError: The key is not a text, bytes, an integer or a UUID. The text of other objects may contain
            their memory address, which would give each request a separate quota.
    """
    if not isinstance(key, str | bytes | int | UUID):
        raise ConfigurationError(
            f"the key function of a rate limit returned an object of type {type(key).__name__}; "
            "return a text, bytes, an integer or a UUID, or None for a request that is not limited"
        )
    text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    return text if _PLAIN.fullmatch(text) else hashed(text)
