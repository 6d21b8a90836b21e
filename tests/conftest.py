"""What every test leaves as it was."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _logging_stays():
    """`create_app` configures the logging of the whole process; the next test starts with pytest's own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
