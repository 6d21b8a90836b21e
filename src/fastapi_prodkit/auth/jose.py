"""Parse a JSON Web Token strictly, before any cryptography.

If two parsers read one token differently, an attacker can have one claim signed and another one believed. So exactly
one form is accepted: three parts (RFC 7515 section 3.1; an encrypted token has five), base64url without padding or
surplus bits, and JSON objects in UTF-8 without duplicate members at any depth. Header parameters that name a key, a
certificate or an extension are refused, not ignored (RFC 8725 section 3.10).
"""

import base64
import hmac
import json
import math
import re
from typing import Any, Final, NamedTuple, NoReturn

from fastapi_prodkit.auth.refusal import Refused

__all__ = ["LONGEST_TOKEN", "Token", "is_text", "parse"]

LONGEST_TOKEN: Final = 8192  # bytes; servers limit a whole header line to about as much
LONGEST_KEY_ID: Final = 256  # characters
_PARTS: Final = 3  # of a signed token: header, payload, signature

# Where the key is (RFC 7515 section 4.1), what must be understood (crit, b64), and what is inside (RFC 7516, nested).
_NEVER_FOLLOWED: Final = ("jku", "jwk", "x5u", "x5c", "crit", "b64", "enc", "zip", "cty")

_BASE64URL: Final = re.compile(rb"[A-Za-z0-9_-]+")


class Token(NamedTuple):
    """The parts of a token, none of which is verified.

    Attributes:
        algorithm: The header's `alg`.
        key_id: The header's `kid`, if it has one.
        type: The header's `typ` in lower case, without `application/`; empty if it has none.
        claims: The payload.
        signed: The bytes that are signed.
        signature: The signature.
        jwk: The header's `jwk`; only of a DPoP proof, which names its key itself.
    """

    algorithm: str
    key_id: str | None
    type: str
    claims: dict[str, Any]
    signed: bytes
    signature: bytes
    jwk: Any = None


def parse(token: bytes, *, with_jwk: bool = False) -> Token:
    """Return the parts of a token.

    Args:
        token: What was sent.
        with_jwk: It is a DPoP proof, whose header may have a `jwk`.

    Raises:
        Refused: It is not a signed token, or its header has a parameter that is never followed.
    """
    if len(token) > LONGEST_TOKEN:
        raise Refused("malformed", f"the token has more than {LONGEST_TOKEN} bytes")
    parts = token.split(b".")
    if len(parts) != _PARTS:
        raise Refused("malformed", "the token does not have three parts")
    header, claims, signature = map(_decode, parts)
    parameters = _load(header)
    jwk = parameters.pop("jwk", None) if with_jwk else None
    algorithm, key_id, kind = _read_header(parameters)
    return Token(algorithm, key_id, kind, _load(claims), token[: token.rindex(b".")], signature, jwk)


def is_text(claim: Any, expected: str) -> bool:
    """Return whether a claim is this text of ASCII characters, in a time that does not depend on how much is right."""
    return isinstance(claim, str) and claim.isascii() and hmac.compare_digest(claim, expected)


def _read_header(header: dict[str, Any]) -> tuple[str, str | None, str]:
    for name in _NEVER_FOLLOWED:
        if name in header:
            raise Refused("header", f"the token's header has {name}")
    algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ", "")
    if not isinstance(algorithm, str):
        raise Refused("malformed", "the token's header has no alg")
    if not (key_id is None or (isinstance(key_id, str) and len(key_id) <= LONGEST_KEY_ID)):
        raise Refused("malformed", f"the token's kid is not text of at most {LONGEST_KEY_ID} characters")
    if not isinstance(kind, str):
        raise Refused("malformed", "the token's typ is not text")
    return algorithm, key_id, kind.lower().removeprefix("application/")


def _decode(part: bytes) -> bytes:
    if not _BASE64URL.fullmatch(part) or len(part) % 4 == 1:
        raise Refused("malformed", "the token is not base64url")
    decoded = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != part:  # the unused bits of the last character are not 0
        raise Refused("malformed", "the token is not base64url")
    return decoded


def _load(text: bytes) -> dict[str, Any]:
    try:
        found = _JSON.decode(str(text, "utf-8"))
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        found = None
    if not isinstance(found, dict):
        raise Refused("malformed", "the token's header or payload is not a JSON object, or repeats a member")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate member")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("too large")
    return number


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_not_json)
