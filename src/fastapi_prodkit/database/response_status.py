"""The status of the response that a handler returns, for a dependency that ends before the response is sent.

FastAPI injects one `Response` into the dependencies and the handler of a request. Its status counts unless the handler
returns a response of its own, which no dependency sees. Therefore the endpoint of a route is wrapped, once: it copies
the status of what it returns to the injected response, where FastAPI no longer looks at it.
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

_INJECTED = "fastapi_prodkit_response"  # the argument for the injected response, where the endpoint has none

_Endpoint = Callable[..., Any]


def expose_response_status(scope: Scope, sessions: Collection[_Endpoint]) -> None:
    """Make the injected response of a request tell the status of the response that the handler returns.

    Called by a dependency before the handler. After the handler the injected response has the status of a response
    that it returned, else what it had been given, else what the route declares; and 500 after an exception. A generator
    has no more than begun by then, and what an `APIRoute` of the app's own makes of the response comes later.

    Args:
        scope: That of the dependency's request. Nothing happens for a WebSocket, nor without a route of FastAPI's.
        sessions: The dependencies that end sessions, before the response is sent.

    Raises:
        ConfigurationError: The route has one of them that would end after the response.
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
            return _awaited(returned, response, declared)
        return _noted(returned, response, declared)

    setattr(call, _scope.ENDPOINT_STATUS, True)
    dependant.call = call
    # FastAPI names file and line of the endpoint in the errors of validation, and would name this file.
    routing._endpoint_context_cache[id(call)] = routing._extract_endpoint_context(endpoint)  # noqa: SLF001 - not public


async def _awaited(returned: Awaitable[Any], response: Response, declared: int | None) -> Any:
    try:
        return _noted(await returned, response, declared)
    except BaseException:
        response.status_code = 500
        raise


def _noted(returned: Any, response: Response, declared: int | None) -> Any:
    if isinstance(returned, Response):
        response.status_code = returned.status_code
    elif declared is not None and not response.status_code:
        response.status_code = declared
    return returned


def _declared_status(route: Any) -> int | None:
    """Return the status of the route's decorator, or else what its response class is made with."""
    if route.status_code is not None:
        return int(route.status_code)
    kind = route.response_class
    kind = kind.value if isinstance(kind, DefaultPlaceholder) else kind
    parameter = inspect.signature(kind).parameters.get("status_code")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None
