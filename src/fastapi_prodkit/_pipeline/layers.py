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

__all__ = ["APP_ERRORS", "READING", "Layer", "LayerStack", "checked_exempt"]

# Exceptions that end one request. For others, such as SystemExit, `on_end` is called, but `on_error` is not.
APP_ERRORS: Final = (Exception, CancelledError, BaseExceptionGroup)

_TYPES: Final = frozenset({"http", "websocket"})
READING: Final = frozenset({"GET", "HEAD"})


class Layer:
    """Base class of every middleware. Override only the hooks you need; hooks that are not overridden are never called.

        class Deprecated(Layer):
            def on_response_start(self, exchange, headers, present):
                headers.append((b"deprecation", b"@1793491200"))

    Attributes:
        app: The app to serve, where the layer is used alone.
        exempt: Paths relative to the app, without trailing slash, whose GET and HEAD requests call no hook.
        where_exempt: The layer to use in place of this one for those requests; None for no layer.
        scope_types: Types of scope for which the hooks are called.
        may_answer: `on_request` may return an app. Set it to False where `on_request` always returns None; then layers
            with `on_response_start` or `on_end` may be further in.
        may_cancel_app: The layer may cancel the task that serves the request. Outside of a stack it opens an exchange
            of its own.
        runs_on_plain_response: Call `on_response_start` even if the app sets no headers other than Content-Type and
            Content-Length.
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
        `exchange.call_inner` to serve the request with them after all. If it raises, the request fails.
        """

    def on_wait(self, exchange: Exchange, started_at: float) -> None:
        """Start a time-out. Called once by the stack, immediately before the app is called.

        The time-out counts from `started_at`, on the clock of `perf_counter`. Called in the task that serves the
        request, `exchange.task`, and only in a stack with a layer that may cancel this task.
        """

    def on_response_start(self, exchange: Exchange, headers: RawHeaders, present: dict[bytes, bytes]) -> None:
        """Change the headers of a response in place. Called once by `Exchange.send`, innermost layer first.

        `headers` are those to send, `present` are those that the app has set, `exchange.status` is the status. Layers
        further out treat a header in `present` as set by the app, even if this layer has added it there. If the hook
        raises, the app's call of `send` raises.
        """

    def on_end(self, exchange: Exchange) -> None:
        """Finish a request. Called once, successful or not, innermost layer first; must not raise.

        `exchange.status`, `.duration` and `.route` are final.
        """

    def on_error(self, exchange: Exchange, error: BaseException) -> bool:  # noqa: ARG002 - for those that override it
        """Handle an exception; return True to swallow it. Only the innermost layer that overrides this is called.

        Called once by the stack or, in an `Edge`, after the exception has left `Starlette.__call__`. Called for an
        Exception or BaseExceptionGroup, and for a CancelledError if the request's task was not cancelled. Must not
        raise.
        """
        return False

    def inside(self, outer: "Layer") -> "Layer | None":  # noqa: ARG002 - for those that override it
        """Return the layer to use in place of this one if `outer` is further out; None to leave it out.

        Called once for each layer further out, not per request. A layer that would repeat what `outer` does returns
        None. A layer whose settings must win over those of `outer` may return another layer that ensures this.
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
    """Serve an app with layers around it, outermost first. Each layer is used for its `scope_types` only.

        app = LayerStack([RequestIDMiddleware(app), AccessLogMiddleware(app)], app)

    Raises:
        ConfigurationError: A layer with `on_response_start` or `on_end` is behind one that may answer.
    """

    def __init__(self, layers: Sequence[Layer], app: ASGIApp) -> None:
        _check_order(layers)
        self.app = app
        self.layers = layers
        self.hooks = _hooks_of(layers)
        paths = {path for layer in layers for path in layer.exempt}
        self._hooks_by_path = {path: _hooks_of(_layers_for(path, layers)) for path in paths}
        # Types that every layer handles. For any other type, `_for_type` makes a stack of the layers that handle it.
        self._types = _TYPES.intersection(*(layer.scope_types for layer in layers))
        self._others: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in self._types:
            await self._for_type(scope["type"])(scope, receive, send)
            return
        outer = scope.get(EXCHANGE)
        scope[EXCHANGE] = exchange = Exchange(self.hooks, self.app, outer, scope, receive, send)
        if outer is not None or exchange.path in self._hooks_by_path:
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
            _context.keep(error, exchange.context)  # not an error of the app: `on_error` is not called
            raise
        finally:
            exchange.finish()
            # Break the reference cycle of exchange and scope, so that the exchange is freed without a collection.
            scope[EXCHANGE] = outer
            exchange.receive_from_server = receive
            _context.end(token)

    def around(self, app: ASGIApp) -> "LayerStack":
        """Return the same layers around another app."""
        stack = copy(self)
        stack.app = app
        stack._others = {}  # noqa: SLF001 - the copy is ours; the stacks in the dict serve the old app
        return stack

    def _for_type(self, kind: str) -> ASGIApp:
        """Return the app with the layers that have this type in their `scope_types`."""
        if kind not in self._others:
            layers = [layer for layer in self.layers if kind in layer.scope_types]
            self._others[kind] = LayerStack(layers, self.app) if layers else self.app
        return self._others[kind]

    def hooks_for(self, exchange: Exchange) -> Hooks[Exchange]:
        """Return the hooks of the layers that do not exempt the request; set `exchange.exempt` if any layer does."""
        hooks = self._hooks_by_path.get(exchange.path)
        if hooks is None or exchange.scope.get("method") not in READING:
            return self.hooks
        exchange.exempt = hooks is not self.hooks
        return hooks

    def add_on_response_start(self, hook: OnResponseStart[Exchange]) -> None:
        """Call `hook` after the `on_response_start` of all layers, in copies of this stack and current requests too."""
        for hooks in {self.hooks, *self._hooks_by_path.values()}:
            hooks.add_on_response_start(hook)

    async def handle_error(self, exchange: Exchange, error: BaseException) -> bool:
        """Call `on_error` for an exception of the app; return True to swallow it.

        A cancellation of the request is not swallowed. A CancelledError without a cancellation is an error of the app.
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
    """Check the paths of `Layer.exempt`, which are compared exactly, and return them as a set.

    Raises:
        ConfigurationError: The paths are one string, or a path does not start with a slash, or ends with one.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        if isinstance(paths, str) or not path.startswith("/") or (path.endswith("/") and path != "/"):
            raise ConfigurationError(f"exempt: {path!r}: write a set of paths with a slash first and none at the end")
    return frozenset(paths)


def may_answer(layer: Layer) -> bool:
    """Return whether the layer may answer a request in place of the layers further in and the app."""
    return layer.may_answer and _overrides(layer, "on_request")


def _layers_for(path: str, layers: Sequence[Layer]) -> Sequence[Layer]:
    replaced = (layer.where_exempt if path in layer.exempt else layer for layer in layers)
    return [layer for layer in replaced if layer is not None]


def _check_order(layers: Sequence[Layer]) -> None:
    first: Layer | None = None  # the outermost one that may answer
    for layer in layers:
        finishing = [hook for hook in ("on_response_start", "on_end") if _overrides(layer, hook)]
        if first is not None and finishing:
            inner, outer = type(layer).__name__, type(first).__name__
            raise ConfigurationError(
                f"{inner} is behind {outer}, which may answer a request before {inner} sees it; "
                f"{' and '.join(finishing)} of {inner} would still be called: put {inner} before {outer}"
            )
        if first is None and may_answer(layer):
            first = layer


def _inside(outer: Hooks[Exchange], hooks: Hooks[Exchange], *, joined: bool) -> Hooks[Exchange]:
    """Return the hooks of inner layers for requests that outer layers handle as well.

    Args:
        outer: The hooks of the outer exchange.
        hooks: The hooks of the inner layers alone.
        joined: The inner layers join the outer exchange instead of opening one of their own.
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
