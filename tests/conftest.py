"""Restore process-wide state after each test, and let coverage measure threads and greenlets together."""

import gc
import logging
import os
import re
import sys
import threading
import weakref

import pytest


class _WeakCache(weakref.WeakKeyDictionary):
    """A dictionary that runs no Python code when a key is garbage collected."""

    def __init__(self, *items):
        super().__init__(*items)
        self._remove = self.data.pop


# Coverage has such a dictionary of greenlets for each thread. Greenlet destroys those of a thread that has ended in a
# "pending call", and in one of these CPython 3.11 never gets beyond the first line of traced code while another is due.
if sys.version_info < (3, 12) and "coverage" in sys.modules:
    weakref.WeakKeyDictionary = _WeakCache


# Tests of the example, which users copy without our markers.
_SYSTEM_TESTS_OF_EXAMPLES = re.compile(
    r"test_service_(airports|demo|migrations|nearest|postgresql|reports)\.py|\[postgresql"
)


_IS_SYSTEM_AS_A_WHOLE = re.compile(r"^pytestmark = .*pytest\.mark\.system\b", re.MULTILINE)


def pytest_sessionstart():
    """Collect no garbage while tests are collected: a million objects come, and none goes."""
    gc.disable()


def pytest_ignore_collect(collection_path, config):
    """Do not import modules without a test for the selected markers: some take seconds to import."""
    if collection_path.suffix != ".py" or "system" not in config.option.markexpr:
        return None
    source = collection_path.read_text()
    if config.option.markexpr == "not system":
        return _IS_SYSTEM_AS_A_WHOLE.search(source) is not None or None
    return "pytest.mark.system" not in source or None


def pytest_collection_modifyitems(items):
    """Mark the tests of the examples, and run the longest tests first: at the end they would run alone."""
    for item in items:
        if "examples" in item.path.parts:
            item.add_marker("example")
            if _SYSTEM_TESTS_OF_EXAMPLES.search(item.nodeid):
                item.add_marker("system")
            if item.path.name == "test_service_demo.py":
                item.add_marker("long")
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """Freeze the objects that collection has created, so that garbage collections skip them."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_greenlets():
    """Fail a test that switches greenlets while coverage measures only threads: its line counts would be wrong."""
    if os.environ.get("COVERAGE_CONCURRENCY") != "thread":
        yield
        return
    import greenlet

    switches = []
    earlier = greenlet.settrace(lambda *_: switches.append(1))
    yield
    greenlet.settrace(earlier)
    assert not switches, "list the file in IN_GREENLETS, in the Makefile"


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server for one module, whose tests may stop, fill and reconfigure it."""
    from postgres import postgres_or_skip

    with postgres_or_skip() as running:
        yield running


def _logging_stays():
    """Restore logging and hooks after a test, because `create_app` configures the whole process.

    pytest's own hooks turn an unclosed resource into a failure of the test; ours would only log it.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)


_in_each_test = pytest.fixture(_logging_stays, autouse=True)
_in_each_module = pytest.fixture(_logging_stays, scope="module", autouse=True)
