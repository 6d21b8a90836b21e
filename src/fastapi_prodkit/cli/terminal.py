"""What a command shows on a terminal while it loads an app."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import Final

import typer

__all__ = ["quiet", "show_progress"]

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


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the app logs in the block, and write what it prints to standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)
