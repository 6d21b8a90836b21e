"""Random tables of routes and random requests: FastAPI's router and the index do the same.

The normal run takes a few tables, always the same ones. For thousands of new ones:
ROUTING_EXAMPLES=5000 pytest tests/test_routing_differential.py
"""

import asyncio
import os
import re
from itertools import count
from typing import NamedTuple

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed import BothWays, echo, talk
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match

EXAMPLES = int(os.environ.get("ROUTING_EXAMPLES", "20"))

WORDS = ["a", "b", "items", "1", "2.5", "x.y", "é"]
PARAMETERS = ["{%s}", "{%s}", "{%s:int}", "{%s:float}", "{%s:path}", "{%s:uuid}", "v{%s}", "{%s}.{%s_}", "{%s:int}x"]
PREFIXES = ["", "", "/a", "/items", "/{tenant}", "/v1/b"]
METHODS = ["GET", "POST", "PUT", "HEAD", "OPTIONS"]
FITTING = {"int": ["1", "007"], "float": ["2.5"], "path": ["a/b", ""], "uuid": ["6f1c8ab8-7a55-4d0f-9b5a-0a2f6b9a5a11"]}
VALUES = [*WORDS, "v3", "7x", "B", "", "foreign", "a\n", "a/b"]
KNOWN_KINDS = ["api"] * 4 + ["custom", "plain", "socket", "mount", "host"]


class Leaf(NamedTuple):
    kind: str
    path: str
    methods: list[str]


class Included(NamedTuple):
    prefix: str
    own_prefix: str
    table: list


@st.composite
def paths(draw):
    """Draw the path of a route, such as `/items/{p1:int}`."""
    drawn = draw(st.lists(st.sampled_from(WORDS + PARAMETERS), max_size=3))
    parts = [part.replace("%s", f"p{index}") for index, part in enumerate(drawn)]
    return "".join(f"/{part}" for part in parts) + draw(st.sampled_from(["", "", "/"])) or "/"


@st.composite
def leaves(draw, kinds):
    methods = st.lists(st.sampled_from(METHODS), min_size=1, max_size=2, unique=True)
    return Leaf(draw(st.sampled_from(kinds)), draw(paths()), draw(methods))


@st.composite
def tables(draw, kinds, depth=2):
    entries = draw(st.lists(leaves(kinds), max_size=5))
    if depth:
        for _ in range(draw(st.integers(0, 2))):
            prefixes = st.sampled_from(PREFIXES)
            included = Included(draw(prefixes), draw(prefixes), draw(tables(kinds, depth - 1)))
            entries.insert(draw(st.integers(0, len(entries))), included)
    return entries


class Custom(APIRoute):
    """A route with a handler of its own, which the index knows."""

    def get_route_handler(self):
        handler = super().get_route_handler()

        async def handle(request):
            response = await handler(request)
            response.headers["x-custom"] = "yes"
            return response

        return handle


class Foreign(APIRoute):
    """A route that matches in its own way, which the index does not know."""

    def matches(self, scope):
        return (Match.NONE, {}) if b"x-foreign" in dict(scope["headers"]) else super().matches(scope)


class Unknown(BaseRoute):
    """A route of an unknown kind."""

    def matches(self, scope):
        return (Match.FULL if "foreign" in scope["path"] else Match.NONE), {}

    async def handle(self, scope, receive, send):
        await PlainTextResponse("unknown")(scope, receive, send)


def marks(scope):
    return scope.get("marks")


def mark(name):
    async def dependency(connection: HTTPConnection):
        connection.scope.setdefault("marks", []).append(name)

    return Depends(dependency)


class Table:
    """An app with the routes of a table.

    Attributes:
        routers: The app's router and all that are included.
    """

    def __init__(self, table, options):
        self._names = map(str, count())
        self.app = FastAPI(dependencies=[mark("app")], **options)
        self.routers = [self.app.router]
        self._fill(self.app.router, table)

    def _fill(self, router, table):
        for entry in table:
            if isinstance(entry, Leaf):
                self.add(router, entry)
                continue
            included = APIRouter(prefix=self._named(entry.own_prefix), dependencies=[mark(next(self._names))])
            self.routers.append(included)
            self._fill(included, entry.table)
            router.include_router(included, prefix=self._named(entry.prefix), dependencies=[mark(next(self._names))])

    def _named(self, prefix):
        return prefix.replace("tenant", f"tenant{next(self._names)}")  # a path has each name once

    def add(self, router, leaf):
        """Add one route to a router."""
        name = next(self._names)
        classes = {"api": None, "custom": Custom, "foreign": Foreign}
        if leaf.kind in classes:
            kind = classes[leaf.kind]
            router.add_api_route(leaf.path, echo(name, marks), methods=leaf.methods, route_class_override=kind)
        elif leaf.kind == "plain":
            router.add_route(leaf.path, PlainTextResponse(name), methods=leaf.methods)
        elif leaf.kind == "socket":
            router.add_api_websocket_route(leaf.path, talk(name))
        elif leaf.kind == "unknown":
            router.routes.append(Unknown())
        else:
            sub = FastAPI(openapi_url=None)
            sub.get("/{rest:path}")(echo(f"mounted {name}"))
            mounted = "path:" in leaf.path or leaf.kind == "host"  # Mount has a parameter of this kind itself
            router.host("api.test", sub) if mounted else router.mount(leaf.path.rstrip("/") or "/mounted", sub)

    def known(self):
        """Return path and method of each route."""
        contexts = [context for context in iter_route_contexts(self.app.routes) if context.path]
        return [(context.path, min(context.methods) if context.methods else "WS") for context in contexts]


@st.composite
def requests(draw, known):
    """Draw a request, for one of the known routes or for another path."""
    values = st.sampled_from(VALUES)
    path = "".join(f"/{value}" for value in draw(st.lists(values, max_size=4)))
    method = draw(st.sampled_from([*METHODS, "GET", "WS"]))
    if known and draw(st.integers(0, 3)):
        template, own_method = draw(st.sampled_from(known))
        method = draw(st.sampled_from([own_method, own_method, method]))
        fitting = st.booleans().flatmap(lambda fits: st.just(FITTING) if fits else st.just({}))
        path = re.sub(
            r"\{\w+:?(\w*)\}", lambda match: draw(st.sampled_from(draw(fitting).get(match[1], VALUES))), template
        )
    path = draw(st.sampled_from([path, path, path, path + "/", path.rstrip("/"), "/a" + path]))
    root_path = draw(st.sampled_from(["", "", "", "/a", "/items"]))
    headers = draw(st.sampled_from([(), (), ((b"x-foreign", b"1"),)]))
    return method, path, root_path, headers


OPTIONS = st.fixed_dictionaries(
    {}, optional={"redirect_slashes": st.booleans(), "max_body_size": st.just(100), "openapi_url": st.none()}
)


@settings(
    max_examples=EXAMPLES,
    derandomize="ROUTING_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data(), OPTIONS)
def test_the_index_does_what_the_router_does(data, options):
    """Status, body, headers, scope, and what reaches the handler are the same; also after routes were added."""
    kinds = data.draw(st.sampled_from([KNOWN_KINDS, KNOWN_KINDS, [*KNOWN_KINDS, "foreign", "unknown"]]))
    routes = Table(data.draw(tables(kinds)), options)
    both = BothWays(routes.app)

    async def compare():
        for _ in range(3):
            drawn = data.draw(st.lists(requests(routes.known()), min_size=1, max_size=8))
            for method, path, root_path, headers in drawn:
                await both.ask(method, path, root_path=root_path, headers=headers, ahead=data.draw(st.booleans()))
            routes.add(data.draw(st.sampled_from(routes.routers)), data.draw(leaves(kinds)))

    asyncio.run(compare())
