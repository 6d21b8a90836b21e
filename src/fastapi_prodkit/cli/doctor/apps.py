"""Walk an app: the apps that are mounted in it, and the endpoints of each."""

from collections.abc import Iterator
from typing import Any

from fastapi.routing import RouteContext, iter_route_contexts
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router

from fastapi_prodkit.cli.doctor.loading import unwrap

__all__ = ["apps", "endpoints", "module_of"]


def apps(app: Starlette | None) -> Iterator[tuple[str, Starlette]]:
    """Yield the app and all mounted apps, with their paths; nothing without an app."""
    if app is not None:
        yield from _walk(app, "")


def endpoints(app: Starlette | Router, prefix: str = "") -> Iterator[tuple[str, Any, RouteContext]]:
    """Yield the path, the endpoint and the context of each route, including those of mounted routers."""
    for context in iter_route_contexts(app.routes):
        route: Any = context.original_route
        path = f"{prefix}{context.path or ''}"
        mounted = unwrap(route.app) if isinstance(route, Mount | Host) else None
        if isinstance(mounted, Router):
            yield from endpoints(mounted, path)
        else:
            yield path, mounted or getattr(route, "endpoint", None), context


def module_of(thing: Any) -> str:
    """Return the name of the module that defines a class, a function, or the class of an object; empty if unknown."""
    return getattr(thing, "__module__", None) or ""


def _walk(app: Starlette, prefix: str) -> Iterator[tuple[str, Starlette]]:
    yield prefix, app
    for path, endpoint, _ in endpoints(app):
        if isinstance(endpoint, Starlette):
            yield from _walk(endpoint, prefix + path)
