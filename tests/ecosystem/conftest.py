"""Run the service of each test module with its agent, and return what the agent has sent."""

import json
import os
from contextlib import closing
from pathlib import Path

import pytest
from forks import Forks

HERE = Path(__file__).parent
LOADED = (
    "fastapi.testclient",
    "orjson",
    "prometheus_client",
    "pydantic_settings",
    "structlog",
    "uvicorn",
    "websockets",
)
RUN = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
from service import main
main(*sys.argv[1:])
"""


@pytest.fixture(params=["bare", "create_app", "install"])
def way(request):
    """Every test runs with bare FastAPI as well, as the reference."""
    return request.param


@pytest.fixture(scope="module")
def effects(request, tmp_path_factory):
    """Return what the agent has sent, for a service made in this way, with the agent attached at this moment.

    The module has `attach(app, sink)`, which may return what to serve in place of the app, and `effects(sink)`. The
    moments are those of `service.assemble`. Keywords are variables of the service's process, and so are those that the
    module has in ENVIRONMENT, with `{url}` for the sink's URL; what LOADED names is imported once for all services.
    """
    directory = tmp_path_factory.mktemp("service")
    result = directory / "effects.json"
    with closing(Forks(loaded=(*LOADED, *getattr(request.module, "LOADED", ())))) as forks:

        def effects(way, moment, **environment):
            kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
            arguments = (request.module.__file__, way, moment, str(result))
            variables = {**kept, "ENVIRONMENT": "dev", **environment}
            run = forks.run(RUN, *arguments, directory=directory, environment=variables)
            assert run.code == 0, run.stderr
            return json.loads(result.read_text())

        yield effects
