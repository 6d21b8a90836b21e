"""`fastapi-prodkit doctor` on apps of FastAPI, of Starlette, and of `create_app`."""

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
    def test_create_app_alone_has_no_findings(self):
        """An app that is made by create_app and not changed further causes no finding of the doctor."""
        name = module("from fastapi_prodkit import create_app\napp = create_app()\n")

        facts = gathered(f"{name}:app")

        assert ids(facts) == set()
        assert hasattr(facts.app.state, _scope.INSTALLED)

    @pytest.mark.parametrize(("expected", "code"), FAULTS)
    def test_problem_has_one_finding(self, expected, code):
        """Under its id, in every kind of app."""
        name = module(f"{SERVICE}\n{code}\n")

        found = ids(gathered(f"{name}:app"))

        assert found == {expected}

    @pytest.mark.parametrize("code", SOUND)
    def test_safe_app_has_no_findings(self, code):
        """Apps that use Starlette's or the package's middleware correctly cause no finding of the doctor."""
        name = module(f"{SERVICE}\n{code}\n")

        assert ids(gathered(f"{name}:app")) == set()

    def test_public_docs_are_named_with_their_paths(self, monkeypatch):
        """The finding about public docs lists the documentation paths of the app and of mounted apps."""
        monkeypatch.setenv("DOCS_ENABLED", "true")
        ours = module("from fastapi_prodkit import create_app\napp = create_app()\n")
        stock = module("from fastapi import FastAPI\napp = FastAPI()\napp.mount('/v1', FastAPI(redoc_url=None))\n")

        reasons = [f.reason for name in (ours, stock) for f in examine(gathered(f"{name}:app")).findings]

        assert [reason.partition(":")[0] for reason in reasons] == [
            "/docs, /openapi.json",
            "/docs, /redoc, /openapi.json",
            "/v1/docs, /v1/openapi.json",
        ]

    def test_docs_with_a_password_are_not_public(self, monkeypatch):
        """DOCS_TOKEN switches them on, and protects the schema, too."""
        monkeypatch.setenv("DOCS_TOKEN", "x" * 16)
        name = module("from fastapi_prodkit import create_app\napp = create_app()\n")

        assert "app-docs-public" not in ids(gathered(f"{name}:app"))

    def test_problem_of_a_mounted_app_is_named_with_its_path(self):
        """Also in an included router, behind middleware."""
        name = module(
            f"{SERVICE}\nsub.debug = True\nsub.add_middleware(SlowAPIMiddleware)\nrouter = APIRouter()\n"
            "router.mount('/deep', StarletteCORS(sub))\napp.include_router(router, prefix='/v1')\n"
        )

        reasons = {found.id: found.reason for found in examine(gathered(f"{name}:app")).findings}

        assert reasons["app-debug"].startswith("Errors below /v1/deep show tracebacks")
        assert reasons["app-slowapi-middleware"].startswith("SlowAPIMiddleware below /v1/deep applies no")

    def test_app_with_invalid_settings_is_not_checked(self, monkeypatch):
        """Missing and unsafe settings are reported together."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        name = module(
            "from fastapi_prodkit import Settings, create_app\n"
            "class Own(Settings):\n    shop_name: str\n"
            "app = create_app(Own())\n"
        )

        facts = gathered(f"{name}:app")

        assert ids(facts) == {"settings-invalid", "settings-unsafe"}
        assert facts.skipped["app"] == "its settings cannot be used"

    def test_app_without_our_settings_is_checked_without_them(self, monkeypatch):
        """The report says so."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        name = module("from fastapi import FastAPI\napp = FastAPI(openapi_url=None)\n")

        facts = gathered(f"{name}:app")

        assert ids(facts) == set()
        assert facts.skipped["settings"].startswith("the app has no settings of fastapi-prodkit:")
        assert "database" in facts.skipped

    @pytest.mark.parametrize("times", [1, 2])
    def test_misspelt_variable_is_reported_once(self, monkeypatch, times):
        """Although `create_app` redirects warnings to logging; other warnings are not reported."""
        monkeypatch.setenv("LOG_LEVLE", "INFO")
        other = "import warnings\nwarnings.simplefilter('always')\nwarnings.warn('LOG_LEVLE; did you mean another?')\n"
        name = module(f"{other}from fastapi_prodkit import create_app\n" + "app = create_app()\n" * times)

        (found,) = examine(gathered(f"{name}:app")).findings

        assert (found.id, found.remedy) == ("settings-near-miss", "Write LOG_LEVEL.")

    def test_object_that_is_no_app_is_named_by_its_type(self):
        """The doctor skips an object that is neither a FastAPI nor a Starlette app, and reports its type."""
        name = module("app = 'hello'\n")

        facts = gathered(f"{name}:app")

        assert facts.skipped["app"] == f"{name}:app is a str, and neither FastAPI nor Starlette"

    def test_factory_is_called(self):
        """With factory=True the doctor calls the named function and examines the app that it returns."""
        name = module("from fastapi import FastAPI\ndef make():\n    return FastAPI(debug=True, openapi_url=None)\n")

        facts = gather(f"{name}:make", environment="prod", factory=True, timeout=None)

        assert "app-debug" in ids(facts)

    def test_sigterm_ends_the_doctor(self):
        """While the app is loaded; this is not a finding."""
        name = module("raise SystemExit(143)\n")

        with pytest.raises(SystemExit):
            gathered(f"{name}:app")

    def test_order_rule_knows_the_order_of_the_layers(self, monkeypatch):
        """The order rule lists every layer in the sequence in which create_app installs the layers."""
        monkeypatch.setenv("CORS_ORIGINS", "https://app.example.com")
        monkeypatch.setenv("LIMITS_MAX_CONCURRENT", "10")
        monkeypatch.setenv("LIMITS_CANCEL_ON_DISCONNECT", "true")
        name = module("from fastapi_prodkit import create_app\napp = create_app()\n")

        layers = [type(layer).__name__ for layer in gathered(f"{name}:app").app.middleware_stack.layers]

        assert layers == [names[0] for names in ORDER]

    def test_output_of_the_app_is_not_in_the_report(self, capsys):
        """Output that the examined app prints or logs does not reach standard output, only the report does."""
        name = module(
            "import logging\nfrom fastapi_prodkit import create_app\n"
            "print('hello')\napp = create_app()\nlogging.error('loud')\n"
        )

        gathered(f"{name}:app")

        assert capsys.readouterr().out == ""
