"""Every key that this library puts into an ASGI scope, and every attribute that it sets on objects of others."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "EXCHANGE",
    "FAILURES",
    "INSTALLED",
    "QUOTAS",
    "caller",
    "installed",
    "is_logged",
    "mark_logged",
    "take_logged_mark",
]

# Scope keys.
INSTALLED: Final = "fastapi_prodkit"  # the objects that dependencies look up; also an attribute of app.state
EXCHANGE: Final = "fastapi_prodkit.exchange"  # the innermost Exchange of the request; read by Exchange.innermost
FAILURES: Final = "fastapi_prodkit.failures"  # exceptions that have left the edge; see _pipeline.edge
ROUTE: Final = "fastapi_prodkit.route"  # the route that was found before routing; see _routing.index
QUOTAS: Final = "fastapi_prodkit.quotas"  # the limits against which the request was counted; see rate_limit.limits
SESSION: Final = "fastapi_prodkit.session"  # the session for writing of the request; see database.joining
AUTH: Final = "fastapi_prodkit.auth"  # the Auth of the guard that the request has passed last; see auth.guard
USER: Final = "fastapi_prodkit.user"  # that Auth, and the caller that it has authenticated; see auth.guard
PROOF: Final = "fastapi_prodkit.proof"  # the DPoP proof that the request has used up; see auth.dpop
WEBSOCKET: Final = "fastapi_prodkit.websocket"  # the messages of a WebSocket; see auth.websockets
READ_SESSION: Final = "fastapi_prodkit.read_session"  # the session for reading of the request; see database.joining

# Attributes of objects that are not ours.
EXCEPTION_LOGGED: Final = "__prodkit_logged__"  # an exception that is logged already
EXCEPTION_CONTEXT: Final = "__prodkit_context__"  # an exception: the context of the request that it has left
LIFESPAN_COMPOSED: Final = "__prodkit_composed__"  # a lifespan that starts mounted apps by itself
APP_EDGE: Final = "_prodkit_edge"  # an app with an edge: the edge
APP_STACK: Final = "_prodkit_middleware_stack"  # an app with an edge: its middleware stack, in the edge
ROUTER_MOUNTS: Final = "fastapi_prodkit"  # a router: the prefixes of its mounts; see _asgi
ROUTER_GUARD: Final = "_prodkit_guard"  # a router whose routes need a caller: the guard; see auth.guard
ROUTER_INDEX: Final = "_prodkit_index"  # a router with an index: the index; see _routing.index
APP_TEST_STATE: Final = "_prodkit_test_state"  # an app that runs in a test: its lifespan's state; see testing.sessions
APP_TEMPLATES: Final = "_prodkit_templates"  # an app: templates of requests that were refused before; see _asgi
REGISTRY_INSTRUMENTS: Final = "fastapi_prodkit_instruments"  # a Prometheus registry; see _instruments
REGISTRY_WORKERS: Final = "fastapi_prodkit_workers"  # a Prometheus registry; see metrics.multiprocess
ENDPOINT_STATUS: Final = "__prodkit_status__"  # an endpoint that `database.response_status` has wrapped
ENDPOINT_LIMITS: Final = "__prodkit_limits__"  # an endpoint: the limits that decorate it; see rate_limit.decorated
ENDPOINT_NO_DEFAULT_LIMIT: Final = "__prodkit_no_default_limit__"  # an endpoint without the default limit
ENDPOINT_NO_LIMIT: Final = "__prodkit_no_limit__"  # an endpoint without any limit
ENDPOINT_ACCESS: Final = "__prodkit_access__"  # an endpoint of ours that admits callers itself: a text that says which
BY_SETTINGS: Final = "__prodkit_by_settings__"  # a route about which the settings decide; see _assembly.docs
PUBLIC: Final = "__prodkit_public__"  # an endpoint, router, route or mounted app that needs no caller; see auth.rules
ENDPOINT_LIMIT_ELSEWHERE: Final = "__prodkit_limit_elsewhere__"  # an endpoint whose limit wraps it without effect


def installed(scope: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the objects that `create_app` has made for this app; None outside of an edge."""
    return scope.get(INSTALLED)


def caller(scope: Mapping[str, Any]) -> Any:
    """Return the `auth.User` that was authenticated last; None if there is none, or not yet."""
    return scope.get(USER, (None, None))[1]


def mark_logged(error: BaseException) -> None:
    """Note that the exception is logged, so that `configure_logging` drops the server's record of it."""
    vars(error)[EXCEPTION_LOGGED] = True  # not setattr, which an exception's class may refuse


def is_logged(error: BaseException) -> bool:
    """Return whether the exception is logged already."""
    return EXCEPTION_LOGGED in vars(error)


def take_logged_mark(error: BaseException | None) -> bool:
    """Return whether the exception is logged already, and remove the mark: the same object may be raised again."""
    return error is not None and vars(error).pop(EXCEPTION_LOGGED, False)
