"""`fastapi-prodkit doctor` on apps: of stock FastAPI, of Starlette, and ours; each with a fault and without."""

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import gathered, ids, in_order, module  # noqa: F401 - a fixture

from fastapi_prodkit import _scope
from fastapi_prodkit.cli.doctor.examination import examine, gather
from fastapi_prodkit.cli.doctor.rules.application import ORDER

pytestmark = pytest.mark.usefixtures("in_order")

SERVICE = """
from contextlib import asynccontextmanager
import prometheus_client, slowapi
from fastapi import APIRouter, FastAPI
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware as StarletteCORS
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, Router
from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.metrics import metrics_router
from fastapi_prodkit.rate_limit import RateLimitMiddleware
from fastapi_prodkit.rate_limit.slowapi import Limiter
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.sections import CorsSettings

@asynccontextmanager
async def lifespan(app):
    yield

app = FastAPI(openapi_url=None)
sub = FastAPI(openapi_url=None)
living = FastAPI(openapi_url=None, lifespan=lifespan)
living.include_router(APIRouter())
# What the profile of an environment relaxes, taken back.
strict = {"metrics": {"public": False}, "docs": None, "hosts": {"allowed": ["a.example"]}, "shutdown": {"drain": 5}}
"""

FAULTS = [
    ("app-debug", "app.debug = True"),
    ("app-debug", "sub.debug = True\napp.mount('/sub', sub)"),
    ("app-debug", "sub.debug = True\napp = create_app()\napp.mount('/', StarletteCORS(sub))"),
    ("app-debug", "sub.debug = True\napp.host('admin.example.com', sub)"),
    ("app-base-http-middleware", '@app.middleware("http")\nasync def add(request, call_next): ...'),
    (
        "app-base-http-middleware",
        "@sub.middleware('http')\nasync def add(request, call_next): ...\napp.mount('/', Router([Mount('/v1', sub)]))",
    ),
    ("app-slowapi-middleware", "app.add_middleware(SlowAPIMiddleware)"),
    ("app-slowapi-middleware", "sub.add_middleware(SlowAPIMiddleware)\napp.mount('/sub', sub)"),
    ("app-slowapi-middleware", "app.add_middleware(SlowAPIASGIMiddleware)"),
    ("app-slowapi-limiter", "app.state.limiter = slowapi.Limiter(key_func=get_remote_address)"),
    ("app-docs-public", "app = FastAPI()"),
    ("app-slowapi-limiter", "sub.state.limiter = slowapi.Limiter(get_remote_address)\napp.mount('/sub', sub)"),
    ("app-docs-public", "app.mount('/v1', FastAPI())"),
    ("app-metrics-public", "@app.get('/metrics')\nasync def metrics(): ..."),
    ("app-metrics-public", "app.mount('/metrics', prometheus_client.make_asgi_app())"),
    ("app-cors", "app.add_middleware(StarletteCORS, allow_origins=['*'], allow_credentials=True)"),
    ("app-metrics-public", "@sub.get('/metrics')\nasync def metrics(): ...\napp.mount('/sub', sub)"),
    ("app-metrics-public", "app.mount('/', Router([Mount('/metrics', prometheus_client.make_asgi_app())]))"),
    (
        "app-metrics-public",
        "app = create_app()\napp.mount('/sub', create_app(Settings(**strict | {'metrics': {'public': True}})))",
    ),
    ("app-cors", "sub.add_middleware(StarletteCORS, allow_origin_regex='https://.*')\napp.mount('/sub', sub)"),
    ("app-cors", "app.add_middleware(StarletteCORS, allow_origin_regex='https://.*')"),
    ("app-cors", "app.add_middleware(CORSMiddleware, origin_regex='https://.*')"),
    ("app-cors", "app.add_middleware(CORSMiddleware, CorsSettings(origin_regex='https://.*'), max_age=5)"),
    ("app-duplicate-middleware", "for _ in '12': app.add_middleware(RequestIDMiddleware)"),
    ("app-duplicate-middleware", "app = create_app()\napp.add_middleware(RequestIDMiddleware)"),
    ("app-middleware-order", "app.add_middleware(StarletteCORS)\napp.add_middleware(RateLimitMiddleware)"),
    ("app-mounted-lifespan", "app.mount('/sub', living)"),
    ("app-not-loaded", "1 / 0"),
    ("app-not-loaded", "raise SystemExit('no configuration')"),
    ("app-not-loaded", "app.add_middleware(RequestIDMiddleware, nonsense=True)"),
    ("settings-environment", "app = create_app(Settings(environment='test', **strict))"),
]
SOUND = [
    "app.add_middleware(RequestIDMiddleware)",
    "app = Starlette(routes=[Mount('/static', app=Router())])",
    "app.state.limiter = Limiter(key_func=get_remote_address)",
    "app.include_router(metrics_router())",
    "app.add_middleware(StarletteCORS, allow_origins=['https://app.example.com'])",
    "app.add_middleware(StarletteCORS, allow_origins=['https://app.example.com/path'])",
    "app.add_middleware(CORSMiddleware, settings=CorsSettings())",
    "app.add_middleware(CORSMiddleware, CorsSettings(allow_credentials=True), origins=['https://app.example.com'])",
    "app.add_middleware(RateLimitMiddleware)\napp.add_middleware(GZipMiddleware)\napp.add_middleware(StarletteCORS)",
    "app = create_app()\napp.mount('/sub', living)",
    "sub.include_router(APIRouter())\napp.mount('/sub', sub)",
    "app = create_app()\nsub.include_router(metrics_router())\napp.mount('/sub', sub)",
    "app.add_middleware(RequestIDMiddleware)\nsub.add_middleware(RequestIDMiddleware)\napp.mount('/', sub)",
    "app = create_app()\napp.mount('/sub', create_app(Settings(**strict)))",
    "app = StarletteCORS(app)",
]


class TestApp:
    def test_an_app_of_ours_in_order(self):
        """`create_app` alone has no findings."""
        name = module("from fastapi_prodkit import create_app\napp = create_app()\n")

        facts = gathered(f"{name}:app")

        assert ids(facts) == set()
        assert hasattr(facts.app.state, _scope.INSTALLED)

    @pytest.mark.parametrize(("expected", "code"), FAULTS)
    def test_one_fault(self, expected, code):
        """An app with a fault is found out under its id, whoever made it, and nothing else is found."""
        name = module(f"{SERVICE}\n{code}\n")

        found = ids(gathered(f"{name}:app"))

        assert found == {expected}

    @pytest.mark.parametrize("code", SOUND)
    def test_no_fault(self, code):
        """What is done right is not found, with Starlette's own parts or with ours."""
        name = module(f"{SERVICE}\n{code}\n")

        assert ids(gathered(f"{name}:app")) == set()

    def test_public_docs_are_named_with_their_paths(self, monkeypatch):
        """DOCS_ENABLED opens our pages, and FastAPI's own defaults its."""
        monkeypatch.setenv("DOCS_ENABLED", "true")
        ours = module("from fastapi_prodkit import create_app\napp = create_app()\n")
        stock = module("from fastapi import FastAPI\napp = FastAPI()\napp.mount('/v1', FastAPI(redoc_url=None))\n")

        reasons = [f.reason for name in (ours, stock) for f in examine(gathered(f"{name}:app")).findings]

        assert [reason.partition(":")[0] for reason in reasons] == [
            "/docs, /openapi.json",
            "/docs, /redoc, /openapi.json",
            "/v1/docs, /v1/openapi.json",
        ]

    def test_a_fault_of_a_mounted_app_is_named_with_its_path(self):
        """Also of one that an included router mounts, behind middleware."""
        name = module(
            f"{SERVICE}\nsub.debug = True\nsub.add_middleware(SlowAPIMiddleware)\nrouter = APIRouter()\n"
            "router.mount('/deep', StarletteCORS(sub))\napp.include_router(router, prefix='/v1')\n"
        )

        reasons = {found.id: found.reason for found in examine(gathered(f"{name}:app")).findings}

        assert reasons["app-debug"].startswith("Errors below /v1/deep show tracebacks")
        assert reasons["app-slowapi-middleware"].startswith("SlowAPIMiddleware below /v1/deep applies no")

    def test_an_app_whose_settings_cannot_be_used(self, monkeypatch):
        """What is missing is told together with what production refuses; the app waits."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        name = module(
            "from fastapi_prodkit import Settings, create_app\n"
            "class Own(Settings):\n    shop_name: str\n"
            "app = create_app(Own())\n"
        )

        facts = gathered(f"{name}:app")

        assert ids(facts) == {"settings-invalid", "settings-unsafe"}
        assert facts.skipped["app"] == "its settings cannot be used"

    def test_an_app_without_our_settings_is_judged_without_them(self, monkeypatch):
        """Variables that mean nothing to an app are not held against it, and the report says so."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        name = module("from fastapi import FastAPI\napp = FastAPI(openapi_url=None)\n")

        facts = gathered(f"{name}:app")

        assert ids(facts) == set()
        assert facts.skipped["settings"].startswith("the app has no settings of fastapi-prodkit:")
        assert "database" in facts.skipped

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_name_that_is_misspelt(self, monkeypatch, times):
        """It is told once, although `create_app` hands warnings to logging; those of others are not ours to tell."""
        monkeypatch.setenv("LOG_LEVLE", "INFO")
        other = "import warnings\nwarnings.simplefilter('always')\nwarnings.warn('LOG_LEVLE; did you mean another?')\n"
        name = module(f"{other}from fastapi_prodkit import create_app\n" + "app = create_app()\n" * times)

        (found,) = examine(gathered(f"{name}:app")).findings

        assert (found.id, found.remedy) == ("settings-near-miss", "Write LOG_LEVEL.")

    def test_what_is_no_app(self):
        """Something else than an app is named for what it is."""
        name = module("app = 'hello'\n")

        facts = gathered(f"{name}:app")

        assert facts.skipped["app"] == f"{name}:app is a str, and neither FastAPI nor Starlette"

    def test_a_factory(self):
        """A function that returns the app is called."""
        name = module("from fastapi import FastAPI\ndef make():\n    return FastAPI(debug=True, openapi_url=None)\n")

        facts = gather(f"{name}:make", environment="prod", factory=True, timeout=None)

        assert "app-debug" in ids(facts)

    def test_sigterm_ends_the_doctor(self):
        """A doctor that is stopped while the app is loading ends, and does not call it the app's fault."""
        name = module("raise SystemExit(143)\n")

        with pytest.raises(SystemExit):
            gathered(f"{name}:app")

    def test_the_order_is_that_of_the_edge(self, monkeypatch):
        """The rule about the order knows every layer, in the order in which `create_app` puts them."""
        monkeypatch.setenv("CORS_ORIGINS", "https://app.example.com")
        monkeypatch.setenv("LIMITS_MAX_CONCURRENT", "10")
        monkeypatch.setenv("LIMITS_CANCEL_ON_DISCONNECT", "true")
        name = module("from fastapi_prodkit import create_app\napp = create_app()\n")

        layers = [type(layer).__name__ for layer in gathered(f"{name}:app").app.middleware_stack.layers]

        assert layers == [names[0] for names in ORDER]

    def test_what_the_app_prints_and_logs_is_not_in_the_report(self, capsys):
        """The report is alone on standard output."""
        name = module(
            "import logging\nfrom fastapi_prodkit import create_app\n"
            "print('hello')\napp = create_app()\nlogging.error('loud')\n"
        )

        gathered(f"{name}:app")

        assert capsys.readouterr().out == ""
