"""Note who calls, once it is known: for dependencies, and in the log lines of the request."""

from typing import Any

from starlette.types import Scope

from fastapi_prodkit import _context, _scope
from fastapi_prodkit.auth.user import User

__all__ = ["note_caller"]


def note_caller(scope: Scope, auth: Any, user: User) -> None:
    """Note the caller of a request.

    Args:
        scope: Of the request.
        auth: The `Auth` that has authenticated the caller; another one asks again.
        user: The caller.
    """
    scope[_scope.USER] = auth, user
    _context.bind(user_id=user.id)
