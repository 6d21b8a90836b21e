"""Read the credentials of a request from its header lines.

A token in the query or in the body is not read at all (RFC 6750 section 5.3: URLs are logged). Two `Authorization`
lines, or a token and an API key, are an error and not a choice: the next proxy might choose the other one.
"""

from collections.abc import Container, Mapping
from typing import Final, Literal, NamedTuple

from starlette.types import Scope

from fastapi_prodkit.auth.refusal import Refused

__all__ = ["Credentials", "Scheme", "bearer_line", "read_credentials"]

Scheme = Literal["bearer", "dpop", "apikey"]

_SCHEMES: Final[Mapping[bytes, Scheme]] = {b"bearer": "bearer", b"dpop": "dpop", b"apikey": "apikey"}
_NAMES: Final = frozenset({b"authorization", b"x-api-key"})
_LINES: Final[Mapping[Scheme, bytes]] = {"bearer": b"Bearer ", "dpop": b"DPoP ", "apikey": b"ApiKey "}


class Credentials(NamedTuple):
    """What a client has sent.

    Attributes:
        scheme: How it was sent.
        value: The token, or the API key.
        line: The scheme and the value, by which it is remembered: a token is not valid under another scheme, and has
            one entry however it is spelt. A token with a DPoP proof is remembered as `bound_to` a key, and by no line
            that can be sent, so it is unknown without a proof.
    """

    scheme: Scheme
    value: bytes
    line: bytes

    def bound_to(self, thumbprint: str) -> "Credentials":
        """Return the credentials as they are remembered with the key of their proof."""
        return self._replace(line=b"%b %b" % (thumbprint.encode(), self.value))


def read_credentials(scope: Scope, schemes: Container[str]) -> Credentials | None:
    """Return the credentials of a request; None if it has none of ours, such as HTTP Basic.

    Args:
        scope: Of the connection.
        schemes: Those that are read. Without `apikey`, `X-API-Key` is a header like any other.

    Raises:
        Refused: There are several.
    """
    found: Credentials | None = None
    authorized = False
    for name, value in scope["headers"]:
        if name == b"authorization":
            if authorized:
                raise Refused("several_credentials", "there are two Authorization lines")
            authorized = True
            read = _read_authorization(value)
        elif name == b"x-api-key":
            read = Credentials("apikey", value, _LINES["apikey"] + value)
        else:
            continue
        if read is not None and read.scheme in schemes:
            if found is not None:
                raise Refused("several_credentials", "there are several credentials")
            found = read
    return found


def bearer_line(scope: Scope) -> bytes | None:
    """Return the `line` of a bearer token in its usual spelling; None unless it is the only credentials.

    It takes nothing apart, and a fifth of the time of `read_credentials`, which reads what this function does not.
    """
    found: bytes | None = None
    for name, value in scope["headers"]:
        if name in _NAMES:
            if found is not None or name != b"authorization":
                return None
            found = value
    return found if found is not None and found.startswith(_LINES["bearer"]) else None


def _read_authorization(line: bytes) -> Credentials | None:
    name, _, value = line.partition(b" ")
    scheme = _SCHEMES.get(name.lower())
    if scheme is None:
        return None
    value = value.strip(b" ")
    return Credentials(scheme, value, _LINES[scheme] + value)
