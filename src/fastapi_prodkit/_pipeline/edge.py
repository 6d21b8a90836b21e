"""`Edge` puts layers around an app, outside of Starlette's middleware and of everything that agents add later.

Agents such as OpenTelemetry's, Sentry's or Elastic's hook into an app in two ways: they wrap what
`app.build_middleware_stack()` returns, and they patch the classes of Starlette and FastAPI. The edge works with both.
It wraps whatever is set as `app.middleware_stack`. An exception that leaves the edge also leaves `Starlette.__call__`,
patched or not; after that `on_error` is called.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from itertools import takewhile
from operator import attrgetter
from typing import Any, Final

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._asgi import route_path
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import Hooks, RawHeaders
from fastapi_prodkit._pipeline.layers import APP_ERRORS, Layer, LayerStack, may_answer
from fastapi_prodkit._pipeline.management import ManagementRoutes
from fastapi_prodkit._problem import INTERNAL_ERROR, Refusal
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError

__all__ = ["Edge"]

_KINDS: Final = ("http", "websocket")
_MAX_DROPPED: Final = 65_536  # bytes of an unread body that the server may read and drop to keep the connection open
_MAX_DIGITS: Final = 18  # digits of a Content-Length that are parsed
_internal_error: Final = Refusal(ProblemError(500, INTERNAL_ERROR))
_Failures = list[tuple[Exchange, BaseException]]


class Edge:
    """Put layers around an app, outermost.

        edge = Edge([RequestIDMiddleware(app), AccessLogMiddleware(app)])
        edge.put_around(app)

    Each request passes one edge only. If a mounted app and the app around it both have an edge, the layers of the
    mounted app's edge are not used, but its management routes are.

    Args:
        layers: Outermost first.
        management: An app with routes such as probes. It serves them behind the last layer, in place of the app inside;
            see `ManagementRoutes`. A route of the app inside with the same path and method wins. No layer exempts
            such a route, even if the layer's `exempt` has its path.
        installed: Objects that dependencies look up, by name. In a mounted app, those of its own edge win.
        before_start: Called with the app inside each time when its middleware stack is built, before it serves.

    Attributes:
        app: The app inside; only set on an edge that `around` has returned.
        layers: As given.
        management: Which requests the management app serves.

    Raises:
        ConfigurationError: The layers are in an order in which they cannot work.
    """

    app: ASGIApp

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        management: Starlette | None = None,
        installed: Mapping[str, Any] | None = None,
        before_start: Callable[[Any], None] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self._before_start = before_start
        self._installed = installed or {}
        self.management = ManagementRoutes(management or Starlette())
        self._stacks: dict[str, LayerStack] = {kind: _EdgeStack(kind, layers, self.management) for kind in _KINDS}
        self._stacks["http"].add_on_response_start(_close_unread)
        self._refusals = _RefusalStack([*takewhile(lambda layer: not may_answer(layer), layers)], _no_app)

    @staticmethod
    def of(app: Starlette) -> "Edge | None":
        """Return the edge that was put around an app; None without one."""
        return getattr(app, _scope.APP_EDGE, None)

    def put_around(self, app: Starlette) -> None:
        """Put the edge around a Starlette or FastAPI app that has not started, and keep it outermost.

        The app's class is replaced by a subclass of the same name; `build_middleware_stack` stays as it is.

        Raises:
            ConfigurationError: The app has started, or has an edge already.
        """
        if app.middleware_stack is not None:
            raise ConfigurationError("the app has already started: put the edge around it before that")
        if hasattr(app, _scope.APP_STACK):
            raise ConfigurationError("the app has an edge already: put all layers into one")
        self.management.app_inside = app
        del app.middleware_stack
        setattr(app, _scope.APP_STACK, None)
        app.__class__ = _with_edge(type(app), self)

    def start(self, app: Starlette, stack: ASGIApp) -> "Edge":
        """Return this edge around the middleware stack of an app, which was just built."""
        if self._before_start is not None:
            self._before_start(app)
        return self.around(stack)

    def around(self, app: ASGIApp) -> "Edge":
        """Return this edge around an ASGI app, ready to serve."""
        served = copy(self)
        served.app = app
        served._stacks = {kind: stack.around(app) for kind, stack in self._stacks.items()}  # noqa: SLF001 - the copy is ours
        return served

    def around_refusal(self, refusal: Refusal) -> ASGIApp:
        """Return an app that answers a request that the server has refused.

        The request passes the layers in front of the first one that may answer, so that it is logged and counted.
        """
        return self._refusals.around(refusal)

    def close_connections(self) -> None:
        """Send `Connection: close` with every response from now on; this costs nothing before the call."""
        self._stacks["http"].add_on_response_start(_close_connection)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        stack = self._stacks.get(scope["type"])
        if stack is None:  # lifespan
            await self.app(scope, receive, self.management.read_routes_after_startup(send))
            return
        if _scope.INSTALLED not in scope:
            scope[_scope.INSTALLED] = self._installed
            await stack(scope, receive, send)
        else:
            scope[_scope.INSTALLED] = {**scope[_scope.INSTALLED], **self._installed}
            managed = scope["type"] == "http" and self.management.serves(scope, route_path(scope))
            await (self.management.app if managed else self.app)(scope, receive, send)


class _Unregistered:
    """Hide `__init_subclass__` of the other base classes, which may require arguments."""

    def __init_subclass__(cls) -> None: ...


class _EdgeStack(LayerStack):
    def __init__(self, kind: str, layers: Sequence[Layer], management: ManagementRoutes) -> None:
        super().__init__([layer for layer in layers if kind in layer.scope_types], _no_app)
        self._management = management
        if kind == "http":
            self._hooks_by_path = {**dict.fromkeys(management.paths, self.hooks), **self._hooks_by_path}

    def hooks_for(self, exchange: Exchange) -> Hooks[Exchange]:
        """Let the management app serve its routes; return all hooks if a route of the app inside overrides one."""
        scope, path = exchange.scope, exchange.path
        if self._management.is_overridden(path, scope.get("method")):
            return self.hooks
        if scope["type"] == "http" and self._management.serves(scope, path):
            exchange.app = self._management.app
        return super().hooks_for(exchange)

    async def decide(self, exchange: Exchange, error: BaseException) -> bool:
        """Send the 500 problem if no response has started; defer `on_error` until `Starlette.__call__` has ended."""
        if not exchange.status and not exchange.send_failed and exchange.scope["type"] == "http":
            with suppress(OSError):  # the client has disconnected
                # Starlette's handlers see no BaseException, and no exception of a layer, which is outside of them.
                await _internal_error(exchange.scope, exchange.receive, exchange.send)
        failures: _Failures | None = exchange.scope.get(_scope.FAILURES)
        if failures is None:
            return await super().decide(exchange, error)
        failures.append((exchange, error))
        return False


class _RefusalStack(LayerStack):
    def hooks_for(self, exchange: Exchange) -> Hooks[Exchange]:  # noqa: ARG002 - the signature of the method
        """Return all hooks: a request that the server refuses is never exempt."""
        return self.hooks


def _with_edge(base: type[Starlette], edge: Edge) -> type[Starlette]:
    """Return a subclass that wraps every middleware stack in the edge, and calls `on_error` around `base.__call__`."""

    def set_stack(app: Starlette, stack: ASGIApp | None) -> None:
        setattr(app, _scope.APP_STACK, None if stack is None else edge.start(app, stack))

    def delete_stack(app: Starlette) -> None:
        delattr(app, _scope.APP_STACK)

    async def call(app: Starlette, scope: Scope, receive: Receive, send: Send) -> None:
        if _scope.INSTALLED in scope or scope["type"] not in _KINDS:
            await base.__call__(app, scope, receive, send)
            return
        failures: _Failures = []
        scope[_scope.FAILURES] = failures
        try:
            await base.__call__(app, scope, receive, send)
        except APP_ERRORS as error:
            if not _call_on_error(failures, error):
                raise
        finally:
            failures.clear()  # breaks the cycle of references: failures, exchange, scope, failures

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    stack = property(attrgetter(_scope.APP_STACK), set_stack, delete_stack)
    members |= {_scope.APP_EDGE: edge, "__call__": call, "middleware_stack": stack}
    return type(base.__name__, (_Unregistered, base), members)


def _call_on_error(failures: _Failures, error: BaseException) -> bool:
    """Call `on_error` for the exception that has left the edge; return True to swallow `error`, which was caught."""
    if not failures:
        return False
    exchange, original = failures[-1]
    token = _context.begin(exchange.context)
    on_error = exchange.hooks.on_error
    swallow = on_error is not None and on_error(exchange, original)
    _context.end(token)
    # An agent may have replaced the exception. But a CancelledError in its place is a cancellation by the server.
    return swallow and (error is original or isinstance(error, Exception))


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None: ...


def _close_unread(exchange: Exchange, headers: RawHeaders, present: dict[bytes, bytes]) -> None:
    """Close the connection if the unread rest of the request's body may be larger than a server should drop."""
    has_body = b"content-length" in exchange.headers or b"transfer-encoding" in exchange.headers
    if has_body and not exchange.request_complete and _unread(exchange) > _MAX_DROPPED:
        _close_connection(exchange, headers, present)


def _unread(exchange: Exchange) -> float:
    """Return how many bytes of the request's body the app has not received; infinity if the body is chunked."""
    if b"transfer-encoding" in exchange.headers:
        return math.inf
    announced = exchange.headers.get(b"content-length", b"")
    return int(announced[:_MAX_DIGITS]) - exchange.body_received if announced.isdigit() else 0


def _close_connection(exchange: Exchange, headers: RawHeaders, present: dict[bytes, bytes]) -> None:
    """Add `Connection: close` (RFC 9112 section 9.6), except in HTTP/2, which forbids this header."""
    if exchange.scope["http_version"] < "2" and b"connection" not in present:
        present[b"connection"] = b"close"
        headers.append((b"connection", b"close"))
