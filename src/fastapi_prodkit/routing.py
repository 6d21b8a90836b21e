"""Find the route of a request without asking every route.

FastAPI asks all routes in turn, and those of included routers twice: the last of 300 routes is ten times the work of
the first. With the index the number of routes does not matter, and every answer stays the same.
"""

import logging

from fastapi import FastAPI

from fastapi_prodkit import _scope
from fastapi_prodkit._routing.ahead import find_route
from fastapi_prodkit._routing.fastapi_routes import seam
from fastapi_prodkit._routing.index import RouteIndex
from fastapi_prodkit._routing.trial import fastapi_is_known

__all__ = ["find_route", "index_routes"]

_logger = logging.getLogger("fastapi_prodkit")


def index_routes(app: FastAPI) -> None:
    """Find the routes of an app by an index, in place of the loop in FastAPI's router.

        index_routes(app)

    Call it at any time, once: a second call does nothing. `app.routes` stays as it is, and routes may be added before
    and after it. The index does not reach into mounted apps, which may have one of their own.

    If the installed FastAPI or the app's router is not one that the index knows, a line of the log says so, and
    everything stays as it was.
    """
    router = app.router
    if _scope.ROUTER_INDEX in vars(router):
        return
    place = seam(router) if fastapi_is_known() else None
    if place is None:
        _logger.warning("routes are not indexed: this version of FastAPI or this router is not known")
        return
    index = RouteIndex(router, router.app)
    setattr(*place, index)
    vars(router)[_scope.ROUTER_INDEX] = index
