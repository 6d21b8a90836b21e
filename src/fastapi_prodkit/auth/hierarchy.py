"""Roles that imply others: a user has the roles of the token or API key, and all that these imply.

A user is made once for each token, so the roles of a known caller cost nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

from fastapi_prodkit.auth.claims import UserT
from fastapi_prodkit.sections.roles import implied_roles

__all__ = ["with_implied_roles"]


def with_implied_roles(user: type[UserT], hierarchy: Iterable[str]) -> Callable[..., UserT]:
    """Return what makes a user: the class itself without a hierarchy, else a function that adds roles.

    Raises:
        ConfigurationError: The hierarchy cannot be read, or has a cycle.
    """
    implied = implied_roles(hierarchy)
    if not implied:
        return user

    def make(*, roles: frozenset[str], **fields: Any) -> UserT:
        return user(roles=roles.union(*(implied.get(role, ()) for role in roles)), **fields)

    return make
