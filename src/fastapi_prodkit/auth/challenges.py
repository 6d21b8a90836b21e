"""The WWW-Authenticate header of a refusal: how to authenticate, and what was wrong (RFC 6750 and 9449)."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from fastapi_prodkit.auth.credentials import Scheme
from fastapi_prodkit.auth.proof_keys import ALGORITHMS
from fastapi_prodkit.auth.refusal import Code

__all__ = ["Answer", "Challenges", "answer_to"]

_ALGORITHMS: Final = f'algs="{" ".join(ALGORITHMS)}"'
_OFFERS: Final[Mapping[Scheme, str]] = {"bearer": "Bearer", "dpop": f"DPoP {_ALGORITHMS}", "apikey": "ApiKey"}


class Answer(NamedTuple):
    """What a client is told about a refusal.

    Attributes:
        status: The status code.
        error: The error code, of RFC 6750 section 3.1 or RFC 9449 sections 7.1 and 9.
        detail: What to do, or what is wrong as far as it is known to whoever has sent it.
    """

    status: int
    error: str
    detail: str


_OTHER: Final = Answer(401, "invalid_token", "The token or key is not valid.")
_ANSWERS: Final[Mapping[Code, Answer]] = {
    "several_credentials": Answer(400, "invalid_request", "Send one token or one key, in one header line."),
    "expired": Answer(401, "invalid_token", "The token or key has expired."),
    "not_bound": Answer(401, "invalid_token", "The token has to be bound to a key."),
    "proof": Answer(401, "invalid_dpop_proof", "The DPoP proof is not valid."),
    "proof_signature": Answer(401, "invalid_dpop_proof", "The DPoP proof is not valid."),
    "proof_replayed": Answer(401, "invalid_dpop_proof", "The DPoP proof was used before."),
    "proof_nonce": Answer(401, "use_dpop_nonce", "The DPoP proof needs the nonce in DPoP-Nonce."),
}


def answer_to(code: Code) -> Answer:
    """Return what a client is told about a refusal with this code."""
    return _ANSWERS.get(code, _OTHER)


class Challenges:
    """The challenges of one `Auth`.

    Args:
        schemes: Those with which a client may authenticate.

    Attributes:
        offered: The value of the header for a request without credentials.
    """

    def __init__(self, schemes: Sequence[Scheme]) -> None:
        self._schemes = schemes
        self.offered = ", ".join(_OFFERS[scheme] for scheme in schemes)

    def refusing(self, scheme: Scheme, answer: Answer) -> str:
        """Return the value of the header for credentials that are refused.

        Args:
            scheme: With which they were sent; a bearer token that has to have a proof is asked for one.
            answer: Why.
        """
        if scheme == "apikey":
            return _OFFERS[scheme]
        error = f'error="{answer.error}", error_description="{answer.detail}"'
        if scheme == "dpop" or "bearer" not in self._schemes:
            return f"DPoP {error}, {_ALGORITHMS}"
        return f"Bearer {error}, {_OFFERS['dpop']}" if "dpop" in self._schemes else f"Bearer {error}"
