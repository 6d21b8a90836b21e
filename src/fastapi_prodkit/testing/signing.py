"""Make private keys, and sign tokens of any content with them."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from fastapi_prodkit import _extras
from fastapi_prodkit.sections.auth import Algorithm

__all__ = ["new_private_key", "public_jwk", "sign", "without_none"]


def new_private_key(algorithm: Algorithm) -> Any:
    """Return a new key for an algorithm.

    Raises:
        MissingExtraError: The extra `auth` is not installed.
    """
    if algorithm[:2] in ("RS", "PS"):
        rsa = _extras.require("cryptography.hazmat.primitives.asymmetric.rsa", extra="auth")
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if algorithm == "EdDSA":
        ed25519 = _extras.require("cryptography.hazmat.primitives.asymmetric.ed25519", extra="auth")
        return ed25519.Ed25519PrivateKey.generate()
    ec = _extras.require("cryptography.hazmat.primitives.asymmetric.ec", extra="auth")
    curves = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
    return ec.generate_private_key(curves[algorithm]())


def public_jwk(algorithm: Algorithm, key: Any) -> dict[str, Any]:
    """Return the public key of a private one as a JWK."""
    jwk: dict[str, Any] = _algorithm(algorithm).to_jwk(key.public_key(), as_dict=True)
    return jwk


def sign(algorithm: Algorithm, key: Any, header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
    """Return a token with exactly this header and these claims, signed with a private key."""
    signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    return b".".join((signed, _base64url(_algorithm(algorithm).sign(signed, key)))).decode()


def without_none(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members whose value is not None."""
    return {name: value for name, value in members.items() if value is not None}


def _algorithm(name: Algorithm) -> Any:
    return _extras.require("jwt", extra="auth").get_algorithm_by_name(name)


def _base64url(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")
