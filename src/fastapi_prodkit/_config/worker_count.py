"""How many workers a service has: as it was asked for, and as the server has begun them, which none tells them."""

import inspect
import multiprocessing
import os

__all__ = ["configured_workers", "is_one_of_several_workers"]

# Where a server's workers begin: the module, a variable there, and its attribute that says how many they are.
_SAYS = {
    "uvicorn._subprocess": ("config", "workers"),
    "gunicorn.arbiter": ("self", "num_workers"),
    "hypercorn.asyncio.run": ("config", "workers"),
    "granian.server.common": ("self", "workers"),
}


def configured_workers() -> int | None:
    """Return how many processes WEB_CONCURRENCY, which servers read, asks for; None if it does not."""
    asked = os.environ.get("WEB_CONCURRENCY", "")
    return int(asked) if asked.isdigit() and int(asked) else None


def is_one_of_several_workers() -> bool:
    """Say whether the server runs several workers, of which this process is one.

    Environment variables do not tell: `--workers 2` sets none. The server's own call that began this worker is still
    on the stack while the app is made, and knows. A child process of another parent is taken for one of several.
    """
    frame = inspect.currentframe()
    while frame is not None:
        variable, attribute = _SAYS.get(frame.f_globals.get("__name__", ""), ("", ""))
        number = getattr(frame.f_locals.get(variable), attribute, None)
        if isinstance(number, int):
            return number > 1
        frame = frame.f_back
    return multiprocessing.parent_process() is not None
