"""Find the endpoints that are exempt from the default limit, which is checked before routing."""

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from fastapi.routing import RouteContext, iter_route_contexts
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import route_path, routes_inside
from fastapi_prodkit._routing.ahead import endpoint_of

__all__ = ["ExemptEndpoints", "exempt_from_all", "exempt_from_default", "is_exempt"]

# Attributes of an endpoint; a decorator that wraps it with functools.wraps copies them.
_NO_DEFAULT, _NO_LIMIT = _scope.ENDPOINT_NO_DEFAULT_LIMIT, _scope.ENDPOINT_NO_LIMIT
_LIMIT_ELSEWHERE = _scope.ENDPOINT_LIMIT_ELSEWHERE

_logger = logging.getLogger("fastapi_prodkit.rate_limit")


def exempt_from_default(endpoint: Any) -> None:
    """Exempt an endpoint from the default limit."""
    vars(endpoint)[_NO_DEFAULT] = True


def exempt_from_all(endpoint: Any) -> None:
    """Exempt an endpoint from every limit, including limits that already wrap it."""
    while endpoint is not None:
        vars(endpoint).update({_NO_LIMIT: True, _NO_DEFAULT: True})
        endpoint = getattr(endpoint, "__wrapped__", None)


def is_limited(endpoint: Any) -> bool:
    """Return whether the limits of an endpoint count."""
    return _NO_LIMIT not in vars(endpoint)


def limited_elsewhere(endpoint: Any, limited: Any) -> None:
    """Mark an endpoint whose limit is in the wrapper: a route to the unwrapped endpoint has no limit."""
    vars(endpoint)[_LIMIT_ELSEWHERE] = True
    vars(limited).pop(_LIMIT_ELSEWHERE, None)


class ExemptEndpoints:
    """Tell whether a request is for an exempt endpoint or for `StaticFiles`.

    The routes are read at the first request, after start-up; routes added later are not known. It logs a warning for a
    limit that is written above the route's decorator, where it has no effect.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app

    def __call__(self, scope: Scope) -> bool:
        """Return whether the request of the scope is exempt."""
        possible = self._possible
        if possible is None or possible.fullmatch(route_path(scope)) is None:
            return False
        return is_exempt(endpoint_of(self._app, scope))  # slow without an index: this is routing

    @cached_property
    def _possible(self) -> re.Pattern[str] | None:
        """A regular expression that matches the paths of exempt endpoints; None if there are none."""
        paths = [path for path, endpoint in _walk(self._app.routes, "") if is_exempt(endpoint)]
        return re.compile("|".join(_pattern(path) for path in paths)) if paths else None


def is_exempt(endpoint: Any) -> bool:
    """Return whether an endpoint, or a mounted app, is exempt from the default limit."""
    return hasattr(endpoint, _NO_DEFAULT) or _is_static(endpoint)


def _is_static(endpoint: Any) -> bool:
    """Return whether an endpoint is `StaticFiles`, possibly inside middleware."""
    while endpoint is not None and not isinstance(endpoint, StaticFiles):
        endpoint = getattr(endpoint, "app", None)
    return endpoint is not None


def _walk(routes: Sequence[BaseRoute], prefix: str) -> Iterator[tuple[str, Any]]:
    for context in iter_route_contexts(routes):
        path = f"{prefix}{context.path or ''}"
        if hasattr(context.original_route, "routes"):
            yield f"{path}/{{path}}", context.original_route.app  # type: ignore[attr-defined]  # a mount or a host
            yield from _walk(routes_inside(context.original_route), path)
        elif context.endpoint is not None:
            _report(context, path)
            yield path, context.endpoint


def _report(context: RouteContext, path: str) -> None:
    marks = getattr(context.endpoint, "__dict__", {})
    if _LIMIT_ELSEWHERE in marks:
        del marks[_LIMIT_ELSEWHERE]
        _logger.warning("the limit of %s has no effect: put its decorator below that of the route", path)


def _pattern(template: str) -> str:
    """Return a regular expression that matches at least the paths of a path template."""
    parts = re.split(r"(\{[^}]*\})", template.removesuffix("/") or "/")
    return "".join(".*" if part.startswith("{") else re.escape(part) for part in parts)
