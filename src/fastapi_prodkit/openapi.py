"""API docs that work offline under a strict Content-Security-Policy, and a schema that generates good clients.

Three independent parts: `docs_router` serves Swagger UI from the package `fastapi-swagger`, `operation_id` names the
operations, and `add_problem_schemas` makes the schema show errors as they are sent. There is no ReDoc: it needs
workers and styles that a strict policy forbids, and shows nothing that Swagger UI does not.
"""

import copy
import html
import json
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from hashlib import sha256
from http import HTTPStatus
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.docs import get_swagger_ui_html, get_swagger_ui_oauth2_redirect_html
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LabelledRoute, route_path
from fastapi_prodkit._problem import MEDIA_TYPE
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["add_problem_schemas", "docs_router", "operation_id"]

_PATH = "/docs"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon-32x32.png": "image/png"}
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")  # OpenAPI 3.1.1, section 4.8.9
_COMPONENTS = "#/components/schemas/"
_FASTAPI_422 = {"application/json": {"schema": {"$ref": f"{_COMPONENTS}HTTPValidationError"}}}

_PROBLEM: dict[str, Any] = {
    "title": "Problem",
    "description": "What went wrong (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "Identifies the kind of problem."},
        "title": {"type": "string", "description": "Names the kind of problem."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599, "description": "The HTTP status code."},
        "detail": {"type": "string", "description": "Explains this occurrence."},
        "instance": {"type": "string", "format": "uri-reference", "description": "The path of the request."},
        "request_id": {"type": "string", "description": "The id under which the service logged the request."},
    },
}
_INVALID_FIELD = {
    "title": "InvalidField",
    "type": "object",
    "required": ["loc", "msg", "type"],
    "properties": {
        "loc": {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "description": "Where the value is: body, query, path, header or cookie, then the keys that lead to it.",
        },
        "msg": {"type": "string", "description": "What is wrong with the value."},
        "type": {"type": "string", "description": "Identifies the kind of error."},
    },
}
_VALIDATION_PROBLEM = {
    **_PROBLEM,
    "title": "ValidationProblem",
    "description": "The request is not valid for this operation.",
    "required": [*_PROBLEM["required"], "errors"],
    "properties": {**_PROBLEM["properties"], "errors": {"type": "array", "items": _INVALID_FIELD}},
}


def docs_router(app: FastAPI) -> APIRouter:
    """Return a router that serves Swagger UI for the app at `/docs`, and loads nothing from other hosts.

    Title, schema address, `swagger_ui_parameters` and `swagger_ui_init_oauth` are the app's own. Each page sends the
    strictest Content-Security-Policy under which it works: the page's one inline script is allowed by its hash, and
    requests go to the service itself and to the servers and OAuth2 endpoints that the schema names.

    The routes are plain Starlette routes, as FastAPI's own are: dependencies of the app do not run for them. The pages
    hold nothing confidential; the schema, which they load, may.

    Raises:
        ConfigurationError: The app has no schema, or FastAPI serves its own page at `/docs`.
    """
    if app.openapi_url is None:
        raise ConfigurationError("openapi_url is None, so there is no schema to show; leave out docs_router as well")
    if app.docs_url == _PATH:
        raise ConfigurationError("docs_url is set, so FastAPI's page answers /docs first; pass FastAPI(docs_url=None)")
    pages = _SwaggerUI(app)
    for page in (pages.docs, pages.oauth2_redirect, pages.asset):
        vars(page)[_scope.ENDPOINT_NO_DEFAULT_LIMIT] = True  # one page takes several requests
    return APIRouter(
        routes=[
            LabelledRoute(_PATH, pages.docs),
            LabelledRoute(f"{_PATH}/oauth2-redirect", pages.oauth2_redirect),
            *(LabelledRoute(f"{_PATH}/assets/{name}", pages.asset, name=name) for name in _ASSETS),
        ]
    )


def operation_id(route: APIRoute) -> str:
    """Name an operation `{first tag}_{function name}`, such as `items_create`; without a tag, by its function.

    Pass it as `FastAPI(generate_unique_id_function=operation_id)`. Client generators name methods after operations. The
    name does not contain the path, so a change of the path does not change it. The tags of the outermost
    `include_router` come first, so tags on the routers are enough to keep equal function names apart.
    """
    words = [word.value if isinstance(word, Enum) else word for word in route.tags[:1]]
    return "_".join(re.sub(r"\W+", "_", word).strip("_") for word in [*map(str.lower, words), route.name])


def add_problem_schemas(app: FastAPI) -> None:
    """Make the app's schema show errors as `add_problem_handlers` sends them, and keep operation ids apart.

    Each operation gets a `default` response `Problem`, its 422 becomes a `ValidationProblem`, and error responses
    that were declared without content get `Problem`; those with content stay as they are. The `statuses` of a
    dependency, such as a rate limit's 429, are shown on the routes that depend on it. If operations share an id, their
    method is added to it, and their path if it differs. Webhooks stay as they are, because other services answer them.

    This wraps `app.openapi`, even if the app overrides it; call it again if the override is set later. The problems
    are added once to each schema that is built.
    """
    if not isinstance(app.openapi, _ProblemSchema):
        app.openapi = _ProblemSchema(app.openapi, app)  # type: ignore[method-assign] # FastAPI's documented way


class _SwaggerUI:
    """Serve the page, the files that it loads, and the page to which an OAuth2 login redirects."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._assets = Path(str(resources.files("fastapi_swagger"))) / "resources"
        self._version = metadata.version("fastapi-swagger")

    async def docs(self, request: Request) -> Response:
        # Quoted, because a mount such as /{tenant} puts a value of the client into root_path, and so into the script.
        root = quote(request.scope.get("root_path", "").rstrip("/"))
        here = root + quote(route_path(request.scope))
        app = self._app
        response = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=html.escape(app.title),
            swagger_js_url=f"{here}/assets/swagger-ui-bundle.js?v={self._version}",
            swagger_css_url=f"{here}/assets/swagger-ui.css?v={self._version}",
            swagger_favicon_url=f"{here}/assets/favicon-32x32.png?v={self._version}",
            oauth2_redirect_url=f"{here}/oauth2-redirect",
            init_oauth=app.swagger_ui_init_oauth,
            swagger_ui_parameters={"persistAuthorization": True, **(app.swagger_ui_parameters or {})},
        )
        called = " ".join(["'self'", *_origins(app.openapi())])
        response.headers["content-security-policy"] = (
            f"{_POLICY}; script-src 'self' {_hashes(response)}; style-src 'self'; "
            # Swagger UI shows an image in the response of an operation with a blob: URL.
            f"img-src 'self' data: blob:; connect-src {called}"
        )
        # An OAuth2 login opens a popup on another origin, which at the end needs access to its opener.
        response.headers["cross-origin-opener-policy"] = "same-origin-allow-popups"
        return response

    async def oauth2_redirect(self, _: Request) -> Response:
        response = get_swagger_ui_oauth2_redirect_html()
        response.headers["content-security-policy"] = f"{_POLICY}; script-src {_hashes(response)}"
        response.headers["cross-origin-opener-policy"] = "unsafe-none"
        return response

    async def asset(self, request: Request) -> Response:
        name = request.scope["path"].rpartition("/")[2]
        # The URL contains the version, so its content never changes.
        lasting = {"cache-control": "public, max-age=31536000, immutable"}
        return FileResponse(self._assets / name, headers=lasting, media_type=_ASSETS[name])


class _ProblemSchema:
    """Build the schema with the original function, and add the problems to it once."""

    def __init__(self, build: Callable[[], dict[str, Any]], app: FastAPI) -> None:
        self._build = build
        self._app = app
        self._completed: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate Operation ID")  # _name_operations makes the ids unique
            schema = self._build()
        if schema is not self._completed:
            _name_operations(schema)
            _declare(schema, self._app.routes)
            _show_problems(schema)
            self._completed = schema
        return schema


def _name_operations(schema: dict[str, Any]) -> None:
    """Make operation ids unique: add the method, and the path if operations of one id have different paths.

    All operations of one id get the longer name, so that no name depends on their order.
    """
    places = [
        (path, method, item[method])
        for path, item in schema.get("paths", {}).items()
        for method in _METHODS
        if "operationId" in item.get(method, {})
    ]
    paths: dict[str, list[str]] = {}
    for path, _, operation in places:
        paths.setdefault(operation["operationId"], []).append(path)
    for path, method, operation in places:
        name = operation["operationId"]
        if len(paths[name]) > 1:
            where = "" if len(set(paths[name])) == 1 else "_" + re.sub(r"\W+", "_", path).strip("_")
            operation["operationId"] = f"{name}{where}_{method}"


def _declare(schema: dict[str, Any], routes: Sequence[BaseRoute]) -> None:
    """Add the responses that dependencies declare in an attribute `statuses`, such as a rate limit's 429."""
    for context in iter_route_contexts(routes):
        if not isinstance(context.original_route, APIRoute):
            continue
        item = schema.get("paths", {}).get(context.path_format, {})
        for operation in (item.get(method.lower()) for method in context.methods or ()):
            for status in _statuses(context.dependant) if operation is not None else ():
                operation["responses"].setdefault(str(status), {"description": HTTPStatus(status).phrase})


def _statuses(dependant: Dependant) -> Iterator[int]:
    yield from getattr(dependant.call, "statuses", ())
    for each in dependant.dependencies:
        yield from _statuses(each)


def _show_problems(schema: dict[str, Any]) -> None:
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    problem = _component(schemas, "Problem", _PROBLEM)
    validation_problem = _component(schemas, "ValidationProblem", _VALIDATION_PROBLEM)
    for item in schema.get("paths", {}).values():
        for method in item.keys() & _METHODS:
            responses = item[method].setdefault("responses", {})
            for status, response in responses.items():
                if response.get("content") == _FASTAPI_422:
                    response["content"] = _content(validation_problem)
                elif status[0] in "45" and not response.keys() & {"content", "$ref"}:
                    response["content"] = _content(problem)
            responses.setdefault("default", {"description": "Error", "content": _content(problem)})
    for name in ("HTTPValidationError", "ValidationError"):
        if f'"{_COMPONENTS}{name}"' not in json.dumps(schema):
            schemas.pop(name, None)


def _component(schemas: dict[str, Any], name: str, definition: dict[str, Any]) -> str:
    """Add the definition, under another name if the service has a model of that name, and return its name."""
    if schemas.setdefault(name, copy.deepcopy(definition)) == definition:
        return name
    return _component(schemas, f"Prodkit{name}", definition)


def _content(name: str) -> dict[str, Any]:
    return {MEDIA_TYPE: {"schema": {"$ref": f"{_COMPONENTS}{name}"}}}


def _hashes(page: Response) -> str:
    """Return the page's inline scripts as a Content-Security-Policy names them (CSP Level 3, section 2.3.1)."""
    scripts = re.findall(rb"<script>(.*?)</script>", page.body, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(script).digest()).decode()}'" for script in scripts)


def _origins(schema: dict[str, Any]) -> list[str]:
    """Return the other origins that the page calls: those of the servers and of the OAuth2 token URLs."""
    urls = [server.get("url", "") for server in schema.get("servers", [])]
    for scheme in schema.get("components", {}).get("securitySchemes", {}).values():
        urls.append(scheme.get("openIdConnectUrl", ""))
        for flow in scheme.get("flows", {}).values():
            urls += [flow.get("tokenUrl", ""), flow.get("refreshUrl", "")]
    matches = (re.match(r"https?://[\w.:\[\]-]+(?=[/?#]|$)", url, re.ASCII) for url in urls)
    return sorted({match[0] for match in matches if match})
