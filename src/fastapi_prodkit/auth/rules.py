"""Who may call a route: `public` opens it to all, `require_roles` and `require_scopes` close it to most.

    @router.get("/reports", dependencies=[Depends(require_scopes("reports:read"))])

Membership is exact: a role implies another one only if the hierarchy of `Auth` says so; see `hierarchy`. The guard
reads the rule of a route before its body is received; without a guard the dependencies enforce it themselves.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

from fastapi import Depends
from starlette.requests import HTTPConnection

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit._context import Reason
from fastapi_prodkit.auth.user import User
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError

__all__ = [
    "CurrentUser",
    "OptionalUser",
    "Requirement",
    "Rule",
    "auth_of",
    "current_user",
    "optional_user",
    "public",
    "require_roles",
    "require_scopes",
    "rule_of",
]

_Target = TypeVar("_Target")
_Kind = Literal["role", "scope"]
_Match = Literal["all", "any"]
_SCOPE: Final = re.compile(r"[ !#-\[\]-~]+")  # RFC 6749 section 3.3; the challenge of a 403 has it between quotes


def public(target: _Target) -> _Target:
    """Let everybody call an endpoint, the routes of a router, or a mounted app.

        @app.get("/prices")
        @public
        async def prices(): ...

        app.include_router(public(router))
        app.mount("/static", public(StaticFiles(directory="static")))

    The mark of a router holds wherever it is included, and for all that it includes and mounts. A route that depends on
    `CurrentUser`, a role or a scope needs a caller all the same; one with `OptionalUser` knows its caller if there is
    one.

    Returns:
        The target, which is marked.

    Raises:
        ConfigurationError: The target cannot be marked, such as a method of an object.
    """
    try:
        setattr(target, _scope.PUBLIC, True)
    except (AttributeError, TypeError):
        raise ConfigurationError(f"public cannot mark {target!r}: mark the function, or the route") from None
    return target


async def optional_user(connection: HTTPConnection) -> User | None:
    """Return the caller of the request; None if it has no credentials.

    Raises:
        ProblemError: 401 if the request has wrong credentials.
        ConfigurationError: The app has no authentication.
    """
    auth, scope = auth_of(connection), connection.scope
    authenticated_by, user = scope.get(_scope.USER, (None, None))
    if authenticated_by is not auth:  # in an app without a guard, or with one of another Auth
        user = await auth.authenticate(connection)
    found: User | None = user
    return found


async def current_user(connection: HTTPConnection) -> User:
    """Return the caller of the request.

    Raises:
        ProblemError: 401 if the request has no credentials, or wrong ones.
        ConfigurationError: The app has no authentication.
    """
    user = await optional_user(connection)
    if user is None:
        raise auth_of(connection).unauthenticated()
    return user


def auth_of(connection: HTTPConnection) -> Any:
    """Return the `Auth` that authenticates the callers of an app.

    Raises:
        ConfigurationError: There is none.
    """
    scope = connection.scope
    pieces = _scope.installed(scope) or {}
    auth = getattr(connection.app.state, "auth", None) or scope.get(_scope.AUTH) or pieces.get("auth")
    if auth is None:
        raise ConfigurationError(
            "the app has no authentication: set AUTH_ISSUER, AUTH_SECRET or AUTH_API_KEYS, or app.state.auth"
        )
    return auth


CurrentUser = Annotated[User, Depends(current_user)]
"""The type of a parameter that is the caller. For a class of your own: `Annotated[Employee, Depends(current_user)]`."""

OptionalUser = Annotated[User | None, Depends(optional_user)]
"""The type of a parameter that is the caller, or None: for `public` routes that know their caller if there is one."""


class Requirement:
    """Roles or scopes that the caller must have; made by `require_roles` and `require_scopes`.

    Attributes:
        kind: What the names are.
        names: What the caller must have.
        match: Whether all of them, or any.
    """

    statuses = (401, 403)  # in the OpenAPI schema of routes that depend on it

    def __init__(self, kind: _Kind, names: Iterable[str], match: _Match) -> None:
        self.kind = kind
        self.names = frozenset(names)
        self.match = match
        if match not in ("all", "any"):
            raise ConfigurationError(f"require_{kind}s: match is {match!r}; use 'all' or 'any'")
        if not self.names or "" in self.names:
            raise ConfigurationError(f"require_{kind}s: name at least one {kind}")
        wrong = [name for name in self.names if kind == "scope" and not _SCOPE.fullmatch(name)]
        if wrong:
            raise ConfigurationError(f"require_scopes: {wrong[0]!r} cannot be a scope (RFC 6749 section 3.3)")

    def __str__(self) -> str:
        """Return what is required, such as `roles admin or editor`."""
        joined = " and " if self.match == "all" else " or "
        return f"{self.kind}{'s' if len(self.names) > 1 else ''} {joined.join(sorted(self.names))}"

    async def __call__(self, connection: HTTPConnection) -> User:
        """Return the caller, who has what is required.

        Raises:
            ProblemError: 401 without a caller; 403 if the caller does not have it.
        """
        user = await current_user(connection)
        self.check(user)
        return user

    def check(self, user: User) -> None:
        """Refuse a caller who does not have what is required.

        Raises:
            ProblemError: 403; for scopes with the challenge of RFC 6750 section 3.1.
        """
        owned = user.roles if self.kind == "role" else user.scopes
        if self.names <= owned if self.match == "all" else not self.names.isdisjoint(owned):
            return
        wanted = " ".join(sorted(self.names))
        _context.refuse(Reason("forbidden", f"the caller does not have the {self}"))
        headers = {}
        if self.kind == "scope":
            headers["WWW-Authenticate"] = f'Bearer error="insufficient_scope", scope="{wanted}"'
        raise ProblemError(403, "You are not allowed to do this.", headers=headers)


def require_roles(*roles: str, match: _Match = "all") -> Requirement:
    """Require roles of the caller: `Depends(require_roles("editor", "admin", match="any"))`.

    Args:
        roles: Exactly as the issuer writes them.
        match: Whether the caller must have all of them, or any.

    Raises:
        ConfigurationError: There is no role.
    """
    return Requirement("role", roles, match)


def require_scopes(*scopes: str, match: _Match = "all") -> Requirement:
    """Require scopes of the token or API key: `Depends(require_scopes("reports:write"))`.

    Args:
        scopes: Exactly as the issuer writes them.
        match: Whether the token must have all of them, or any.

    Raises:
        ConfigurationError: There is no scope, or one has a quote, or another character that no scope may have.
    """
    return Requirement("scope", scopes, match)


class Rule(NamedTuple):
    """Who may call a route.

    Attributes:
        public: `public` has opened it, and it needs no caller.
        required: All that the caller must have.
        caller: "required"; "optional": served without one, but not with wrong credentials; or "ignored".
    """

    public: bool
    required: tuple[Requirement, ...]
    caller: Literal["required", "optional", "ignored"] = "required"


def rule_of(route: Any, routers: Iterable[Any], default: Literal["required", "optional"] = "required") -> Rule:
    """Return the rule of a route.

    Args:
        route: The route, or FastAPI's context of it.
        routers: The routers on the way to it.
        default: Whether a route without a rule of its own needs a caller.
    """
    dependencies = list(walk_dependencies(getattr(route, "dependant", None)))
    required = tuple(each for each in dependencies if isinstance(each, Requirement))
    if required or any(each is current_user for each in dependencies):
        return Rule(False, required, "required")
    marked = (route, getattr(route, "endpoint", None), getattr(route, "app", None), *routers)
    if any(map(_is_marked, marked)):
        return Rule(True, (), "optional" if any(each is optional_user for each in dependencies) else "ignored")
    return Rule(False, (), default)


def _is_marked(target: Any) -> bool:
    """Return whether `public` has marked an object itself, not its class; a proxy may have any attribute."""
    return getattr(target, "__dict__", {}).get(_scope.PUBLIC) is True
