"""Text that clients type: trimmed, never empty, bounded, without control characters other than line breaks."""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, StringConstraints


def _without_controls(text: str) -> str:
    if any(unicodedata.category(char) == "Cc" and char != "\n" for char in text):
        raise ValueError("must not contain control characters")
    return text


Words = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), AfterValidator(_without_controls)
]
Comment = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000), AfterValidator(_without_controls)
]
