"""Nonces of DPoP (RFC 9449 sections 8 and 9), by which proofs cannot be made in advance.

A nonce is an HMAC of the number of a window of time, so none is stored, and all processes with one key accept it.
"""

import base64
import hmac
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from fastapi_prodkit.auth.jose import is_text
from fastapi_prodkit.auth.refusal import Refused

__all__ = ["SECONDS", "Nonces"]

SECONDS: Final = 180  # of a window; a nonce is valid in its own window and in the next one
_BYTES: Final = 16


class Nonces:
    """Make nonces, and recognise them.

    Args:
        secret: From which the key is derived, equal in all processes.
        clock: Seconds since the epoch.
    """

    def __init__(self, secret: bytes, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key = hmac.digest(secret, b"fastapi-prodkit DPoP nonce", "sha256")  # of its own, for no other purpose
        self._of_window = lru_cache(maxsize=8)(self._make)

    def current(self) -> str:
        """Return the nonce of now."""
        return self._of_window(self._window())

    def check(self, nonce: Any) -> bool:
        """Return whether a nonce is the current one, and not one that becomes invalid next.

        Raises:
            Refused: It is neither.
        """
        window = self._window()
        # The next one as well: the clock of the process that has sent it may be ahead.
        for each in (window, window + 1, window - 1):
            if is_text(nonce, self._of_window(each)):
                return each >= window
        raise Refused("proof_nonce", "the DPoP proof has no nonce, or an old one")

    def _window(self) -> int:
        return math.floor(self._clock() / SECONDS)

    def _make(self, window: int) -> str:
        digest = hmac.digest(self._key, str(window).encode(), "sha256")
        return base64.urlsafe_b64encode(digest[:_BYTES]).rstrip(b"=").decode()
