"""Assert that code creates no reference cycles."""

import gc
from contextlib import contextmanager


@contextmanager
def none_left():
    """Fail if the block leaves reference cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
        assert gc.collect() == 0
    finally:
        gc.enable()
