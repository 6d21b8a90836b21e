"""Show progress on a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Final

import typer

__all__ = ["show_progress"]

_SHOW_AFTER: Final = 1.0  # seconds


@contextmanager
def show_progress(what: str) -> Iterator[None]:
    """Print `what` to standard error if the block takes longer than a second."""
    timer = Timer(_SHOW_AFTER, typer.echo, [f"{what} ..."], {"err": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
