"""The docs pages of an app: ours in place of FastAPI's own, and who may open them."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._asgi import LabelledRoute
from fastapi_prodkit._bearer import BasicPassword
from fastapi_prodkit.openapi import docs_router
from fastapi_prodkit.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fastapi_prodkit.auth import Auth

__all__ = ["put_first", "remove"]

_Endpoint = Callable[[Request], Awaitable[Response]]


def remove(app: FastAPI, settings: Settings) -> None:
    """Remove FastAPI's own pages and, without the section `docs`, the schema."""
    paths = {app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    app.docs_url = app.redoc_url = None
    if settings.docs is None:
        paths.add(app.openapi_url)
        app.openapi_url = None
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", ...) not in paths]


def put_first(app: FastAPI, settings: Settings, auth: "Auth[Any] | None", registry: "CollectorRegistry | None") -> None:
    """Put our docs pages and the schema in front of the app's own routes, so that a catch-all does not hide them.

    They are open in dev and test. Elsewhere they need DOCS_TOKEN or a caller, if the app has either.
    """
    token = settings.docs.token if settings.docs is not None else None
    is_open = settings.environment in ("dev", "test")
    password = BasicPassword(token, registry=registry) if token is not None and not is_open else None
    schema = [each for each in app.router.routes if isinstance(each, Route) and each.path == app.openapi_url]
    ours = []
    for route in (*_pages(app, settings, auth), *schema):
        endpoint = route.endpoint if password is None else _behind(password, auth, route.endpoint)
        ours.append(LabelledRoute(route.path, endpoint, name=route.name, include_in_schema=False))
        vars(ours[-1]).update({_scope.PUBLIC: is_open or password is not None, _scope.BY_SETTINGS: True})
    app.router.routes[:] = [*ours, *(route for route in app.router.routes if route not in schema)]


def _pages(app: FastAPI, settings: Settings, auth: "Auth[Any] | None") -> list[Route]:
    if settings.docs is None or app.openapi_url is None or app.docs_url is not None:
        return []
    if auth is not None and auth.issuers:
        app.swagger_ui_init_oauth = {**_sign_in(settings), **(app.swagger_ui_init_oauth or {})}
    router = docs_router(app, token_endpoints=auth.token_endpoints if auth is not None else tuple)
    return cast("list[Route]", router.routes)


def _sign_in(settings: Settings) -> dict[str, Any]:
    """Return how Swagger UI signs people in: the keywords of its function `initOAuth`."""
    found: dict[str, Any] = {"usePkceWithAuthorizationCodeGrant": True}
    if settings.docs is not None and settings.docs.client_id is not None:
        found["clientId"] = settings.docs.client_id
    if settings.auth is not None and "auth0" in settings.auth.preset:  # its token is no JWT unless an API is named
        found["additionalQueryStringParams"] = {"audience": settings.auth.audience[0]}
    return found


def _behind(password: BasicPassword, auth: "Auth[Any] | None", endpoint: _Endpoint) -> _Endpoint:
    """Return an endpoint that admits callers of the app, and whoever has the password."""

    @wraps(endpoint)
    async def protected(request: Request) -> Response:
        user = await auth.authenticate(request) if auth is not None else None
        if user is None:
            password.authorize(request)
        else:
            _context.bind(user_id=user.id)
        return await endpoint(request)

    vars(protected)[_scope.ENDPOINT_ACCESS] = "DOCS_TOKEN" if auth is None else "DOCS_TOKEN or any user"
    return protected
