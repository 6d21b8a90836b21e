"""API keys for machines: how one is made, and whose a key is.

    prodkit_<64 hexadecimal digits: 32 random bytes><8: their CRC-32>

The prefix lets secret scanners and people recognise a key that has leaked. The checksum lets a key that was cut or
mistyped be refused without a search, and scanners tell keys from text that looks like one. It proves nothing.

Only the SHA-256 of a key is stored. A fast hash is enough for a key, which is 32 random bytes: nobody can try them all.
A password can be guessed, so it needs a slow hash. A search by hash may take a time that depends on the hash, because
a client cannot choose the hash of what it sends, and the hash does not lead to the key.
"""

import hmac
import inspect
import re
import secrets
import zlib
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import Final

from fastapi_prodkit.auth.refusal import Refused
from fastapi_prodkit.sections.auth import ApiKey

__all__ = ["ApiKey", "ApiKeys", "FindKey", "hash_api_key", "new_api_key"]

PREFIX: Final = "prodkit_"
_BYTES: Final = 32  # random ones, as many as the hash has
_FORM: Final = re.compile(rb"prodkit_([0-9a-f]{64})([0-9a-f]{8})")

FindKey = Callable[[str], Awaitable[ApiKey | None] | ApiKey | None]


def new_api_key() -> str:
    """Return a new key. Show the key once, to the person who will use it; store only its `hash_api_key(key)`."""
    digits = secrets.token_hex(_BYTES)
    return f"{PREFIX}{digits}{_checksum(digits.encode())}"


def hash_api_key(key: str) -> str:
    """Return what is stored of a key: its SHA-256, 64 hexadecimal digits."""
    return sha256(key.encode()).hexdigest()


def _find_nothing(hashed: str) -> None:  # noqa: ARG001 - a FindKey
    return None


def _checksum(digits: bytes) -> str:
    return f"{zlib.crc32(digits):08x}"


class ApiKeys:
    """Find out whose a key is.

    Args:
        configured: The keys of the settings.
        find: Called with the hash of a key that is not among these: returns the key, or None.
        clock: Seconds since the epoch.
    """

    def __init__(self, configured: Iterable[ApiKey], find: FindKey | None, clock: Callable[[], float]) -> None:
        self._configured = tuple(configured)
        self._find = find or _find_nothing
        self._clock = clock

    async def find(self, sent: bytes) -> tuple[ApiKey, bool]:
        """Return the key that was sent, and whether it is one of the settings, which never change.

        Raises:
            Refused: It is not a key of this form, not known, or expired.
        """
        form = _FORM.fullmatch(sent)
        if form is None or _checksum(form[1]).encode() != form[2]:
            raise Refused("malformed", "the API key was cut or mistyped, or is none of ours")
        hashed = hash_api_key(sent.decode())
        found = self._among_configured(hashed)
        is_configured = found is not None
        if found is None:
            found = await self._ask(hashed)
        if found is None:
            raise Refused("api_key", "the API key is not known")
        if found.expires is not None and self._clock() >= found.expires.timestamp():
            raise Refused("expired", f"the API key of {found.name} has expired")
        return found, is_configured

    def _among_configured(self, hashed: str) -> ApiKey | None:
        """Return the key with this hash; the time depends on how many there are, not on which one it is."""
        found = None
        for key in self._configured:
            if hmac.compare_digest(key.hash, hashed):
                found = key
        return found

    async def _ask(self, hashed: str) -> ApiKey | None:
        answer = self._find(hashed)
        found = await answer if inspect.isawaitable(answer) else answer
        # The search of a database may ignore the case of letters, or spaces at the end.
        return found if found is not None and hmac.compare_digest(found.hash, hashed) else None
