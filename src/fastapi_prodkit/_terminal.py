"""What a terminal can show."""

import os
from typing import TextIO


def coloured(stream: TextIO) -> bool:
    """Say whether what is written there may have colours: on a terminal that knows them, unless NO_COLOR is set.

    An empty NO_COLOR says nothing (https://no-color.org).
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
