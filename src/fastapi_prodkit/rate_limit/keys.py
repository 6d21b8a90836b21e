"""Whose requests are counted together."""

import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from uuid import UUID

from starlette.requests import HTTPConnection

from fastapi_prodkit._counting import client_key
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["Key", "by_address", "by_header"]

# None: the request is not limited.
KeyValue = str | bytes | int | UUID | None
Key = Callable[[HTTPConnection], KeyValue | Awaitable[KeyValue]]

_PLAIN = re.compile("[!-~]{0,64}")  # a key that is kept as it is; others, which some stores refuse, as their hash


def by_address(connection: HTTPConnection) -> str:
    """Count the requests of one address together: the default."""
    return client_key(connection.scope)


def by_header(name: str) -> Key:
    """Count the requests together that carry the same value in a header, such as `X-API-Key`.

    The value is kept as its hash only. Requests without the header count by address.
    """

    def key(connection: HTTPConnection) -> str:
        value = connection.headers.get(name)
        return by_address(connection) if value is None else hashed(value)

    return key


def hashed(value: str) -> str:
    """Return the value as it may be kept in memory and in a store: not to be read, and of one length."""
    return f"#{blake2b(value.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def bounded(key: object) -> str:
    """Return the text of a key, or its hash where it is long or has spaces or the like: a client may have chosen it.

    Raises:
        ConfigurationError: The key is neither a text, nor bytes, an integer or a UUID. The text of another object may
            hold its address in memory: then each request would have a quota of its own.
    """
    if not isinstance(key, str | bytes | int | UUID):
        raise ConfigurationError(
            f"the key function of a rate limit returned an object of type {type(key).__name__}; "
            "return a text, bytes, an integer or a UUID, or None for a request that is not limited"
        )
    text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    return text if _PLAIN.fullmatch(text) else hashed(text)
