"""Swagger UI, from the package `fastapi-swagger`, under the strictest Content-Security-Policy with which it works."""

import html
import re
from base64 import b64encode
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

__all__ = ["docs_router"]

_PATH = "/docs"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon-32x32.png": "image/png"}
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


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
