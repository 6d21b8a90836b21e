"""What is over is gone, and does not wait for the garbage collector."""

import gc
from contextlib import contextmanager


@contextmanager
def none_left():
    """What is done in here leaves no cycle of references."""
    gc.collect()
    gc.disable()
    try:
        yield
        assert gc.collect() == 0
    finally:
        gc.enable()
