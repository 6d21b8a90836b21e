"""Who may call a route: what the guards on the way to it decide, and what it demands itself."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.rules import Rule, current_user, rule_of

__all__ = ["Guards", "rule_text"]


@dataclass(frozen=True)
class Guards:
    """The guards on the way to the routes of a router.

    Attributes:
        here: A guard decides about these routes.
        further_out: A guard further out decides about some route on the way to them.
        caller: A guard further out admits nobody without credentials.
    """

    here: bool = False
    further_out: bool = False
    caller: bool = False

    def at(self, router: Any) -> "Guards":
        """Return the same guards, and that of a router if it has one."""
        return replace(self, here=self.here or _scope.ROUTER_GUARD in vars(router))

    def decide(self, route: Any, routers: Iterable[Any], *, found: bool) -> Rule:
        """Return the rule of a route, as `Guard` decides.

        Args:
            route: What is asked whether it matches.
            routers: The routers that are included on the way to it.
            found: Whether the index of routes finds it; only the router finds what comes after an unknown route.
        """
        rule = rule_of(route, routers)
        return rule if found or not self.here else rule._replace(public=False)

    def inside(self, app: Any, rule: Rule, *, found: bool) -> "Guards":
        """Return the guards on the way to the routes of a mounted app.

        Args:
            app: What is mounted.
            rule: The rule of the mount.
            found: Whether the index of routes finds the mount.
        """
        left_to_app = found and isinstance(app, FastAPI) and not rule.public
        return replace(
            self,
            here=self.here and left_to_app,
            further_out=self.here or self.further_out,
            caller=self.caller or (self.here and not rule.public and not left_to_app),
        )


def rule_text(route: Any, rule: Rule, guards: Guards) -> tuple[str, bool]:
    """Return the text of a rule, and whether it is explicit.

    Args:
        route: The route, or FastAPI's context of it.
        rule: What the guard has decided.
        guards: The guards on the way to it.
    """
    own: str | None = getattr(getattr(route, "endpoint", None), _scope.ENDPOINT_ACCESS, None)
    dependant = getattr(route, "dependant", None)
    dependencies = list(walk_dependencies(dependant))
    required = sorted({str(each) for each in rule.required})
    asked = any(map(_is_caller, dependencies))
    closed = guards.caller or (guards.here and not rule.public)
    texts = required or ["any user"] * (asked or closed)
    texts += [] if own is None else [own]
    if texts:
        return "; ".join(texts), bool(required or asked or own or dependant is None)
    if any(map(_is_optional, dependencies)):
        return "optional", True
    decided = rule.public or guards.here or guards.further_out
    return ("public" if decided else "unguarded"), decided


def _is_caller(dependency: Any) -> bool:
    return dependency is current_user or getattr(dependency, "__func__", None) is Auth.current_user


def _is_optional(dependency: Any) -> bool:
    return getattr(dependency, "__func__", None) is Auth.authenticate
