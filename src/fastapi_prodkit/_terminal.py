"""Detect whether a terminal shows colours."""

import os
from typing import TextIO


def coloured(stream: TextIO) -> bool:
    """Return whether output may have colours: the stream is a terminal that shows them, and NO_COLOR is not set.

    An empty NO_COLOR counts as not set (https://no-color.org).
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
