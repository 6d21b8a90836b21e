"""Whether a URL is that of a request, as RFC 9449 section 4.3 compares the `htu` of a DPoP proof.

Query and fragment do not count. Both URLs are normalised (RFC 3986 sections 6.2.2 and 6.2.3): lower case of scheme and
host, no default port, no needless percent-encoding. Dot segments are removed from the `htu` only: clients remove them
before they send a request, and the router of the app does not. So a request with a dot segment has no valid proof.
"""

import re
from typing import Final
from urllib.parse import quote

from starlette.types import Scope

__all__ = ["is_url_of", "requested_url"]

_URL: Final = re.compile(
    r"(https?)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::([0-9]{0,5}))?(/[!-~]*)?", re.IGNORECASE | re.ASCII
)
_ENCODED: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED: Final = re.compile(r"[A-Za-z0-9._~-]")
_PATH_CHARACTERS: Final = "/:@!$&'()*+,;="  # RFC 3986 section 3.3, beside the unreserved ones
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_HANDSHAKES: Final = {"ws": "http", "wss": "https"}  # RFC 6455 section 4.1: a handshake is a request


def is_url_of(scope: Scope, url: str) -> bool:
    """Return whether a URL is that of the request, as its client sees it: with the scheme and the prefix of the proxy.

    Args:
        scope: The request, with one Host header.
        url: What the client says that it has requested.
    """
    requested = requested_url(scope)
    normalized = requested and _normalized(requested)
    return normalized is not None and _normalized(re.split("[?#]", url, maxsplit=1)[0], resolve=True) == normalized


def requested_url(scope: Scope) -> str | None:
    """Return the URL of a request as its client sees it, not normalised; None if it has not exactly one Host header.

    A host with a slash is none: it would move a part of the path, such as that of another service, into the host.
    """
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or b"/" in hosts[0]:
        return None
    scheme = scope.get("scheme", "http")
    return f"{_HANDSHAKES.get(scheme, scheme)}://{hosts[0].decode('latin-1')}{_requested_path(scope)}"


def _requested_path(scope: Scope) -> str:
    """Return the path as the client has sent it, in front of which a proxy may have removed the root path."""
    raw: bytes | None = scope.get("raw_path")
    # Some servers leave the query in.
    path = quote(scope["path"], _PATH_CHARACTERS) if raw is None else raw.partition(b"?")[0].decode("latin-1")
    root = quote(scope.get("app_root_path", scope.get("root_path", "")).rstrip("/"), _PATH_CHARACTERS)
    return path if path == root or path.startswith(f"{root}/") else root + path


def _normalized(url: str, *, resolve: bool = False) -> str | None:
    """Return a URL in the one form in which equal URLs are equal; None if it is not an absolute one of HTTP."""
    match = _URL.fullmatch(url)
    if match is None:
        return None
    scheme, host, port, path = match[1].lower(), match[2].lower(), match[3], _ENCODED.sub(_decoded, match[4] or "/")
    place = f":{int(port)}" if port and int(port) != _DEFAULT_PORTS[scheme] else ""
    return f"{scheme}://{host}{place}{_without_dot_segments(path) if resolve else path}"


def _decoded(encoded: re.Match[str]) -> str:
    """Return the character of a percent-encoding that is not needed; of any other one, its upper case."""
    character = chr(int(encoded[0][1:], 16))
    return character if _UNRESERVED.fullmatch(character) else encoded[0].upper()


def _without_dot_segments(path: str) -> str:
    """Return a path without `.` and `..` (RFC 3986 section 5.2.4)."""
    segments = path.split("/")[1:]
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return f"/{'/'.join(kept)}"
