"""Who may call a route: what the guards on the way to it decide, and what it demands itself."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from fastapi import FastAPI

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.rules import Rule, current_user, optional_user, rule_of

__all__ = ["Guards", "rule_text"]

_Caller = Literal["ignored", "optional", "required"]
_STRICTNESS: Final[tuple[_Caller, ...]] = ("ignored", "optional", "required")


@dataclass(frozen=True)
class Guards:
    """The guards on the way to the routes of a router.

    Attributes:
        auth: That of the guard that decides about these routes; None if there is no guard.
        further_out: A guard further out decides about some route on the way to them.
        caller: Whether a guard further out demands a caller.
    """

    auth: Auth[Any] | None = None
    further_out: bool = False
    caller: _Caller = "ignored"

    def at(self, router: Any) -> "Guards":
        """Return the same guards, and that of a router if it has one."""
        guard = vars(router).get(_scope.ROUTER_GUARD)
        return self if guard is None else replace(self, auth=guard.auth)

    def decide(self, route: Any, routers: Iterable[Any], *, found: bool) -> Rule:
        """Return the rule of a route, as `Guard` decides.

        Args:
            route: What is asked whether it matches.
            routers: The routers that are included on the way to it.
            found: Whether the index of routes finds it; only the router finds what comes after an unknown route.
        """
        if self.auth is None:
            return rule_of(route, routers)._replace(caller="ignored")
        rule = rule_of(route, routers, self.auth.default)
        return rule if found else Rule(public=False, required=rule.required, caller=self.auth.default)

    def inside(self, mount: Any, routers: Iterable[Any], rule: Rule, *, found: bool) -> "Guards":
        """Return the guards on the way to the routes of a mounted app.

        Args:
            mount: The mount.
            routers: The routers that are included on the way to it.
            rule: The rule of the mount.
            found: Whether the index of routes finds the mount.
        """
        if self.auth is None:
            return self
        inside = replace(self, auth=None, further_out=True)
        is_guarded = isinstance(mount.app, FastAPI)  # at its own router
        if is_guarded and not rule_of(mount, routers).public:
            inside = replace(inside, auth=getattr(mount.app.state, "auth", self.auth))
        decides = not found or not (is_guarded or rule.public)
        return replace(inside, caller=_strictest(self.caller, rule.caller)) if decides else inside


def rule_text(route: Any, rule: Rule, guards: Guards) -> tuple[str, bool]:
    """Return the text of a rule, and whether it is explicit.

    Args:
        route: The route, or FastAPI's context of it.
        rule: What the guard has decided.
        guards: The guards on the way to it.
    """
    dependant = getattr(route, "dependant", None)
    asked: _Caller = _strictest("ignored", *map(_caller_of, walk_dependencies(dependant)))
    caller = _strictest(guards.caller, rule.caller, asked)
    own: str | None = getattr(getattr(route, "endpoint", None), _scope.ENDPOINT_ACCESS, None)
    texts = sorted({str(each) for each in rule.required}) or ["any user"] * (caller == "required")
    texts += [] if own is None else [own]
    if texts:
        return "; ".join(texts), bool(rule.required or own or asked == "required" or dependant is None)
    if caller == "optional":
        return "optional", rule.public or asked == "optional"
    decided = rule.public or guards.auth is not None or guards.further_out
    return ("public" if decided else "unguarded"), decided


def _caller_of(dependency: Any) -> _Caller:
    """Return whether a dependency asks for a caller."""
    method = getattr(dependency, "__func__", None)
    if dependency is current_user or method is Auth.current_user:
        return "required"
    return "optional" if dependency is optional_user or method is Auth.authenticate else "ignored"


def _strictest(*callers: _Caller) -> _Caller:
    return max(callers, key=_STRICTNESS.index)
