"""The template of the route that a refused request was for."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi.routing import iter_route_contexts
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LONGEST_LOGGED_PATH, UNMATCHED, header, mount_prefixes, routes_inside
from fastapi_prodkit._routing.ahead import ask_index

__all__ = ["requested_template"]

_MOST_TEMPLATES: Final = 256  # that are cached


def requested_template(scope: Scope, root_path: str) -> str:
    """Return the template of the route for a request that was refused before routing.

    The method only decides between routes of the same path: a preflight has another method than the request that it
    asks for. An index of the routes is asked first. What it does not know, such as the routes in a mount, is searched
    for; results are cached on the app, so that a flood of refused requests does not cost a search each time.

    Args:
        scope: The scope that was passed to the app.
        root_path: `scope["root_path"]` as it was before the call.
    """
    mounted = scope.get("root_path", "")[len(root_path) :]
    app, path = scope.get("app"), scope["path"]
    if not isinstance(app, Starlette) or len(path) > LONGEST_LOGGED_PATH:
        return UNMATCHED
    if mounted and mounted not in mount_prefixes(scope["router"]):
        return UNMATCHED
    found = ask_index(app, scope)
    if found is not None:
        entry, _, _ = found
        if entry is None:
            return UNMATCHED
        if entry.is_final:
            return f"{mounted}{entry.template}"
    known: dict[Any, str] = vars(app).setdefault(_scope.APP_TEMPLATES, {})
    key = scope["type"], scope.get("method"), header(scope["headers"], b"host"), path, mounted, len(app.routes)
    if key not in known:
        if len(known) >= _MOST_TEMPLATES:
            known.clear()
        known[key] = _template_of(app.routes, scope, mounted)
    return known[key]


def _template_of(routes: Sequence[BaseRoute], scope: Scope, prefix: str) -> str:
    scope = {**scope, "fastapi": {}}  # matching writes into this entry
    other_method = UNMATCHED
    for context in iter_route_contexts(routes):
        match, found = context.matches(scope)
        if match is Match.NONE:
            continue
        path = f"{prefix}{context.path or ''}"
        if hasattr(context.original_route, "routes"):
            inside = routes_inside(context.original_route)
            return UNMATCHED if "{" in path else _template_of(inside, {**scope, **found}, path)
        path = f"{prefix}{context.path_format or context.path}"
        if match is Match.FULL:
            return path
        other_method = path if other_method == UNMATCHED else other_method
    return other_method
