"""Packages with known vulnerabilities, as of the date below. Add to it by hand; `pip-audit` knows all there are."""

import re
from dataclasses import dataclass
from datetime import date
from typing import Final

__all__ = ["ADVISORIES", "AS_OF", "UNFIXED", "Advisory", "is_older"]

AS_OF: Final = date(2026, 11, 24)


@dataclass(frozen=True)
class Advisory:
    """What is wrong with the versions below one.

    Attributes:
        package: Its normalized name.
        fixed: The first version without it.
        ids: Under which it is known.
        effect: What an attacker gains.
    """

    package: str
    fixed: str
    ids: tuple[str, ...]
    effect: str


ADVISORIES: Final = (
    Advisory("starlette", "1.0.1", ("CVE-2026-48710",), "a Host header changes the path that checks see"),
    Advisory(
        "starlette",
        "1.3.1",
        ("GHSA-82w8-qh3p-5jfq", "GHSA-jp82-jpqv-5vv3"),
        "limits of forms are ignored, and a path changes the host that the app sees",
    ),
    Advisory("python-multipart", "0.0.27", ("CVE-2026-42561",), "part headers without end occupy the process"),
    Advisory(
        "python-multipart",
        "0.0.31",
        ("CVE-2026-53538", "CVE-2026-53539", "CVE-2026-53540"),
        "a form occupies the process or its memory, and a semicolon smuggles parameters",
    ),
    Advisory("pyjwt", "2.12.0", ("CVE-2026-32597",), "tokens with critical headers that nobody knows are accepted"),
    Advisory("pyjwt", "2.13.0", ("CVE-2026-48526", "CVE-2026-48523"), "forged tokens are accepted"),
    Advisory("h11", "0.16.0", ("CVE-2025-43859",), "a malformed chunked body smuggles a request past the proxy"),
    Advisory("gunicorn", "23.0.0", ("CVE-2024-1135", "CVE-2024-6827"), "a Transfer-Encoding smuggles a request"),
    Advisory("orjson", "3.11.6", ("CVE-2025-67221",), "deeply nested JSON ends the process"),
    Advisory("jinja2", "3.1.6", ("CVE-2025-27516",), "a template leaves the sandbox"),
)

# Packages that no version of is free of it, and what to take instead.
UNFIXED: Final = {
    "python-jose": (
        "lets a public key serve as a shared secret (CVE-2024-33663 up to 3.3.0; the fix leaves DER keys out)",
        "verify tokens with PyJWT or joserfc",
    ),
    "ecdsa": (
        "leaks private keys through its timing (CVE-2024-23342), and its authors will not change that",
        "sign with cryptography; python-jose brings ecdsa along",
    ),
}


def is_older(version: str, than: str) -> bool:
    """Say whether a version comes before another; a pre-release counts as its release."""
    return _release(version) < _release(than)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else [0]
    while numbers[1:] and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
