"""`Layer`, the base class of every middleware, and `LayerStack`, which serves an app with several of them."""

from asyncio import CancelledError
from collections.abc import Collection, Sequence
from copy import copy
from functools import cached_property
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _context, _scope
from fastapi_prodkit._pipeline.cancellation import check_complete, is_cancelled
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.hooks import Hooks, OnResponseStart, RawHeaders
from fastapi_prodkit._scope import EXCHANGE
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["APP_ERRORS", "Layer", "LayerStack", "checked_exempt"]

# What an app may fail with. Others, such as SystemExit, end more than a request: `on_error` is not called, `on_end` is.
APP_ERRORS: Final = (Exception, CancelledError, BaseExceptionGroup)

_TYPES: Final = frozenset({"http", "websocket"})
_READING: Final = frozenset({"GET", "HEAD"})


class Layer:
    """Base class of every middleware. Override only the hooks you need; hooks that are not overridden are never called.

        class Deprecated(Layer):
            def on_response_start(self, exchange, headers, present):
                headers.append((b"deprecation", b"@1793491200"))

    Attributes:
        app: The app to serve, where the layer is used alone.
        exempt: Paths relative to the app, without trailing slash. No hook is called for GET and HEAD requests for them.
        where_exempt: A layer that works in place of this one on those requests, if there is one.
        scope_types: Types of scope for which the hooks are called; others pass.
        may_answer: `on_request` may return an app. Set it to False where `on_request` always returns None; then layers
            with `on_response_start` or `on_end` may stand further in.
        may_cancel_app: The layer may cancel the task that serves the request. Alone, it opens an exchange of its own.
        runs_on_plain_response: `on_response_start` has something to do although the app sets no other headers than
            Content-Type and Content-Length.
    """

    app: ASGIApp
    exempt: Collection[str] = frozenset()
    where_exempt: "Layer | None" = None
    scope_types: frozenset[str] = frozenset({"http"})
    may_answer = True
    may_cancel_app = False
    runs_on_plain_response = True

    def on_request(self, exchange: Exchange) -> ASGIApp | None:
        """Begin a request. Called once by the stack, outermost layer first, before the app is called.

        May return an ASGI app, which then serves the request in place of the layers further in and the app; it may call
        `exchange.call_inner` to serve the request with them after all. May raise: the request fails.
        """

    def on_wait(self, exchange: Exchange, started_at: float) -> None:
        """Start a time-out. Called once by the stack, immediately before the app is called.

        `started_at` says since when the app counts as having the request, on the clock of `perf_counter`. Called in the
        task that serves the request, `exchange.task`, and only in a stack with a layer that may cancel it.
        """

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: dict[bytes, bytes]) -> None:
        """Change the headers of a response in place. Called once by `Exchange.send`, innermost layer first.

        `headers` is what will be sent, `present` is what the app has set, `exchange.status` is the status. A layer that
        adds to `present` tells those further out that its header stands. May raise: the app's call of `send` fails.
        """

    def on_end(self, exchange: Exchange) -> None:
        """Finish a request. Called once, successful or not, innermost layer first; must not raise.

        `exchange.status`, `.duration` and `.route` are final.
        """

    def on_error(self, exchange: Exchange, error: BaseException) -> bool:  # noqa: ARG002 - for those that override it
        """Handle an exception; return True to swallow it. Only the innermost layer that overrides this is called.

        Called once by the stack, or in an `Edge` by the outermost place when the exception has passed all other layers,
        for an Exception or BaseExceptionGroup, and for a CancelledError while the request's task is not cancelled. Must
        not raise.
        """
        return False

    def inside(self, outer: "Layer") -> "Layer | None":  # noqa: ARG002 - for those that override it
        """Return what works in place of this layer where `outer` stands further out; None for nothing.

        Called for each layer further out, once and not for each request. A layer that would do again what `outer` does
        returns None; one whose settings are to win over those of `outer` may return a layer that sees to it.
        """
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with this layer alone, or as part of the exchange that a layer around it has opened."""
        if scope["type"] not in self.scope_types:
            await self.app(scope, receive, send)
            return
        exchange = None if self.may_cancel_app else Exchange.for_this_app(scope)
        if exchange is None:
            await self._alone(scope, receive, send)
            return
        hooks = self._alone.hooks_for(exchange)
        exchange.add_layers(_inside(exchange.hooks, hooks, joined=True), self.app)
        await exchange.call_inner(receive, send)

    @cached_property
    def _alone(self) -> "LayerStack":
        return LayerStack([self], self.app)


class LayerStack:
    """Serve an app with these layers around it, outermost first, each for its types of scope; others pass.

        app = LayerStack([RequestIDMiddleware(app), AccessLogMiddleware(app)], app)

    Raises:
        ConfigurationError: A layer with `on_response_start` or `on_end` stands behind one that may answer.
    """

    def __init__(self, layers: Sequence[Layer], app: ASGIApp) -> None:
        _check_order(layers)
        self.app = app
        self.layers = layers
        self.hooks = _hooks_of(layers)
        paths = {path for layer in layers for path in layer.exempt}
        self._exempt = {path: _hooks_of(_layers_for(path, layers)) for path in paths}
        # The types of scope for which all layers work; for others some do, or none.
        self._types = _TYPES.intersection(*(layer.scope_types for layer in layers))
        self._others: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in self._types:
            await self._for_type(scope["type"])(scope, receive, send)
            return
        outer = scope.get(EXCHANGE)
        scope[EXCHANGE] = exchange = Exchange(self.hooks, self.app, outer, scope, receive, send)
        if outer is not None or exchange.path in self._exempt:
            hooks = self.hooks_for(exchange)
            exchange.replace_hooks(hooks if outer is None else _inside(outer.hooks, hooks, joined=False))
        token = _context.begin(exchange.context)
        try:
            await exchange.call_inner(exchange.receive, exchange.send)
            if exchange.interruption is not None:
                await exchange.finish_interruption()
            elif not exchange.complete:
                check_complete(exchange)
        except APP_ERRORS as error:
            exchange.context.failed = True
            interrupted = await exchange.finish_interruption() and isinstance(error, CancelledError)
            if not interrupted and not await self.handle_error(exchange, error):
                _context.keep(error, exchange.context)
                raise
        except BaseException as error:
            _context.keep(error, exchange.context)  # no error of the app: `on_error` is not called
            raise
        finally:
            exchange.finish()
            # Break the cycle of references between exchange and scope, which the garbage collector would have to find.
            scope[EXCHANGE] = outer
            exchange.receive_from_server = receive
            _context.end(token)

    def around(self, app: ASGIApp) -> "LayerStack":
        """Return the same layers around another app."""
        stack = copy(self)
        stack.app = app
        stack._others = {}  # noqa: SLF001 - a copy's own; they are around the app
        return stack

    def _for_type(self, kind: str) -> ASGIApp:
        """Return the app with the layers that work for a type of scope."""
        if kind not in self._others:
            layers = [layer for layer in self.layers if kind in layer.scope_types]
            self._others[kind] = LayerStack(layers, self.app) if layers else self.app
        return self._others[kind]

    def hooks_for(self, exchange: Exchange) -> Hooks[Exchange]:
        """Return the hooks of the layers from which the request is not exempt, and note whether it is from any."""
        hooks = self._exempt.get(exchange.path)
        if hooks is None or exchange.scope.get("method") not in _READING:
            return self.hooks
        exchange.exempt = True
        return hooks

    def add_on_response_start(self, hook: OnResponseStart[Exchange]) -> None:
        """Call a function like an outermost layer's hook, for requests in progress too, whatever stack serves them."""
        for hooks in (self.hooks, *self._exempt.values()):
            hooks.add_on_response_start(hook)

    async def handle_error(self, exchange: Exchange, error: BaseException) -> bool:
        """Call `on_error` for an exception of the app; return True to swallow it.

        A cancellation of the request passes; a CancelledError while its task is not cancelled is an error.
        """
        if isinstance(error, CancelledError) and is_cancelled(exchange):
            if exchange.outer is None and not exchange.complete and not exchange.client_disconnected:
                exchange.context.end_reason = exchange.context.end_reason or "cancelled"
            # Some servers cancel the request of a client that has disconnected.
            exchange.client_disconnected |= not exchange.complete
            _scope.mark_logged(error)  # the server logs no traceback for a stream that ends at shutdown
            return False
        return await self.decide(exchange, error)

    async def decide(self, exchange: Exchange, error: BaseException) -> bool:
        """Call `on_error` for an error of the app; return True to swallow it."""
        on_error = exchange.hooks.on_error
        return on_error is not None and on_error(exchange, error)


def checked_exempt(paths: Collection[str]) -> frozenset[str]:
    """Return paths for `Layer.exempt`, which are compared as they are.

    Raises:
        ConfigurationError: It is one text, or a path does not start with a slash, or ends with one.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        if isinstance(paths, str) or not path.startswith("/") or (path.endswith("/") and path != "/"):
            raise ConfigurationError(f"exempt: {path!r}: write a set of paths with a slash first and none at the end")
    return frozenset(paths)


def answers(layer: Layer) -> bool:
    """Say whether the layer may answer a request in place of the layers further in and the app."""
    return layer.may_answer and _overrides(layer, "on_request")


def _layers_for(path: str, layers: Sequence[Layer]) -> Sequence[Layer]:
    working = (layer.where_exempt if path in layer.exempt else layer for layer in layers)
    return [layer for layer in working if layer is not None]


def _check_order(layers: Sequence[Layer]) -> None:
    first: Layer | None = None  # the outermost one that may answer
    for layer in layers:
        finishing = [hook for hook in ("on_response_start", "on_end") if _overrides(layer, hook)]
        if first is not None and finishing:
            inner, outer = type(layer).__name__, type(first).__name__
            raise ConfigurationError(
                f"{inner} stands behind {outer}, which may answer a request itself: then {' and '.join(finishing)} of "
                f"{inner} would be called for a request that it has not seen; put {inner} before {outer}"
            )
        if first is None and answers(layer):
            first = layer


def _inside(outer: Hooks[Exchange], hooks: Hooks[Exchange], *, joined: bool) -> Hooks[Exchange]:
    """Return the hooks as they work where those of outer layers work on the same request.

    Args:
        outer: The hooks of the exchange that the layers have found.
        hooks: Those of the layers alone.
        joined: The layers work in that exchange, and not in one of their own.
    """
    key = hooks, joined
    found = outer.further_in.get(key)
    if found is None:
        inside = [_layer_inside(outer.layers, layer) for layer in hooks.layers]
        found = _hooks_of([layer for layer in inside if layer is not None])
        found.layers = [*outer.layers, *hooks.layers]
        found = outer.further_in[key] = found.joined_to(outer) if joined else found
    return found


def _layer_inside(outer: Sequence[Layer], layer: Layer) -> Layer | None:
    for each in outer:
        inner = layer.inside(each)
        if inner is None:
            return None
        layer = inner
    return layer


def _hooks_of(layers: Sequence[Layer]) -> Hooks[Exchange]:
    inside_out = layers[::-1]
    starting = [layer for layer in inside_out if _overrides(layer, "on_response_start")]
    return Hooks(
        on_request=[layer.on_request for layer in layers if _overrides(layer, "on_request")],
        on_wait=[layer.on_wait for layer in layers if _overrides(layer, "on_wait")],
        on_response_start=[layer.on_response_start for layer in starting],
        on_plain_response_start=[layer.on_response_start for layer in starting if layer.runs_on_plain_response],
        on_end=[layer.on_end for layer in inside_out if _overrides(layer, "on_end")],
        on_error=next((layer.on_error for layer in inside_out if _overrides(layer, "on_error")), None),
        may_cancel_app=any(layer.may_cancel_app for layer in layers),
        layers=layers,
    )


def _overrides(layer: Layer, hook: str) -> bool:
    return getattr(type(layer), hook) is not getattr(Layer, hook)
