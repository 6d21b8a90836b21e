"""Deny by default: every route needs a caller unless `public` has marked it, or AUTH_DEFAULT is optional.

The guard stands between the app's middleware and its router. It asks the index of routes what will serve a request,
authenticates the caller, and checks what the route requires, before the body is received and before any dependency is
called. So a 401 costs next to nothing, and the decision is about the path that the router sees.

What no route serves is a 404 or a redirect without a caller. What only the router can tell, such as the files of
`app.frontend()` or a route of an unknown class, follows the default, whatever is marked; a mounted app that may serve
it is guarded, too.

Where a caller is optional, a request without credentials is served without a caller, and one with wrong credentials is
refused.
"""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRouter
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._routing.fastapi_routes import Entry, seam
from fastapi_prodkit._routing.index import Found, RouteIndex
from fastapi_prodkit._routing.trial import fastapi_is_known
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.caller import note_caller
from fastapi_prodkit.auth.rules import Rule, rule_of
from fastapi_prodkit.auth.schema import add_security_schemes
from fastapi_prodkit.auth.websockets import GuardedWebSocket
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["guard_routes"]

_KINDS: Final = ("http", "websocket")
_PUBLIC: Final = Rule(public=True, required=(), caller="ignored")
_MOST_RULES: Final = 10_000  # that are cached; an app has fewer routes


def guard_routes(app: FastAPI, auth: Auth[Any]) -> None:
    """Refuse requests without credentials for the routes of an app, except for those that need no caller.

        app.state.auth = Auth(AuthSettings(...))
        guard_routes(app, app.state.auth)

    A mounted FastAPI app is guarded at its own router, at the first request for it, by its own `app.state.auth` or else
    by this one. Any other mounted app is one route. Routes may be added before and after the call. The OpenAPI document
    of each app says where a caller is needed.

    Raises:
        ConfigurationError: The app is guarded by another `Auth`; or the installed FastAPI, or the app's router, is not
            one that can be guarded.
    """
    router = app.router
    known: Guard | None = vars(router).get(_scope.ROUTER_GUARD)
    if known is not None:
        if known.auth is not auth:
            raise ConfigurationError("the routes are guarded by another Auth: use the same one")
        return
    place = seam(router) if fastapi_is_known() else None
    if place is None:
        raise ConfigurationError("the routes cannot be guarded: this version of FastAPI or this router is not known")
    index = vars(router).get(_scope.ROUTER_INDEX) or RouteIndex(router, router.app)
    vars(router)[_scope.ROUTER_GUARD] = guard = Guard(getattr(*place), router, index, auth)
    setattr(*place, guard)
    add_security_schemes(app, auth)


class Guard:
    """Authenticate the caller of each request, and check what its route requires.

    Args:
        inner: Serves the request: the router, or the index of its routes.
        router: The router, whose routes are guarded.
        index: Finds the route of a request.
        auth: Authenticates the caller.
    """

    def __init__(self, inner: ASGIApp, router: APIRouter, index: RouteIndex, auth: Auth[Any]) -> None:
        self.app = inner
        self.auth = auth
        self._router = router
        self._index = index
        self._rules: dict[Entry, Rule] = {}
        self._default = Rule(public=False, required=(), caller=auth.default)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            ProblemError: 401 or 403, before the body is received.
        """
        if scope["type"] not in _KINDS:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket" and _scope.WEBSOCKET not in scope:
            websocket = GuardedWebSocket(scope, receive, send)
            try:
                await self(scope, websocket.receive, websocket.send)
            finally:
                websocket.end()
                del scope[_scope.WEBSOCKET]  # breaks the cycle of references: scope, messages, exchange, scope
            return
        scope[_scope.AUTH] = self.auth
        found = self._index.search(scope)
        rule = self._rule(found, scope)
        if rule.caller != "ignored":
            await self._admit(scope, rule)
        if self.app is self._index:
            await self._index.serve(found, scope, receive, send)  # which does not search again
        else:
            await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, rule: Rule) -> None:
        user = self.auth.known_user(scope)
        if user is not None:
            note_caller(scope, self.auth, user)
        elif rule.caller == "optional":
            await self.auth.authenticate(HTTPConnection(scope))
            return
        else:
            user = await self.auth.current_user(HTTPConnection(scope))
        for requirement in rule.required:
            requirement.check(user)

    def _rule(self, found: Found | None, scope: Scope) -> Rule:
        if found is None:
            if self._index.redirects(scope):
                return self._rule_of_nothing()
            for mount in self._index.mounts():
                self._rule_of(mount)  # which guards its app, as the router may choose it
            return self._default
        entry, _, _ = found
        return self._rule_of_nothing() if entry is None else self._rule_of(entry)

    def _rule_of(self, entry: Entry) -> Rule:
        rule = self._rules.get(entry)
        if rule is None:
            if len(self._rules) >= _MOST_RULES:
                self._rules.clear()
            rule = self._rules[entry] = rule_of(entry.route, entry.routers, self.auth.default)
        return rule if rule.public or entry.is_final else self._mounted_rule(entry.route.app, rule)

    def _rule_of_nothing(self) -> Rule:
        """Return the rule of a request that no route serves: a 404 needs no caller, another default app does."""
        return _PUBLIC if self._router.default == self._router.not_found else self._default

    def _mounted_rule(self, inner: ASGIApp, rule: Rule) -> Rule:
        """Return the rule of a mounted app; that of a FastAPI app is left to a guard of its own."""
        if not isinstance(inner, FastAPI):
            return rule
        if _scope.ROUTER_GUARD not in vars(inner.router):
            guard_routes(inner, getattr(inner.state, "auth", self.auth))
        elif not hasattr(inner.state, "auth"):
            guard_routes(inner, self.auth)  # an error if it is another one
        return _PUBLIC
