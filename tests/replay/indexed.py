"""A plugin of pytest: write the outcome of every test, and with --index put an index on every app and router.

Starlette's own `Router` becomes FastAPI's, which the index knows; its routes, mounts and hosts stay what they are.
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import starlette.applications
import starlette.routing
from fastapi import APIRouter, FastAPI

from fastapi_prodkit._routing.index import RouteIndex
from fastapi_prodkit.routing import index_routes

outcomes: dict[str, str] = {}
requests: Counter[str] = Counter()


class IndexedRouter(APIRouter):
    """FastAPI's router with the arguments of Starlette's, and an index."""

    def __init__(
        self, routes=None, redirect_slashes=True, default=None, lifespan=None, *, middleware=None, max_body_size=None
    ):
        super().__init__(
            routes=routes,
            redirect_slashes=redirect_slashes,
            default=default,
            lifespan=lifespan,
            max_body_size=max_body_size,
        )
        index_routes(SimpleNamespace(router=self))
        for kind, args, options in reversed(middleware or []):
            self.middleware_stack = kind(self.middleware_stack, *args, **options)


def put_indexes():
    """Index the routes of everything that is created from now on, and count what the indexes find."""
    setup, find = FastAPI.setup, RouteIndex.find

    def setup_with_index(app):
        setup(app)
        index_routes(app)

    def find_and_count(index, scope):
        found = find(index, scope)
        requests["left" if found is None else "found"] += 1
        return found

    FastAPI.setup = setup_with_index
    RouteIndex.find = find_and_count
    starlette.routing.Router = starlette.applications.Router = IndexedRouter


def pytest_addoption(parser):
    parser.addoption("--index", action="store_true")
    parser.addoption("--outcomes", type=Path)


def pytest_configure(config):
    if config.getoption("index"):
        put_indexes()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_collectreport(report):
    if report.failed:
        outcomes[report.nodeid] = "not collected"


def pytest_sessionfinish(session):
    session.config.getoption("outcomes").write_text(json.dumps({"outcomes": outcomes, "requests": requests}))
