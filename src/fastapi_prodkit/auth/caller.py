"""Note who calls, once it is known: for dependencies, in the log lines of the request, and on its span."""

from typing import Any, Final

from starlette.types import Scope

from fastapi_prodkit import _context, _scope
from fastapi_prodkit.auth.user import User

__all__ = ["note_caller"]

_USER_ID: Final = "user.id"  # OpenTelemetry semantic conventions, registry of attributes; there is none for the kind
_TELEMETRY: Final = "fastapi.telemetry"  # private: the scope key of FastAPI's own telemetry


def note_caller(scope: Scope, auth: Any, user: User) -> None:
    """Note the caller of a request. The server span of FastAPI's own telemetry gets its id, if there is a span.

    Args:
        scope: Of the request.
        auth: The `Auth` that has authenticated the caller; another one asks again.
        user: The caller.
    """
    scope[_scope.USER] = auth, user
    _context.bind(user_id=user.id)
    span = getattr(scope.get(_TELEMETRY), "span", None)
    if span is not None:
        span.set_attribute(_USER_ID, user.id)
