"""A next FastAPI that has changed a private part which the index reads: the index stands aside, with one line."""

import json
from contextlib import closing

import pytest
from forks import Forks

pytest.importorskip("httpx2", reason="the test client needs httpx2")

STANDS_ASIDE = "routes are not indexed: this version of FastAPI or this router is not known\n"

# FastAPI is imported with another name in place of the one that is given, everywhere in its source.
NEXT_FASTAPI = r"""
import json, re, sys
from importlib.machinery import PathFinder, SourceFileLoader

class Renaming(SourceFileLoader):
    def get_code(self, name):
        source, count = re.subn(rf"\b{re.escape(sys.argv[1])}\b", r"\g<0>_of_next", self.get_source(name))
        return compile(source, self.path, "exec") if count else super().get_code(name)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        spec = super().find_spec(name, *where)
        if spec and name.partition(".")[0] == "fastapi":
            spec.loader = Renaming(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder)

from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from fastapi_prodkit import _scope
from fastapi_prodkit.routing import index_routes

app, outer, inner = FastAPI(), APIRouter(), APIRouter(max_body_size=4)

async def number(number: int): return number

inner.get("/{number}")(number)
inner.add_route("/plain/{number}", PlainTextResponse("plain"), methods=["POST"])
outer.include_router(inner, prefix="/inner")
app.include_router(outer, prefix="/outer")
app.get("/direct/{number}")(number)
index_routes(app)
client = TestClient(app, follow_redirects=False)
asked = ["GET /direct/1", "GET /outer/inner/1", "GET /outer/inner/x", "PUT /outer/inner/1", "POST /outer/inner/plain/1",
    "GET /outer/inner/1/", "GET /nowhere"]
statuses = [client.request(*line.split()).status_code for line in asked]
print(json.dumps([_scope.ROUTER_INDEX in vars(app.router), statuses]))
"""


@pytest.fixture(scope="module")
def forks():
    with closing(Forks("-W", "error", loaded=["pydantic", "starlette.testclient", "structlog"])) as forks:
        yield forks


def run(forks, directory, part):
    """Return whether the routes are indexed, the statuses of some requests, and what is logged."""
    ran = forks.run(NEXT_FASTAPI, part, directory=directory)
    assert ran.code == 0, ran.stderr
    return *json.loads(ran.stdout), ran.stderr


STATUSES = [200, 200, 422, 405, 200, 307, 404]


@pytest.mark.system
@pytest.mark.parametrize(
    "part",
    [
        "_IncludedRouter",
        "_iter_low_priority_routes",
        "_route_selected",
        "_routes_version",
        "effective_candidates",
        "effective_route_context",
        "include_context",
        "included_router",
        "original_route",
        "original_router",
        "starlette_route",
        "wrap_app_with_body_limit",
        '_FASTAPI_SCOPE_KEY = "fastapi',
    ],
)
def test_trial_notices_a_private_part_with_another_name(forks, tmp_path, part):
    """FastAPI's router then serves every request, and one line of the log says so."""
    assert run(forks, tmp_path, part) == (False, STATUSES, STANDS_ASIDE)


def test_trial_is_passed_by_the_fastapi_that_is_installed(forks, tmp_path):
    """The same program, with a name that FastAPI does not have, indexes the routes."""
    assert run(forks, tmp_path, "no_such_name") == (True, STATUSES, "")
