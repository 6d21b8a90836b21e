"""The OpenAPI document: how credentials are sent, where they are needed, and what is answered without them."""

from typing import Annotated

import pytest
from fastapi import APIRouter, Depends, FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.testclient import TestClient
from openapi_spec_validator import validate
from starlette.routing import Match

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import (
    Auth,
    CurrentUser,
    add_security_schemes,
    current_user,
    guard_routes,
    hash_api_key,
    new_api_key,
    optional_user,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.openapi import add_problem_schemas
from fastapi_prodkit.sections import AuthSettings

KEY = new_api_key()
KEYS = AuthSettings(api_keys=(f"bot {hash_api_key(KEY)}",))
ANY_KEY = [{"ApiKey": []}]
CHALLENGE = {"WWW-Authenticate": {"$ref": "#/components/headers/WWW-Authenticate"}}
PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


@pytest.fixture
def app():
    """An app that accepts API keys, made by create_app."""
    return create_app(Settings(environment="test", docs={}, auth=KEYS))


async def answer(): ...


def document(app):
    """Return the schema as a client gets it."""
    schema = TestClient(app).get("/openapi.json", headers={"X-API-Key": KEY}).json()
    validate(schema)
    return schema


def operation_of(app, path="/", method="get"):
    return document(app)["paths"][path][method]


def refusals(operation):
    return operation["responses"].keys() & {"401", "403"}


# How credentials are sent


def test_api_key_is_described(app):
    """As the header that browsers and programs send."""
    app.get("/")(answer)

    schemes = document(app)["components"]["securitySchemes"]

    assert schemes == {
        "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
    }


def test_secret_is_a_bearer_token():
    """A JWT."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    app = create_app(Settings(environment="test", docs={}, auth={"secret": "s" * 32}))

    [(name, scheme)] = document(app)["components"]["securitySchemes"].items()

    assert (name, scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("AccessToken", "http", "bearer", "JWT")


def test_issuers_are_described_by_their_discovery_documents():
    """Beside the token that a caller already has; nothing is asked of the issuers."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    issuers = ("https://one.example.com/", "https://two.example.com/realm")
    settings = Settings(environment="test", docs={}, auth={"issuer": issuers, "audience": ("orders",)})
    app = create_app(settings)
    app.get("/")(answer)

    schema = document(app)

    schemes = schema["components"]["securitySchemes"]
    assert {name: scheme.get("openIdConnectUrl") for name, scheme in schemes.items()} == {
        "AccessToken": None,
        "SignIn": "https://one.example.com/.well-known/openid-configuration",
        "SignIn2": "https://two.example.com/realm/.well-known/openid-configuration",
    }
    assert schema["paths"]["/"]["get"]["security"] == [{"AccessToken": []}, {"SignIn": []}, {"SignIn2": []}]


@pytest.mark.parametrize(
    ("dpop", "schemes"),
    [("allowed", ["AccessToken", "SignIn", "BoundToken"]), ("required", ["BoundToken"])],
)
def test_bound_tokens_are_described(dpop, schemes):
    """Where they are required, a sign-in whose token is sent as a bearer token is of no use."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    auth = {"issuer": ("https://one.example.com/",), "audience": ("orders",), "dpop": dpop}
    app = create_app(Settings(environment="test", docs={}, auth=auth))
    app.get("/")(answer)

    schema = document(app)

    assert list(schema["components"]["securitySchemes"]) == schemes
    assert schema["paths"]["/"]["get"]["security"] == [{name: []} for name in schemes]


def test_scheme_of_the_app_with_the_same_name_stays(app):
    """Ours gets another name."""

    @app.get("/")
    @public
    async def read(_: Annotated[str, Security(APIKeyHeader(name="X-Own", scheme_name="ApiKey"))]): ...

    app.get("/ours")(answer)

    schema = document(app)

    assert {name: each["name"] for name, each in schema["components"]["securitySchemes"].items()} == {
        "ApiKey": "X-Own",
        "ProdkitApiKey": "X-API-Key",
    }
    assert schema["paths"]["/"]["get"]["security"] == [{"ApiKey": []}]
    assert schema["paths"]["/ours"]["get"]["security"] == [{"ProdkitApiKey": []}]


# Where they are needed


def test_route_needs_a_caller(app):
    """The 401 has a challenge, and looks like other errors."""
    app.get("/")(answer)

    operation = operation_of(app)

    assert operation["security"] == ANY_KEY
    assert operation["responses"]["401"] == {
        "description": "There are no credentials, or they are refused.",
        "headers": CHALLENGE,
        "content": PROBLEM,
    }
    assert refusals(operation) == {"401"}


@pytest.mark.parametrize("where", ["endpoint", "router", "outer router"])
def test_public_route_needs_nothing(app, where):
    """And has no 401, wherever the mark is."""
    router, outer = APIRouter(), APIRouter()
    router.get("/")(public(lambda: "") if where == "endpoint" else answer)
    outer.include_router(public(router) if where == "router" else router)
    app.include_router(public(outer) if where == "outer router" else outer)

    operation = operation_of(app)

    assert operation["security"] == []
    assert refusals(operation) == set()


def test_required_scopes_are_listed(app):
    """With the 403 and its challenge."""
    scopes = [Depends(require_scopes("b", "a")), Depends(require_scopes("c"))]
    app.get("/", dependencies=scopes)(answer)

    operation = operation_of(app)

    assert operation["security"] == [{"ApiKey": ["a", "b", "c"]}]
    assert operation["responses"]["403"] == {
        "description": "The caller does not have the scopes a and b and the scope c.",
        "headers": CHALLENGE,
        "content": PROBLEM,
    }


def test_any_of_several_scopes_are_alternatives(app):
    """Each is enough, with those that are needed anyway."""
    scopes = [Depends(require_scopes("a", "b", match="any")), Depends(require_scopes("c"))]
    app.get("/", dependencies=scopes)(answer)

    assert operation_of(app)["security"] == [{"ApiKey": ["a", "c"]}, {"ApiKey": ["b", "c"]}]


def test_required_role_is_not_a_scope(app):
    """Its 403 has no challenge, because no other token would have it."""
    app.get("/", dependencies=[Depends(require_roles("admin", "owner", match="any"))])(answer)

    operation = operation_of(app)

    assert operation["security"] == ANY_KEY
    assert operation["responses"]["403"]["description"] == "The caller does not have the roles admin or owner."
    assert "headers" not in operation["responses"]["403"]


def test_public_route_with_a_requirement_needs_a_caller(app):
    """As the guard decides."""
    router = APIRouter(dependencies=[Depends(require_roles("admin"))])
    router.get("/")(public(lambda: ""))
    app.include_router(router)

    operation = operation_of(app)

    assert operation["security"] == ANY_KEY
    assert refusals(operation) == {"401", "403"}


def test_public_route_that_asks_for_the_caller_needs_one(app):
    """Its dependency refuses a request without."""
    auth = app.state.auth

    @app.get("/")
    @public
    async def typed(user: CurrentUser): ...

    app.get("/bound", dependencies=[Depends(auth.current_user)])(public(lambda: ""))

    assert operation_of(app)["security"] == operation_of(app, "/bound")["security"] == ANY_KEY


def test_caller_may_be_optional(app):
    """Then wrong credentials are refused, and none are fine."""
    app.get("/", dependencies=[Depends(app.state.auth.authenticate)])(public(lambda: ""))

    operation = operation_of(app)

    assert operation["security"] == [{}, *ANY_KEY]
    assert refusals(operation) == {"401"}


def test_caller_is_optional_by_default_if_the_settings_say_so():
    """And required where a rule or a dependency demands one."""
    app = create_app(Settings(environment="test", docs={}, auth={"api_keys": KEYS.api_keys, "default": "optional"}))
    app.get("/")(answer)
    app.get("/known", dependencies=[Depends(optional_user)])(public(lambda: ""))
    app.get("/open")(public(lambda: ""))
    app.get("/me", dependencies=[Depends(current_user)])(answer)
    app.get("/role", dependencies=[Depends(require_roles("admin"))])(answer)

    paths = document(app)["paths"]

    assert {path: item["get"]["security"] for path, item in paths.items()} == {
        "/": [{}, *ANY_KEY],
        "/known": [{}, *ANY_KEY],
        "/open": [],
        "/me": ANY_KEY,
        "/role": ANY_KEY,
    }


def test_own_scheme_of_a_route_is_needed_as_well(app):
    """As the guard asks first, and then its dependency."""
    app.get("/", dependencies=[Depends(HTTPBearer())])(answer)

    assert operation_of(app)["security"] == [{"HTTPBearer": [], "ApiKey": []}]


def test_own_responses_stay(app):
    """The header is added."""
    own = {"description": "Who are you?", "content": {"text/plain": {}}}
    app.get("/", responses={401: own})(answer)
    app.get("/other", responses={401: {"$ref": "#/components/responses/Own"}})(answer)
    app.openapi()["components"]["responses"] = {"Own": {"description": "Own"}}

    assert operation_of(app)["responses"]["401"] == {**own, "headers": CHALLENGE}
    assert operation_of(app, "/other")["responses"]["401"]["$ref"] == "#/components/responses/Own"
    assert "headers" not in operation_of(app, "/other")["responses"]["401"]


def test_included_and_later_routes_are_described(app):
    """By their full paths, and of each method."""
    router, outer = APIRouter(), APIRouter(prefix="/v1")
    router.add_api_route("/items/{item_id}", lambda item_id: item_id, methods=["GET", "DELETE"])
    outer.include_router(router, prefix="/shop")
    app.include_router(outer)
    before = document(app)
    app.get("/later")(answer)
    after = document(app)

    item = before["paths"]["/v1/shop/items/{item_id}"]
    assert {method: operation["security"] for method, operation in item.items()} == {"get": ANY_KEY, "delete": ANY_KEY}
    assert after["paths"]["/later"]["get"]["security"] == ANY_KEY


def test_hidden_routes_and_routes_of_starlette_are_left_out(app):
    """As FastAPI leaves them out."""
    app.get("/", include_in_schema=False)(answer)
    app.router.add_route("/plain", answer)
    app.router.add_websocket_route("/ws", answer)

    assert document(app)["paths"] == {}


def test_first_of_several_routes_decides(app):
    """Because it serves the requests."""
    app.get("/")(answer)
    app.get("/")(public(lambda: ""))

    assert operation_of(app)["security"] == ANY_KEY


def test_public_route_behind_one_that_only_the_router_knows_needs_a_caller(app):
    """The guard does not find it."""

    class OwnRoute(APIRoute):
        def matches(self, scope):
            return Match.NONE, {}

    app.router.routes.append(OwnRoute("/own", answer))
    app.get("/")(public(lambda: ""))

    assert operation_of(app)["security"] == ANY_KEY


def test_mounted_app_describes_itself(app):
    """After the first request for it, which may be one for its schema; a public one needs nothing."""
    inner, open_to_all = FastAPI(), FastAPI()
    for each in (inner, open_to_all):
        each.get("/")(answer)
    app.mount("/inner", inner)
    app.mount("/open", public(open_to_all))
    client = TestClient(app, headers={"X-API-Key": KEY})

    operations = [client.get(f"/{name}/openapi.json").json()["paths"]["/"]["get"] for name in ("inner", "open")]

    assert [each.get("security") for each in operations] == [ANY_KEY, None]
    assert operations[0]["responses"]["401"].keys() == {"description", "headers"}


def test_webhooks_are_unchanged(app):
    """Other services answer them."""

    @app.webhooks.post("order-shipped")
    async def shipped(): ...

    assert "security" not in document(app)["webhooks"]["order-shipped"]["post"]


# How it is added


def test_schema_is_described_once(app):
    """It is FastAPI's cached one."""
    app.get("/", dependencies=[Depends(require_scopes("a", "b", match="any"))])(answer)

    first = app.openapi()
    security = [*first["paths"]["/"]["get"]["security"]]

    assert app.openapi() is first
    assert first["paths"]["/"]["get"]["security"] == security


def test_order_with_the_problems_does_not_matter():
    """The 401 looks like them in any case."""
    app = FastAPI()
    app.get("/")(answer)
    add_problem_schemas(app)
    guard_routes(app, Auth(KEYS))

    schema = app.openapi()

    validate(schema)
    assert schema["paths"]["/"]["get"]["responses"]["401"]["content"] == PROBLEM


def test_override_of_the_schema_works(app):
    """With a call after it."""
    app.get("/")(answer)
    app.openapi = lambda: get_openapi(title="Own", version="1", routes=app.routes)
    add_security_schemes(app, app.state.auth)

    schema = document(app)

    assert schema["info"]["title"] == "Own"
    assert schema["paths"]["/"]["get"]["security"] == ANY_KEY
