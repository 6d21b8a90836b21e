"""Deny by default: every route needs a caller unless `public` has marked it.

The guard stands between the app's middleware and its router. It asks what will serve a request, authenticates the
caller, and checks what the route requires, before the body is received and before any dependency runs. So a 401 costs
next to nothing, and no path reaches a handler that the router would not have chosen for it.

    edge > the app's middleware > guard: rule of the route > caller > roles and scopes > router > handler

What no route serves is a 404 or a redirect without a caller. What only the router can tell, such as the files of
`app.frontend()`, needs a caller.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRouter, iter_route_contexts
from starlette.requests import HTTPConnection
from starlette.routing import Host, Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._routing.fastapi_routes import Entry, seam
from fastapi_prodkit._routing.index import RouteIndex
from fastapi_prodkit._routing.trial import fastapi_is_known
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.rules import Rule, rule_of
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["guard_routes"]

_KINDS: Final = ("http", "websocket")
_PUBLIC: Final = Rule(public=True, required=())
_MOST_RULES: Final = 10_000  # that are cached; an app has fewer routes


def guard_routes(app: FastAPI, auth: Auth[Any]) -> None:
    """Let nobody call a route of an app without credentials, except routes that are `public`.

        app.state.auth = Auth(AuthSettings(...))
        guard_routes(app, app.state.auth)

    A mounted FastAPI app is guarded at its own router, at the first request for it; any other mounted app is one route.
    Routes may be added before and after the call. A second call does nothing.

    Raises:
        ConfigurationError: The installed FastAPI or the app's router is not one that can be guarded.
    """
    router = app.router
    if _scope.ROUTER_GUARD in vars(router):
        return
    place = seam(router) if fastapi_is_known() else None
    if place is None:
        raise ConfigurationError("the routes cannot be guarded: this version of FastAPI or this router is not known")
    index = vars(router).get(_scope.ROUTER_INDEX) or RouteIndex(router, router.app)
    vars(router)[_scope.ROUTER_GUARD] = guard = Guard(getattr(*place), router, index, auth)
    setattr(*place, guard)


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
        self._router = router
        self._index = index
        self._auth = auth
        self._rules: dict[Entry, Rule] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            ProblemError: 401 or 403, before the body is received.
        """
        if scope["type"] in _KINDS:
            rule = self._rule(scope)
            if not rule.public:
                await self._admit(scope, rule)
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, rule: Rule) -> None:
        user = self._auth.known_user(scope)
        if user is None:
            user = await self._auth.current_user(HTTPConnection(scope))
        scope[_scope.USER] = user
        _context.bind(user_id=user.id)
        for requirement in rule.required:
            requirement.check(user)

    def _rule(self, scope: Scope) -> Rule:
        found = self._index.find_ahead(scope)
        if found is None:
            return _PUBLIC if self._index.redirects(scope) else self._searched_rule(scope)
        entry, _, _ = found
        if entry is None:
            return _PUBLIC  # a 404
        rule = self._rules.get(entry)
        if rule is None:
            if len(self._rules) >= _MOST_RULES:
                self._rules.clear()
            rule = self._rules[entry] = self._rule_of(entry.chosen, entry.asked, entry.routers)
        return rule

    def _searched_rule(self, scope: Scope) -> Rule:
        """Return the rule of a route that the index does not know. Marks of routers are not seen: it stays closed."""
        scope = {**scope, "fastapi": {}}  # matching writes into this entry; the app's scope must not change
        matching = (each for each in iter_route_contexts(self._router.routes) if each.matches(scope)[0] is Match.FULL)
        return self._rule_of(next(matching, None), None, ())

    def _rule_of(self, route: Any, mount: Any, routers: Sequence[APIRouter]) -> Rule:
        mounted = [*_apps_of(mount)]
        rule = rule_of(route, [route, getattr(route, "endpoint", None), *mounted, *routers])
        inner = next((app for app in mounted if isinstance(app, FastAPI)), None)
        if rule.public or inner is None:
            return rule
        guard_routes(inner, self._auth)
        return _PUBLIC  # its own guard decides


def _apps_of(route: Any) -> Iterator[Any]:
    """Yield the app of a mount, and those inside of its middleware."""
    app = route.app if isinstance(route, Mount | Host) else None
    while app is not None:
        yield app
        app = vars(app).get("app") if hasattr(app, "__dict__") else None
