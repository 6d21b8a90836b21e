"""The docs page, the names of operations, and the errors in the schema."""

import json
import re
from base64 import b64encode
from enum import Enum
from hashlib import sha256
from typing import Annotated

import pytest
from browser import needs_browser, visit
from fastapi import APIRouter, Depends, FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer, OAuth2AuthorizationCodeBearer, OpenIdConnect
from fastapi.testclient import TestClient
from openapi_spec_validator import validate
from pydantic import BaseModel
from wire import serving

from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.openapi import add_problem_schemas, docs_router, operation_id
from fastapi_prodkit.security_headers import SecurityHeadersMiddleware

PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
VALIDATION_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ValidationProblem"}}}


class Item(BaseModel):
    name: str
    price: float = 1.0


def documented(**kwargs):
    app = FastAPI(docs_url=None, redoc_url=None, generate_unique_id_function=operation_id, **kwargs)
    app.include_router(docs_router(app))
    add_problem_schemas(app)
    return app


def directives(response):
    """Return the response's Content-Security-Policy as name -> sources."""
    parts = (part.split() for part in response.headers["content-security-policy"].split(";"))
    return {name: sources for name, *sources in parts}


def inline_script_hash(response):
    [script] = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


# The docs page


def test_page_loads_nothing_from_other_hosts():
    """Each script, style sheet and image of the page comes from the service, so the page works offline."""
    client = TestClient(documented())
    page = client.get("/docs")
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assets = [client.get(address) for address in addresses]

    assert page.status_code == 200
    assert len(addresses) == 3
    assert "//" not in "".join(addresses)
    assert {asset.status_code for asset in assets} == {200}
    assert {asset.headers["content-type"] for asset in assets} == {
        "text/css; charset=utf-8",
        "image/png",
        "text/javascript; charset=utf-8",
    }
    assert "url: '/openapi.json'" in page.text
    assert '"persistAuthorization": true' in page.text


def test_policy_allows_only_the_scripts_of_the_page():
    """By the hash of the inline script, without 'unsafe-inline'."""
    response = TestClient(documented()).get("/docs")

    assert directives(response) == {
        "default-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "script-src": ["'self'", inline_script_hash(response)],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:", "blob:"],
        "connect-src": ["'self'"],
    }


def test_policy_allows_calls_to_origins_of_the_schema():
    """Servers, token endpoints and OpenID configurations; not templates."""
    app = documented(
        servers=[{"url": "https://api.example.com/v1"}, {"url": "/v2"}, {"url": "https://eu.{zone}.example.com"}]
    )
    oauth2 = OAuth2AuthorizationCodeBearer(
        "https://login.example.com/authorize",
        tokenUrl="https://login.example.com:8443/token",
        refreshUrl="https://refresh.example.com?x=;script-src",
    )
    openid = OpenIdConnect(openIdConnectUrl="https://id.example.com/.well-known/openid-configuration")

    @app.get("/me", dependencies=[Depends(oauth2), Depends(openid), Depends(HTTPBearer())])
    async def me(): ...

    response = TestClient(app).get("/docs")

    assert directives(response)["connect-src"] == [
        "'self'",
        "https://api.example.com",
        "https://id.example.com",
        "https://login.example.com:8443",
        "https://refresh.example.com",
    ]


def test_policy_allows_calls_to_token_endpoints_that_are_discovered():
    """They are asked for with each page, because an issuer may be down when the app starts."""
    discovered = []
    app = FastAPI(docs_url=None)
    app.include_router(docs_router(app, token_endpoints=lambda: discovered))
    client = TestClient(app)
    before = client.get("/docs")
    discovered += ["https://tokens.example.com/oauth2/token", "https://evil.example.com;script-src 'unsafe-inline'/"]
    after = client.get("/docs")

    assert directives(before)["connect-src"] == ["'self'"]
    assert directives(after)["connect-src"] == ["'self'", "https://tokens.example.com"]
    assert directives(after)["script-src"] == ["'self'", inline_script_hash(after)]


@pytest.mark.parametrize(
    ("given", "asked"), [({}, ["a", "b"]), ({"scopes": "openid"}, "openid")], ids=["by default", "as configured"]
)
def test_page_asks_an_openid_issuer_for_the_scopes_of_the_operations(given, asked):
    """It does not list them itself; scopes of other schemes have check boxes."""
    app = documented(swagger_ui_init_oauth=given)
    openid = OpenIdConnect(openIdConnectUrl="https://id.example.com/.well-known/openid-configuration")
    oauth2 = OAuth2AuthorizationCodeBearer("https://id.example.com/authorize", tokenUrl="https://id.example.com/token")
    app.get("/", dependencies=[Security(openid, scopes=["b", "a"]), Security(oauth2, scopes=["c"])])(lambda: None)

    page = TestClient(app).get("/docs").text

    assert json.loads(re.search(r"ui\.initOAuth\((.*)\)", page)[1]) == {"scopes": asked}


def test_oauth2_redirect_page_has_its_own_policy():
    """Both pages keep the reference between popup and opener."""
    client = TestClient(documented())

    page, redirect = client.get("/docs"), client.get("/docs/oauth2-redirect")

    assert "oauth2RedirectUrl: window.location.origin + '/docs/oauth2-redirect'" in page.text
    assert "swaggerUIRedirectOauth2" in redirect.text
    assert directives(redirect)["script-src"] == [inline_script_hash(redirect)]
    assert directives(redirect)["default-src"] == ["'none'"]
    assert page.headers["cross-origin-opener-policy"] == "same-origin-allow-popups"
    assert redirect.headers["cross-origin-opener-policy"] == "unsafe-none"


def test_assets_are_cached_by_their_version():
    """Other files are not served."""
    client = TestClient(documented())
    address = re.search(r'src="([^"]+)"', client.get("/docs").text)[1]

    response = client.get(address)

    assert re.search(r"\?v=\d+\.\d+", address)
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert response.headers["etag"]
    assert client.get("/docs/assets/__init__.py").status_code == 404


def test_line_break_behind_the_name_of_an_asset_is_ignored():
    """As by the patterns of all routes."""
    response = TestClient(documented()).get("/docs/assets/swagger-ui.css%0A")

    assert (response.status_code, response.headers["content-type"]) == (200, "text/css; charset=utf-8")


@pytest.mark.parametrize("path", ["/docs", "/docs/oauth2-redirect", "/docs/assets/swagger-ui.css"])
def test_pages_answer_head(path):
    """A HEAD request for the page, the OAuth redirect page and the assets gets status 200."""
    response = TestClient(documented()).head(path)

    assert response.status_code == 200


def test_page_has_correct_addresses_below_prefixes():
    """Of a stripping proxy, a router, or a mount."""
    inner = FastAPI(docs_url=None)
    inner.include_router(docs_router(inner), prefix="/internal")
    outer = FastAPI()
    outer.mount("/shop", inner)
    client = TestClient(outer, root_path="/api")

    page = client.get("/api/shop/internal/docs")

    assert "url: '/api/shop/openapi.json'" in page.text
    assert "window.location.origin + '/api/shop/internal/docs/oauth2-redirect'" in page.text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [client.get(address).status_code for address in addresses] == [200, 200, 200]
    assert client.get("/api/shop/openapi.json").status_code == 200


def test_mount_parameter_is_quoted_in_the_page():
    """So that its hash does not allow a script of the client."""
    inner = FastAPI(docs_url=None, title="</title><script>alert(1)</script>")
    inner.include_router(docs_router(inner))
    outer = FastAPI()
    outer.mount("/{tenant}", inner)

    page = TestClient(outer).get("/%27,alert(2),%27%22%3E%3Cscript%3Ealert(3)/docs")

    assert page.status_code == 200
    assert "alert(2)" not in page.text
    assert "alert(3)" not in page.text
    assert page.text.count("<script>") == 1


def test_page_uses_the_configuration_of_the_app():
    """The page uses the title, schema URL, Swagger UI parameters and OAuth settings passed to FastAPI."""
    app = documented(
        title="Shop & more",
        openapi_url="/schema.json",
        swagger_ui_parameters={"persistAuthorization": False, "docExpansion": "none"},
        swagger_ui_init_oauth={"clientId": "docs"},
    )

    page = TestClient(app).get("/docs").text

    assert "<title>Shop &amp; more</title>" in page
    assert "url: '/schema.json'" in page
    assert '"persistAuthorization": false' in page
    assert '"docExpansion": "none"' in page
    assert 'ui.initOAuth({"clientId": "docs"})' in page


def test_pages_are_not_in_the_schema():
    """The OpenAPI schema omits the documentation page and its assets, so client generators do not see them."""
    assert documented().openapi()["paths"] == {}


@pytest.mark.parametrize(
    ("kwargs", "message"), [({}, "FastAPI\\(docs_url=None\\)"), ({"openapi_url": None}, "openapi_url is None")]
)
def test_router_without_effect_is_refused(kwargs, message):
    """If FastAPI serves its own page, or there is no schema."""
    with pytest.raises(ConfigurationError, match=message):
        docs_router(FastAPI(**kwargs))


# In a browser


@pytest.mark.system
@needs_browser
def test_browser_renders_the_page_without_a_violation():
    """A real browser renders the operations under strict security headers and logs no violation."""
    app = documented(swagger_ui_parameters={"docExpansion": "full", "tryItOutEnabled": True})
    app.add_middleware(SecurityHeadersMiddleware)

    @app.post("/items/{item_id}", dependencies=[Depends(HTTPBearer())], tags=["items"])
    async def replace(item_id: int, item: Item) -> Item: ...

    with serving(app) as port:
        page = visit(f"http://127.0.0.1:{port}/docs")

    assert 'id="operations-items-items_replace"' in page.dom
    assert "opblock-summary-path" in page.dom
    assert page.complaints == []


# Operation ids


class Kind(Enum):
    ITEMS = "Line items (beta)"


def ids(app):
    return {
        f"{method.upper()} {path}": operation["operationId"]
        for path, item in app.openapi()["paths"].items()
        for method, operation in item.items()
    }


def test_operation_id_has_tag_and_function():
    """Not the path."""
    items, users = APIRouter(tags=["items", "internal"]), APIRouter()

    @items.get("/items/{item_id}")
    async def read(item_id: int): ...

    @users.get("/users/{user_id}")
    async def read(user_id: int): ...  # noqa: F811 - the same name on purpose

    app = documented()
    app.include_router(items, prefix="/v1")
    app.include_router(users, prefix="/v1", tags=["users"])

    names = ids(app)

    assert names == {"GET /v1/items/{item_id}": "items_read", "GET /v1/users/{user_id}": "users_read"}


def test_operation_id_without_a_tag_is_the_function():
    """A tag is made a valid identifier."""
    app = documented()

    @app.get("/status")
    async def status(): ...

    @app.get("/lines", tags=[Kind.ITEMS])
    async def read(): ...

    @app.get("/custom", operation_id="chosen")
    async def custom(): ...

    names = ids(app)

    assert names == {"GET /status": "status", "GET /lines": "line_items_beta_read", "GET /custom": "chosen"}


def test_operation_ids_of_several_methods_differ():
    """FastAPI gives them one id, which OpenAPI forbids."""
    app = documented()

    @app.api_route("/items", methods=["GET", "PUT"], tags=["items"])
    async def handle(): ...

    names = ids(app)

    assert names == {"GET /items": "items_handle_get", "PUT /items": "items_handle_put"}
    assert ids(app) == names


def test_equal_operation_ids_get_path_and_method():
    """For a router that is included twice."""
    app = documented()
    router = APIRouter()

    @router.get("/items/{item_id}")
    async def read(item_id: int): ...

    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")

    names = ids(app)

    assert names == {
        "GET /v1/items/{item_id}": "read_v1_items_item_id_get",
        "GET /v2/items/{item_id}": "read_v2_items_item_id_get",
    }
    assert ids(app) == names


# Errors in the schema


def test_schema_shows_problems():
    """A ValidationProblem for 422; the error models of FastAPI are removed."""
    app = documented()

    @app.post("/items")
    async def create(item: Item) -> Item: ...

    @app.get("/status")
    async def status(): ...

    schema = app.openapi()

    validate(schema)
    created, read = schema["paths"]["/items"]["post"]["responses"], schema["paths"]["/status"]["get"]["responses"]
    assert created.keys() == {"200", "422", "default"}
    assert created["422"] == {"description": "Validation Error", "content": VALIDATION_PROBLEM}
    assert created["default"] == read["default"] == {"description": "Error", "content": PROBLEM}
    assert read.keys() == {"200", "default"}
    schemas = schema["components"]["schemas"]
    assert schemas.keys() == {"Item", "Problem", "ValidationProblem"}
    assert schemas["Problem"]["properties"].keys() == {"type", "title", "status", "detail", "instance", "request_id"}
    errors = schemas["ValidationProblem"]["properties"]["errors"]
    assert errors["items"]["properties"].keys() == {"loc", "msg", "type"}


def test_declared_responses_with_content_stay():
    """Errors without content become problems."""
    app = documented()

    class Conflict(BaseModel):
        reason: str

    @app.post(
        "/items",
        responses={
            303: {"description": "See other"},
            404: {},
            409: {"model": Conflict},
            422: {"description": "Unknown currency"},
            "5XX": {"description": "Broken"},
            "default": {"description": "Anything else", "content": {"text/plain": {}}},
        },
    )
    async def create(item: Item) -> Item: ...

    schema = app.openapi()

    validate(schema)
    responses = schema["paths"]["/items"]["post"]["responses"]
    assert responses["303"] == {"description": "See other"}
    assert responses["404"] == {"description": "Not Found", "content": PROBLEM}
    assert responses["409"]["content"] == {"application/json": {"schema": {"$ref": "#/components/schemas/Conflict"}}}
    assert responses["422"] == {"description": "Unknown currency", "content": PROBLEM}
    assert responses["5XX"] == {"description": "Broken", "content": PROBLEM}
    assert responses["default"] == {"description": "Anything else", "content": {"text/plain": {}}}


def test_model_called_problem_stays():
    """A model of the service named Problem keeps its name, and our schema becomes ProdkitProblem."""
    app = documented()

    class Problem(BaseModel):
        exercise: str

    @app.get("/exercises")
    async def exercises() -> Problem: ...

    schema = app.openapi()

    validate(schema)
    schemas = schema["components"]["schemas"]
    assert schemas["Problem"]["properties"].keys() == {"exercise"}
    responses = schema["paths"]["/exercises"]["get"]["responses"]
    assert responses["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert responses["default"]["content"]["application/problem+json"]["schema"] == {
        "$ref": "#/components/schemas/ProdkitProblem"
    }


def test_webhooks_are_unchanged():
    """The problem schema is not added to webhooks, because other services answer them."""
    app = documented()

    @app.webhooks.post("order-shipped")
    async def shipped(item: Item): ...

    schema = app.openapi()

    validate(schema)
    responses = schema["webhooks"]["order-shipped"]["post"]["responses"]
    assert responses.keys() == {"200", "422"}
    assert {"HTTPValidationError", "ValidationError"} <= schema["components"]["schemas"].keys()


def test_problems_are_added_once_per_schema():
    """The schema is FastAPI's cached one."""
    app = documented()

    @app.get("/items")
    async def items(): ...

    first, second = app.openapi(), app.openapi()

    @app.get("/users")
    async def users(): ...

    third = app.openapi()

    assert first is second
    assert first is not third
    assert "default" in third["paths"]["/users"]["get"]["responses"]


def test_change_of_a_finished_schema_stays():
    """And does not affect that of another app."""
    first, second = documented(), documented()
    taken = first.openapi()["components"]["schemas"]["Problem"]["properties"]

    del taken["request_id"]

    assert "request_id" not in first.openapi()["components"]["schemas"]["Problem"]["properties"]
    assert first.openapi()["components"]["schemas"].keys() == {"Problem", "ValidationProblem"}
    assert "request_id" in second.openapi()["components"]["schemas"]["Problem"]["properties"]


def test_add_problem_schemas_is_idempotent():
    """A second call of add_problem_schemas does not wrap `app.openapi` again."""
    app = FastAPI()
    add_problem_schemas(app)
    wrapped = app.openapi

    add_problem_schemas(app)

    assert app.openapi is wrapped


def test_override_of_the_schema_works():
    """Before the call, and with a second call after it."""
    app = FastAPI()

    @app.get("/items/{item_id}")
    async def read(item_id: int): ...

    def custom():
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title="Custom", version="1", routes=app.routes)
            app.openapi_schema["info"]["x-logo"] = {"url": "logo.png"}
        return app.openapi_schema

    add_problem_schemas(app)
    app.openapi = custom
    add_problem_schemas(app)

    schema = TestClient(app).get("/openapi.json").json()

    validate(schema)
    assert schema["info"]["x-logo"] == {"url": "logo.png"}
    assert schema["paths"]["/items/{item_id}"]["get"]["responses"]["422"]["content"] == VALIDATION_PROBLEM


def test_statuses_of_dependencies_are_shown():
    """Such as a limit's 429, on the routes that depend on it."""

    class Limit:
        statuses = (429,)

        async def __call__(self): ...

    limit = Limit()

    async def nested(_: Annotated[None, Depends(limit)]): ...

    app = FastAPI()
    router = APIRouter(dependencies=[Depends(limit)])
    router.add_api_route("/router", lambda: None)
    app.include_router(router, prefix="/v1")
    app.add_api_route("/nested", lambda: None, dependencies=[Depends(nested)], methods=["GET", "POST"])
    app.add_api_route("/hidden", lambda: None, dependencies=[Depends(limit)], include_in_schema=False)
    app.add_api_route("/free", lambda: None)
    add_problem_schemas(app)

    paths = app.openapi()["paths"]

    shown = {
        f"{method} {path}" for path, item in paths.items() for method in item if "429" in item[method]["responses"]
    }
    assert shown == {"get /v1/router", "get /nested", "post /nested"}
    assert paths["/nested"]["get"]["responses"]["429"]["description"] == "Too Many Requests"
    assert "application/problem+json" in paths["/nested"]["get"]["responses"]["429"]["content"]
