"""What a terminal is shown beside the result: colours, and what takes so long."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Final, TextIO

import typer

__all__ = ["coloured", "patience"]

_SOON: Final = 1.0  # seconds after which it is said what takes so long


def coloured(stream: TextIO) -> bool:
    """Say whether what is written there may have colours: on a terminal that knows them, unless NO_COLOR is set.

    An empty NO_COLOR says nothing (https://no-color.org).
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on standard error what is going on, if it takes longer than a second."""
    timer = Timer(_SOON, typer.echo, [f"{what} ..."], {"err": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
