"""The request context: one mutable dict per request, which every log line carries.

A dict that is mutated survives sync dependencies, threadpools and tasks, where re-setting a ContextVar does not:
they work on a copy of the context, and the copy refers to the same dict.
"""

from contextvars import ContextVar, Token
from typing import Any

_fields: ContextVar[dict[str, Any] | None] = ContextVar("fastapi_prodkit", default=None)


def begin(fields: dict[str, Any]) -> Token[dict[str, Any] | None]:
    """Open a context of its own; give the token to `end`."""
    return _fields.set(fields)


def end(token: Token[dict[str, Any] | None]) -> None:
    """Close the context that `begin` opened."""
    _fields.reset(token)


def current() -> dict[str, Any] | None:
    """Return the fields of the current context, or None outside of any; the dict is live."""
    return _fields.get()


def bind(**fields: Any) -> None:
    """Add fields to the current context; outside of a request, to the current task's own."""
    context = _fields.get()
    if context is None:
        _fields.set(fields)
    else:
        context.update(fields)
