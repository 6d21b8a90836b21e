"""The keys with which tokens are verified: those of an issuer's key set (RFC 7517), and a shared secret.

A key serves one algorithm, which is chosen when the key is read and not by a token. So a public RSA key can never
become the secret of an HMAC. PyJWT does the cryptography, by the `cryptography` package.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi_prodkit import _extras
from fastapi_prodkit.auth.refusal import Refused

__all__ = ["Key", "KeySet", "fits", "is_for_signatures", "new_key", "read_keys", "secret_key"]

SMALLEST_RSA: Final = 2048  # bits; RFC 7518 section 3.3
LARGEST_RSA: Final = 8192  # bits; larger keys take milliseconds per token
MOST_KEYS: Final = 100  # of one issuer; real ones have two to ten

# Key type and curve of each algorithm; RFC 7518 sections 3.3 to 3.5, RFC 8037 section 3.1.
_KINDS: Final[Mapping[str, tuple[str, str | None]]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", None)),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_logger = logging.getLogger("fastapi_prodkit.auth")


class Key:
    """A key for one algorithm.

    Attributes:
        withdrawn: The issuer does not publish the key any more. Tokens that were verified with it become invalid.
    """

    def __init__(self, algorithm: str, material: Any, jwk: Mapping[str, Any] | None = None) -> None:
        self.jwk = jwk
        self.withdrawn = False
        self._algorithm: Any = _extras.require("jwt", extra="auth").get_algorithm_by_name(algorithm)
        self._material = self._algorithm.prepare_key(material)

    def verify(self, signed: bytes, signature: bytes) -> None:
        """Verify a signature.

        Raises:
            Refused: It is not the key's signature of these bytes.
        """
        if not self._algorithm.verify(signed, self._material, signature):
            raise Refused("signature", "the token's signature is wrong")


KeySet = Mapping[tuple[str, str], Key]  # by key id and algorithm


def secret_key(secret: str) -> Key:
    """Return the key of a shared secret.

    Raises:
        MissingExtraError: PyJWT is not installed.
    """
    return Key("HS256", secret.encode())


def read_keys(document: Any, algorithms: Sequence[str], source: str, known: KeySet) -> KeySet:
    """Return the keys of a JWK Set that can verify one of the algorithms.

    Keys that cannot be used are left out, and logged in one line: issuers publish keys for other purposes too.

    Args:
        document: The parsed JWK Set.
        algorithms: Those that are accepted.
        source: URL of the key set, for the log.
        known: Keys that were read before. Those that have not changed are kept as they are.

    Raises:
        ValueError: The document is not a JWK Set.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MOST_KEYS:
        raise ValueError(f"not a set of at most {MOST_KEYS} keys")
    found: dict[tuple[str, str], Key] = {}
    unusable = set()
    for entry in entries:
        usable = _read_key(entry, algorithms, known)
        found |= usable
        if not usable:
            unusable.add(str(entry.get("kty")) if isinstance(entry, dict) else "no object")
    if unusable:
        _logger.info("%s has keys that verify no token here: %s", source, ", ".join(sorted(unusable))[:200])
    return found


def _read_key(entry: Any, algorithms: Sequence[str], known: KeySet) -> dict[tuple[str, str], Key]:
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or not is_for_signatures(entry):
        return {}
    found: dict[tuple[str, str], Key] = {}
    for algorithm in algorithms:
        if not fits(entry, algorithm):
            continue
        place = entry["kid"], algorithm
        earlier = known.get(place)
        key = earlier if earlier is not None and earlier.jwk == entry else new_key(algorithm, entry)
        if key is not None:
            found[place] = key
    return found


def fits(entry: Mapping[str, Any], algorithm: str) -> bool:
    """Return whether a key has the type and the curve of an algorithm, and is not meant for another one."""
    return entry.get("alg", algorithm) == algorithm and (entry.get("kty"), entry.get("crv")) == _KINDS[algorithm]


def is_for_signatures(entry: Mapping[str, Any]) -> bool:
    """Return whether a public key may verify signatures; a private key that was published is worthless."""
    operations = entry.get("key_ops", ["verify"])
    return (
        entry.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
        and not _PRIVATE.intersection(entry)
    )


def new_key(algorithm: str, entry: Mapping[str, Any]) -> Key | None:
    """Return the key of a JWK that fits an algorithm; None if it is not valid, too small or too large."""
    jwt = _extras.require("jwt", extra="auth")
    try:
        material = jwt.get_algorithm_by_name(algorithm).from_jwk(dict(entry))
        if not SMALLEST_RSA <= getattr(material, "key_size", SMALLEST_RSA) <= LARGEST_RSA and entry["kty"] == "RSA":
            return None
        return Key(algorithm, material, entry)
    except Exception:  # noqa: BLE001 - whatever is wrong with a key of a foreign document, it is left out
        return None
