"""A client's key for tests of DPoP: proofs, and tokens that are bound to it."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

from fastapi_prodkit.auth.proof_keys import ProofKeys, base64url_sha256
from fastapi_prodkit.sections.auth import Algorithm
from fastapi_prodkit.testing.signing import new_private_key, public_jwk, sign, without_none

__all__ = ["DPoPKey"]


class DPoPKey:
    """A key of a client, to which tokens are bound (RFC 9449).

        key = DPoPKey()
        token = issuer.token("alice", bound_to=key)
        client.get("/me", headers=key.headers("GET", "http://testserver/me", token))

    Args:
        algorithm: With which proofs are signed.

    Attributes:
        jwk: The public key.
        private_key: The private key, of the package `cryptography`.
        thumbprint: The `cnf.jkt` of tokens that are bound to it.

    Raises:
        MissingExtraError: The extra `auth` is not installed.
    """

    def __init__(self, algorithm: Algorithm = "ES256") -> None:
        self.algorithm: Algorithm = algorithm
        self.private_key = new_private_key(algorithm)
        self.jwk = public_jwk(algorithm, self.private_key)
        _, self.thumbprint = ProofKeys().read(algorithm, self.jwk)

    def headers(self, method: str, url: str, token: str, **claims: Any) -> dict[str, str]:
        """Return the headers of one request; the arguments are those of `proof`."""
        return {"Authorization": f"DPoP {token}", "DPoP": self.proof(method, url, token, **claims)}

    def proof(
        self, method: str, url: str, token: str, *, headers: Mapping[str, Any] | None = None, **claims: Any
    ) -> str:
        """Return a proof, which is accepted for one request.

        Args:
            method: Of the request.
            url: Of the request; a query does not count.
            token: The access token.
            headers: Further header parameters; None leaves one out.
            claims: Further claims, such as `nonce`; None leaves one out.
        """
        header = {"typ": "dpop+jwt", "alg": self.algorithm, "jwk": self.jwk, **(headers or {})}
        members = {
            "htm": method,
            "htu": url,
            "iat": int(time.time()),
            "jti": secrets.token_urlsafe(),
            "ath": base64url_sha256(token.encode()),
        }
        return sign(self.algorithm, self.private_key, without_none(header), without_none(members | claims))
