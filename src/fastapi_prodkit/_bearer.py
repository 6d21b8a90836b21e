"""Bearer tokens that open what operators read: RFC 6750, one token from the settings."""

import hmac

from pydantic import SecretStr

from fastapi_prodkit.exceptions import ProblemError


def presents(authorization: str | None, token: SecretStr | None) -> bool:
    """Say whether the header carries the token; without a token in the settings nothing does."""
    if authorization is None or token is None:
        return False
    scheme, _, presented = authorization.partition(" ")
    # Starlette reads headers as Latin-1; this is what was sent.
    same = hmac.compare_digest(presented.encode("latin-1").strip(), token.get_secret_value().encode())
    return scheme.lower() == "bearer" and same


def authorize(authorization: str | None, token: SecretStr | None) -> None:
    """Raise a 401 unless the header carries the token; RFC 6750 section 3 for what the refusal says."""
    if not presents(authorization, token):
        error = "" if authorization is None else ' error="invalid_token"'
        raise ProblemError(401, headers={"WWW-Authenticate": f"Bearer{error}"})
