"""Where an endpoint is defined."""

import inspect
import os
from typing import Any

__all__ = ["source_of"]


def source_of(endpoint: Any) -> str:
    """Return file and line of an endpoint, such as `service/reports.py:12`, with the file below the current directory.

    For an endpoint of another place it is the module; for an object, the module of its class; empty without one.
    """
    if endpoint is None:
        return ""
    while hasattr(endpoint, "func"):  # functools.partial
        endpoint = endpoint.func
    endpoint = inspect.unwrap(endpoint)
    code = getattr(endpoint, "__code__", None)
    if code is not None:
        here = f"{os.getcwd()}{os.sep}"  # noqa: PTH109 - a Path of each route takes longer than all else
        below = code.co_filename.removeprefix(here)
        if below != code.co_filename and "site-packages" not in below:
            return f"{below.replace(os.sep, '/')}:{code.co_firstlineno}"
    module: str = endpoint.__module__  # of the class, for an object
    return module
