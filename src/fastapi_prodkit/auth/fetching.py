"""Fetch the documents of an issuer over HTTPS, with bounds: time, size, and no redirect."""

import asyncio
import json
import re
import ssl
from typing import Any, Final, NamedTuple

from fastapi_prodkit import _extras
from fastapi_prodkit.sections.auth import may_have_keys_at

__all__ = ["Document", "FetchError", "Fetcher", "discovery_url"]

TIMEOUT: Final = 5.0  # seconds for all that one refresh fetches
LARGEST: Final = 262_144  # bytes of one document; real ones have up to 20 KiB
_OK: Final = 200
_MAX_AGE: Final = re.compile(r"\bmax-age=(\d{1,9})\b", re.IGNORECASE)


class FetchError(Exception):
    """A document cannot be fetched, or is not what it must be. The message says which and why."""


class Document(NamedTuple):
    """A JSON document.

    Attributes:
        content: The parsed document.
        max_age: How long it may be cached, seconds; None if the server does not say.
    """

    content: Any
    max_age: float | None


def discovery_url(issuer: str) -> str:
    """Return the URL of the discovery document of an issuer (OpenID Connect Discovery section 4)."""
    return f"{issuer.rstrip('/')}/.well-known/openid-configuration"


class Fetcher:
    """Fetch the key set of an issuer, which its OpenID discovery document names.

    Args:
        issuer: URL of the issuer.
        jwks_url: URL of its key set; found by discovery unless given.
        ssl_context: Trusted certificates; those of the system, or of SSL_CERT_FILE, unless given.

    Attributes:
        token_endpoint: URL where the issuer exchanges codes for tokens; None until it is discovered.

    Raises:
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(self, issuer: str, jwks_url: str | None, ssl_context: ssl.SSLContext | None) -> None:
        self._issuer = issuer
        self._jwks_url = jwks_url
        self.token_endpoint: str | None = None
        self._ssl_context = ssl_context
        self._httpx: Any = _extras.require("httpx2", extra="auth")

    async def key_set(self) -> Document:
        """Fetch the key set.

        Raises:
            FetchError: It cannot be fetched within five seconds.
        """
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._ssl_context is None:  # reading the system's certificates takes 20 ms
                    self._ssl_context = await asyncio.to_thread(self._httpx.create_ssl_context)
                async with self._httpx.AsyncClient(verify=self._ssl_context, timeout=TIMEOUT) as client:
                    return await self._fetch(client, self._jwks_url or await self._discover(client))
        except (TimeoutError, self._httpx.TimeoutException):
            raise FetchError(f"{self._issuer} did not answer within {TIMEOUT:g} s") from None
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError) as error:
            raise FetchError(f"{self._issuer} cannot be reached: {error or type(error).__name__}") from error

    async def _discover(self, client: Any) -> str:
        """Return the URL of the key set, and note that of the token endpoint."""
        url = discovery_url(self._issuer)
        document = (await self._fetch(client, url)).content
        named = document.get("issuer") if isinstance(document, dict) else None
        if named != self._issuer:  # a document of another issuer would let that one sign tokens of this one
            raise FetchError(f"{url} names {str(named)[:200]} as its issuer, and AUTH_ISSUER must be exactly that")
        keys = document.get("jwks_uri")
        if not isinstance(keys, str) or not may_have_keys_at(self._issuer, keys):
            raise FetchError(f"{url} has no jwks_uri with https")
        tokens = document.get("token_endpoint")
        self.token_endpoint = tokens if isinstance(tokens, str) else None
        return keys

    async def _fetch(self, client: Any, url: str) -> Document:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # nothing small that becomes large
        async with client.stream("GET", url, headers=headers) as response:
            if response.status_code != _OK:
                raise FetchError(f"{url} answered {response.status_code}")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > LARGEST:
                    raise FetchError(f"{url} has more than {LARGEST} bytes")
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise FetchError(f"{url} is not JSON") from None
        max_age = _MAX_AGE.search(response.headers.get("cache-control", ""))
        return Document(content, float(max_age[1]) if max_age else None)
