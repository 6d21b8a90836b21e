"""What a terminal is shown beside the result: what takes so long."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Final

import typer

__all__ = ["show_progress"]

_SOON: Final = 1.0  # seconds after which it is said what takes so long


@contextmanager
def show_progress(what: str) -> Iterator[None]:
    """Say on standard error what is going on, if it takes longer than a second."""
    timer = Timer(_SOON, typer.echo, [f"{what} ..."], {"err": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
