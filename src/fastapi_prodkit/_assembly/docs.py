"""The docs pages of an app: ours in place of FastAPI's own."""

from fastapi import FastAPI
from starlette.routing import Route

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LabelledRoute
from fastapi_prodkit.openapi import docs_router
from fastapi_prodkit.settings import Settings

__all__ = ["put_first", "remove"]


def remove(app: FastAPI, settings: Settings) -> None:
    """Remove FastAPI's own pages and, without the section `docs`, the schema."""
    paths = {app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    app.docs_url = app.redoc_url = None
    if settings.docs is None:
        paths.add(app.openapi_url)
        app.openapi_url = None
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", ...) not in paths]


def put_first(app: FastAPI, settings: Settings) -> None:
    """Put our docs pages and the schema in front of the app's own routes, so that a catch-all does not hide them.

    They need no caller in dev and test.
    """
    docs = docs_router(app).routes if settings.docs and app.openapi_url and app.docs_url is None else []
    schema = [each for each in app.router.routes if isinstance(each, Route) and each.path == app.openapi_url]
    labelled = [LabelledRoute(each.path, each.endpoint, include_in_schema=False) for each in schema]
    for route in (*docs, *labelled):
        vars(route)[_scope.PUBLIC] = settings.environment in ("dev", "test")
        vars(route)[_scope.BY_SETTINGS] = True
    app.router.routes[:] = [*docs, *labelled, *(route for route in app.router.routes if route not in schema)]
