"""Expose the status of a handler's response to dependencies that end before the response is sent.

FastAPI injects one `Response` into the dependencies and the handler of a request. Its status is used unless the handler
returns its own response, which dependencies cannot see. So the endpoint of a route is wrapped, once. The wrapper copies
the status of the returned response to the injected one, at a time when FastAPI no longer reads it.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from fastapi import Response, routing
from fastapi.datastructures import DefaultPlaceholder
from starlette.types import Scope

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import chosen_route
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["expose_response_status"]

_INJECTED = "fastapi_prodkit_response"  # parameter for the injected response, if the endpoint has none

_Endpoint = Callable[..., Any]


def expose_response_status(scope: Scope, sessions: Collection[_Endpoint]) -> None:
    """Make the injected response of a request have the status of the response that the handler returns.

    Called by a dependency before the handler. After the handler, the injected response has the status of the returned
    response; else the one it was given; else the one the route declares. After an exception its status is 500. A
    generator has only started by then. Changes of the response by the app's own `APIRoute` come later and are not seen.

    Args:
        scope: Scope of the request. Does nothing for a WebSocket, or for a route that is not FastAPI's.
        sessions: Dependencies that have to end before the response is sent.

    Raises:
        ConfigurationError: One of these dependencies would end after the response, in this route.
    """
    route = chosen_route(scope)
    dependant = getattr(route, "dependant", None)
    if dependant is None or hasattr(dependant.call, _scope.ENDPOINT_STATUS) or scope["type"] != "http":
        return
    _refuse_late_ends(dependant, sessions)
    _wrap(route)


def _refuse_late_ends(dependant: Any, sessions: Collection[_Endpoint]) -> None:
    for each in dependant.dependencies:
        if each.call in sessions and each.scope != "function":
            raise ConfigurationError(
                f"Depends({each.call.__name__}) would commit after the response has left: add scope='function'"
            )
        _refuse_late_ends(each, sessions)


def _wrap(route: Any) -> None:
    dependant = route.dependant
    asked_for = dependant.response_param_name is not None
    dependant.response_param_name = dependant.response_param_name or _INJECTED
    name, endpoint, declared = dependant.response_param_name, dependant.call, _declared_status(route)

    @functools.wraps(endpoint)
    def call(**values: Any) -> Any:
        response: Response = values[name] if asked_for else values.pop(name)
        try:
            returned = endpoint(**values)
        except BaseException:
            response.status_code = 500
            raise
        if inspect.isawaitable(returned):
            return _await_and_copy_status(returned, response, declared)
        return _copy_status(returned, response, declared)

    setattr(call, _scope.ENDPOINT_STATUS, True)
    dependant.call = call
    # FastAPI's validation errors name file and line of the endpoint; without this they would name this file.
    routing._endpoint_context_cache[id(call)] = routing._extract_endpoint_context(endpoint)  # noqa: SLF001 - not public


async def _await_and_copy_status(returned: Awaitable[Any], response: Response, declared: int | None) -> Any:
    try:
        return _copy_status(await returned, response, declared)
    except BaseException:
        response.status_code = 500
        raise


def _copy_status(returned: Any, response: Response, declared: int | None) -> Any:
    if isinstance(returned, Response):
        response.status_code = returned.status_code
    elif declared is not None and not response.status_code:
        response.status_code = declared
    return returned


def _declared_status(route: Any) -> int | None:
    """Return the status of the route's decorator, or else the default of its response class."""
    if route.status_code is not None:
        return int(route.status_code)
    kind = route.response_class
    kind = kind.value if isinstance(kind, DefaultPlaceholder) else kind
    parameter = inspect.signature(kind).parameters.get("status_code")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None
