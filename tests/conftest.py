"""What every test leaves as it was, and what lets coverage measure threads and greenlets together."""

import gc
import logging
import sys
import threading
import weakref

import pytest


class _ForgetsInC(weakref.WeakKeyDictionary):
    """A dictionary that runs no Python code when a key is gone."""

    def __init__(self, *items):
        super().__init__(*items)
        self._remove = self.data.pop


# Coverage has such a dictionary of greenlets for each thread. Greenlet destroys those of a thread that has ended in a
# "pending call", and in one of these CPython 3.11 never gets beyond the first line of traced code while another is due.
if sys.version_info < (3, 12) and "coverage" in sys.modules:
    weakref.WeakKeyDictionary = _ForgetsInC


def pytest_ignore_collect(collection_path, config):
    """Under `-m "not system"` do not even import modules that are marked as a whole: some load for seconds."""
    if config.option.markexpr == "not system" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.system\n" in collection_path.read_text() or None
    return None


def pytest_collection_finish():
    """Freeze the objects that collection has made, so that garbage collections skip them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_stays():
    """`create_app` configures the logging of the whole process; the next test starts with pytest's own.

    With pytest's own hooks a resource that nobody closed fails a test, instead of being a line in the log of one.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)
