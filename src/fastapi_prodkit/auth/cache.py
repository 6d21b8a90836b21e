"""Remember verified credentials, so that a request with a known token costs a hash and a look-up.

The cache has a hash of what was sent, never a token. It has no lock: only the event loop adds entries, and any
thread may read them.
"""

import hashlib
import math
from collections.abc import Callable
from sys import getsizeof
from typing import Any, Final, Generic, NamedTuple

from fastapi_prodkit.auth.claims import UserT
from fastapi_prodkit.auth.keys import Key
from fastapi_prodkit.auth.user import User

__all__ = ["VerifiedCredentials"]

MOST_ENTRIES: Final = 10_000
LARGEST: Final = 10_000_000  # bytes; a token with a dozen claims takes about 3000
LONGEST: Final = 3600.0  # seconds; after that a token is verified anew, which also asks whether its key is still fresh
_DIGEST: Final = 32  # bytes, as many as those of SHA-256
_ENTRY: Final = 800  # bytes of an entry beside claims, roles and scopes


class _Entry(NamedTuple, Generic[UserT]):
    user: UserT
    valid_until: float
    size: int
    key: Key | None


class VerifiedCredentials(Generic[UserT]):
    """The users of credentials that were verified, until these expire; the oldest entries make room for new ones.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._digest = _fastest_digest()
        self._entries: dict[bytes, _Entry[UserT]] = {}
        self._size = 0

    def get(self, credentials: bytes) -> UserT | None:
        """Return the user of these credentials; None if they are not known, not any more, or with a withdrawn key."""
        entry = self._entries.get(self._digest(credentials))
        if entry is None or entry.valid_until <= self._clock() or (entry.key is not None and entry.key.withdrawn):
            return None
        return entry.user

    def knows(self, credentials: bytes) -> bool:
        """Return whether these credentials were verified before, even if they have to be verified again."""
        return self._digest(credentials) in self._entries

    def forget(self, credentials: bytes) -> None:
        """Forget credentials that are not valid any more."""
        self._remove(self._digest(credentials))

    def add(self, credentials: bytes, user: UserT, key: Key | None = None, *, ask_again: bool = False) -> None:
        """Remember the user of credentials that were just verified, until `user.expires_at`.

        Args:
            credentials: What was sent.
            user: Whose they are.
            key: With which key they were verified; None for an API key.
            ask_again: They have to be verified for each request: `get` never finds them, but `knows` does.
        """
        digest = self._digest(credentials)
        longest = -math.inf if ask_again else self._clock() + LONGEST
        valid_until = longest if user.expires_at is None else min(user.expires_at, longest)
        entry = _Entry(user, valid_until, _size_of(user), key)
        self._remove(digest)  # an entry of the same credentials that has expired
        self._entries[digest] = entry
        self._size += entry.size
        while len(self._entries) > MOST_ENTRIES or self._size > LARGEST:
            self._remove(next(iter(self._entries)))

    def _remove(self, digest: bytes) -> None:
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self._size -= entry.size


def _blake2b(credentials: bytes) -> bytes:
    return hashlib.blake2b(credentials, digest_size=_DIGEST).digest()


def _sha256(credentials: bytes) -> bytes:
    return hashlib.sha256(credentials).digest()


def _fastest_digest() -> Callable[[bytes], bytes]:
    """Return BLAKE2b, or where it is forbidden, as in FIPS mode, SHA-256: OpenSSL takes longer to begin a hash."""
    try:
        _blake2b(b"")
    except (AttributeError, TypeError, ValueError):
        return _sha256
    return _blake2b


def _size_of(user: User) -> int:
    """Return how much memory the entry of a user takes, bytes."""
    size = _ENTRY
    parts: list[Any] = [dict(user.claims), user.roles, user.scopes]
    while parts:  # not recursive: claims may be nested deeply
        part = parts.pop()
        size += getsizeof(part)
        if isinstance(part, dict):
            parts += part
            parts += part.values()
        elif isinstance(part, list | frozenset):
            parts += part
    return size
