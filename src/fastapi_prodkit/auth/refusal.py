"""Why a token or an API key is refused."""

from typing import Final, Literal

__all__ = ["Refused"]

# The set is closed, because the codes are values of a metric's label.
Code = Literal[
    "malformed",  # not a signed JWT, or not an API key
    "header",  # a header parameter that is never followed, or a type that is not an access token's
    "algorithm",
    "issuer",
    "unknown_key",
    "signature",
    "not_access_token",
    "audience",
    "expired",
    "not_yet_valid",
    "claims",  # a claim is missing, or has an impossible value
    "sender_constrained",  # the token is bound to a key, and there is no proof of the kind that it needs
    "not_bound",  # the token is bound to no key, and has to be
    "proof",  # the DPoP proof is missing, malformed, or one of another request, token or time
    "proof_signature",
    "proof_key",  # the proof was signed with another key than the token's
    "proof_replayed",
    "proof_nonce",
    "api_key",
    "several_credentials",
    "too_many",
]

# What a client with a token of one of our issuers does not send: only these count as guesses.
_FORGERIES: Final = frozenset(
    {"malformed", "header", "algorithm", "issuer", "signature", "api_key", "proof_signature", "proof_key"}
)


class Refused(Exception):  # noqa: N818 - an outcome of verification, which Auth turns into a response
    """The token or the API key is refused.

    Attributes:
        code: One of a closed set, for metrics.
        text: What is wrong, for the log: it has no part of the token.
    """

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text

    @property
    def is_forgery(self) -> bool:
        """Whether no issuer of ours has made the token, as far as can be told."""
        return self.code in _FORGERIES
