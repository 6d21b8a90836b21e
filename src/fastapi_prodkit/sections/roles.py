"""The notation of a role hierarchy: `admin>editor>viewer` says that an admin is an editor, and an editor a viewer."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["implied_roles"]


def implied_roles(hierarchy: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """Return all roles that a role implies, directly or not, for each role that implies others.

    Args:
        hierarchy: Chains of roles, such as `admin>editor>viewer`; spaces around a role are ignored.

    Raises:
        ConfigurationError: A chain has fewer than two roles, or an empty one; or a role implies itself.
    """
    direct: dict[str, set[str]] = {}
    for chain in hierarchy:
        roles = [role.strip() for role in chain.split(">")]
        if len(roles) == 1 or not all(roles):
            raise ConfigurationError("role hierarchy: must be roles with > between them, such as admin>editor>viewer")
        for role, implied in pairwise(roles):
            direct.setdefault(role, set()).add(implied)
    return {role: _all_below(role, direct) for role in direct}


def _all_below(role: str, direct: Mapping[str, set[str]]) -> frozenset[str]:
    found: set[str] = set()
    pending = [role]
    while pending:
        new = direct.get(pending.pop(), set()) - found
        found |= new
        pending += new
    if role in found:
        raise ConfigurationError(f"role hierarchy: the role {role} implies itself; remove one of the chains")
    return frozenset(found)
