"""Swagger UI, from the package `fastapi-swagger`, under the strictest Content-Security-Policy with which it works."""

import html
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html, get_swagger_ui_oauth2_redirect_html
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LabelledRoute, route_path
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.openapi.operation_ids import METHODS

__all__ = ["docs_router"]

_PATH = "/docs"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon-32x32.png": "image/png"}
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def docs_router(app: FastAPI, *, token_endpoints: Callable[[], Iterable[str]] = tuple) -> APIRouter:
    """Return a router that serves Swagger UI for the app at `/docs`, and loads nothing from other hosts.

    Title, schema address, `swagger_ui_parameters` and `swagger_ui_init_oauth` are the app's own. Each page sends the
    strictest Content-Security-Policy under which it works: the page's one inline script is allowed by its hash, and
    requests go to the service itself, and to the servers, the OAuth2 endpoints and the OpenID issuers that the schema
    names. A sign-in at an issuer asks for the scopes that operations require, if `swagger_ui_init_oauth` has no others.

    The routes are plain Starlette routes, as FastAPI's own are: dependencies of the app do not run for them. The pages
    hold nothing confidential; the schema, which they load, may.

    Args:
        app: The app that is documented.
        token_endpoints: Returns the token endpoints that the discovery documents of issuers name, as far as they are
            known; asked for each page.

    Raises:
        ConfigurationError: The app has no schema, or FastAPI serves its own page at `/docs`.
    """
    if app.openapi_url is None:
        raise ConfigurationError("openapi_url is None, so there is no schema to show; leave out docs_router as well")
    if app.docs_url == _PATH:
        raise ConfigurationError("docs_url is set, so FastAPI's page answers /docs first; pass FastAPI(docs_url=None)")
    pages = _SwaggerUI(app, token_endpoints)
    for page in (pages.docs, pages.oauth2_redirect, pages.asset):
        vars(page)[_scope.ENDPOINT_NO_DEFAULT_LIMIT] = True  # one page takes several requests
    return APIRouter(
        routes=[
            LabelledRoute(_PATH, pages.docs),
            LabelledRoute(f"{_PATH}/oauth2-redirect", pages.oauth2_redirect),
            *(LabelledRoute(f"{_PATH}/assets/{name}", pages.asset, name=name) for name in _ASSETS),
        ]
    )


class _SwaggerUI:
    """Serve the page, the files that it loads, and the page to which an OAuth2 login redirects."""

    def __init__(self, app: FastAPI, token_endpoints: Callable[[], Iterable[str]]) -> None:
        self._app = app
        self._token_endpoints = token_endpoints
        self._assets = Path(str(resources.files("fastapi_swagger"))) / "resources"
        self._version = metadata.version("fastapi-swagger")

    async def docs(self, request: Request) -> Response:
        # Quoted, because a mount such as /{tenant} puts a value of the client into root_path, and so into the script.
        root = quote(request.scope.get("root_path", "").rstrip("/"))
        here = root + quote(route_path(request.scope))
        app = self._app
        schema = app.openapi()
        response = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=html.escape(app.title),
            swagger_js_url=f"{here}/assets/swagger-ui-bundle.js?v={self._version}",
            swagger_css_url=f"{here}/assets/swagger-ui.css?v={self._version}",
            swagger_favicon_url=f"{here}/assets/favicon-32x32.png?v={self._version}",
            oauth2_redirect_url=f"{here}/oauth2-redirect",
            init_oauth=_init_oauth(app, schema),
            swagger_ui_parameters={"persistAuthorization": True, **(app.swagger_ui_parameters or {})},
        )
        called = " ".join(["'self'", *_origins([*_called(schema), *self._token_endpoints()])])
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
        name = request.scope["path"].rpartition("/")[2].removesuffix("\n")  # which the pattern of a route allows
        # The URL contains the version, so its content never changes.
        lasting = {"cache-control": "public, max-age=31536000, immutable"}
        return FileResponse(self._assets / name, headers=lasting, media_type=_ASSETS[name])


def _hashes(page: Response) -> str:
    """Return the page's inline scripts as a Content-Security-Policy names them (CSP Level 3, section 2.3.1)."""
    scripts = re.findall(rb"<script>(.*?)</script>", page.body, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(script).digest()).decode()}'" for script in scripts)


def _init_oauth(app: FastAPI, schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the app's `swagger_ui_init_oauth`; without `scopes` in it, those that operations require of OpenID tokens.

    The page lists the scopes that an issuer supports, and these are seldom those of an API.
    """
    if app.swagger_ui_init_oauth is None:
        return None
    schemes = schema.get("components", {}).get("securitySchemes", {})
    openid = {name for name, scheme in schemes.items() if scheme.get("type") == "openIdConnect"}
    required = {
        scope
        for item in schema.get("paths", {}).values()
        for method in item.keys() & METHODS
        for alternative in item[method].get("security", [])
        for name in alternative.keys() & openid
        for scope in alternative[name]
    }
    asked = {"scopes": sorted(required)} if required else {}
    return {**asked, **app.swagger_ui_init_oauth}


def _called(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the URLs that the page calls: those of servers, of OAuth2 tokens, and of OpenID configurations."""
    for server in schema.get("servers", []):
        yield server.get("url", "")
    for scheme in schema.get("components", {}).get("securitySchemes", {}).values():
        yield scheme.get("openIdConnectUrl", "")
        for flow in scheme.get("flows", {}).values():
            yield from (flow.get("tokenUrl", ""), flow.get("refreshUrl", ""))


def _origins(urls: Iterable[str]) -> list[str]:
    """Return the origins of URLs, except of those that have none."""
    matches = (re.match(r"https?://[\w.:\[\]-]+(?=[/?#]|$)", url, re.ASCII) for url in urls)
    return sorted({match[0] for match in matches if match})
