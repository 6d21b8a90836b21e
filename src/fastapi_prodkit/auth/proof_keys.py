"""The key that a DPoP proof names in its header, and the thumbprint by which a token is bound to it (RFC 7638)."""

import base64
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from fastapi_prodkit.auth.keys import Key, fits, is_for_signatures, new_key
from fastapi_prodkit.auth.refusal import Refused

__all__ = ["ALGORITHMS", "ProofKeys", "base64url_sha256"]

ALGORITHMS: Final = ("ES256", "ES384", "ES512", "EdDSA", "PS256", "RS256")  # of clients, whatever the issuers' are
_MOST_KEYS: Final = 1024  # that are kept parsed; they take about 3 MB

_Covered = tuple[tuple[str, str], ...]  # names and values

# Members of a key that its thumbprint covers, in its order (RFC 7638 section 3.2, RFC 8037 section 2), and how long
# they may be. A modulus has at most 4096 bits, and an exponent at most 32: larger ones take milliseconds a signature.
_MEMBERS: Final[Mapping[str, Mapping[str, int]]] = {
    "EC": {"crv": 5, "kty": 2, "x": 88, "y": 88},
    "OKP": {"crv": 7, "kty": 3, "x": 43},
    "RSA": {"e": 6, "kty": 3, "n": 683},
}
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]+")  # base64url, and the names of types and curves


class ProofKeys:
    """Read the keys of proofs. Clients use a key for many proofs, so the last ones are kept parsed."""

    def __init__(self) -> None:
        self._parsed = lru_cache(maxsize=_MOST_KEYS)(_parse)

    def read(self, algorithm: str, jwk: Any) -> tuple[Key, str]:
        """Return the key of a proof's header, and its thumbprint: SHA-256, base64url.

        Raises:
            Refused: It is not a public key of a reasonable size for this algorithm.
        """
        if algorithm not in ALGORITHMS:
            raise Refused("algorithm", f"the token's alg is not one of {' '.join(ALGORITHMS)}")
        covered = _covered_members(jwk)
        if covered is None or not fits(jwk, algorithm) or not is_for_signatures(jwk):
            raise Refused("header", "the token's jwk is not a public key for its alg")
        found = self._parsed(algorithm, covered)
        if found is None:
            raise Refused("header", "the token's jwk is not a valid key, or too small")
        return found


def base64url_sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in base64url, without padding."""
    return base64.urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()


def _covered_members(jwk: Any) -> _Covered | None:
    """Return what the thumbprint of a key covers; None if a member is missing, too long, or not plain text."""
    kind = jwk.get("kty") if isinstance(jwk, dict) else None
    members = _MEMBERS.get(kind) if isinstance(kind, str) else None
    if members is None:
        return None
    found = tuple((name, jwk.get(name)) for name in members)
    for name, value in found:
        if not (isinstance(value, str) and len(value) <= members[name] and _PLAIN.fullmatch(value)):
            return None
    return found


def _parse(algorithm: str, covered: _Covered) -> tuple[Key, str] | None:
    """Return a key and its thumbprint, the hash of its members without white space (RFC 7638 section 3.3)."""
    members = dict(covered)
    key = new_key(algorithm, members)
    return None if key is None else (key, base64url_sha256(json.dumps(members, separators=(",", ":")).encode()))
