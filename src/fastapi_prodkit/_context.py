"""The request context: one mutable dict per request, which every log line carries.

A dict that is mutated survives sync dependencies, threadpools and tasks, where re-setting a ContextVar does not:
they work on a copy of the context, and the copy refers to the same dict.
"""

import logging
from contextvars import ContextVar
from typing import Any, Final

from fastapi_prodkit import _scope

NO_REQUEST: Final = "-"  # in place of the id, on records outside of any request, for formats other than ours

_fields: ContextVar[dict[str, Any] | None] = ContextVar("fastapi_prodkit", default=None)


begin = _fields.set  # opens a context of its own with these fields; returns a token
end = _fields.reset  # closes the context of the token
current = _fields.get  # returns the fields, live, or None outside of any context


def request_id() -> str | None:
    """Return the id of the request that is being served, or None outside of any."""
    return (_fields.get() or {}).get("request_id")


def bind(**fields: Any) -> None:
    """Add fields to the current context; outside of a request, to the current task's own."""
    context = _fields.get()
    if context is None:
        _fields.set(fields)
    else:
        context.update(fields)


def keep(error: BaseException, context: dict[str, Any]) -> None:
    """Keep a request's context for the record of its exception, which the server writes after the context is closed."""
    vars(error)[_scope.EXCEPTION_CONTEXT] = context  # not setattr, which an exception's class may refuse


def of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the current context; outside of any, that of the request from which the record's exception came."""
    context = _fields.get()
    if context is None and isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        context = vars(record.exc_info[1]).get(_scope.EXCEPTION_CONTEXT)
    return context or {}
