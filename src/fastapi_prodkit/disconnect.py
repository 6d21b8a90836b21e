"""Cancel the handler of a client that disconnects before the response starts.

An app learns of a disconnect only when it receives the next message. A handler that waits for a query receives none,
and continues although its client has disconnected. With `cancel_on_disconnect` the handler is cancelled, as at a
deadline. What it awaits is cancelled as well: for example, the database ends a query and rolls back its transaction.

    app.add_middleware(DisconnectMiddleware, cancel_on_disconnect=True)


    @app.post("/orders", dependencies=[Depends(ignore_disconnect)])
    async def order() -> None: ...
"""

from collections.abc import Collection
from functools import partial
from typing import TypedDict, Unpack

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import route_dependencies
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.cancellation import cancellable_exchange
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer, checked_exempt
from fastapi_prodkit._pipeline.listener import DisconnectListener
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import LimitsSettings

__all__ = ["DisconnectMiddleware", "cancel_on_disconnect", "ignore_disconnect"]


class DisconnectKeywords(TypedDict, total=False):
    """Fields of `LimitsSettings`."""

    cancel_on_disconnect: bool


class DisconnectMiddleware(Layer):
    """Cancel the handler of a client that disconnects before the response has started, with `cancel_on_disconnect`.

        app.add_middleware(DisconnectMiddleware, cancel_on_disconnect=True)

    This does not apply to a response that has started, to background tasks and to WebSockets. The access line and the
    metrics have the status 499. `Depends(cancel_on_disconnect)` and `Depends(ignore_disconnect)` decide for a route.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        exempt: Paths relative to the app, without trailing slash, whose handlers are never cancelled.

    Keyword Args:
        cancel_on_disconnect: Cancel the handlers of all routes; False leaves it to the routes. Default: False.

    Raises:
        ConfigurationError: A keyword does not exist, or its value cannot be used.
    """

    may_cancel_app = True

    def __init__(
        self,
        app: ASGIApp,
        settings: LimitsSettings | None = None,
        *,
        exempt: Collection[str] = frozenset(),
        **keywords: Unpack[DisconnectKeywords],
    ) -> None:
        settings = with_keywords(self, settings or LimitsSettings(), keywords, DisconnectKeywords.__optional_keys__)
        self.app = app
        self.exempt = checked_exempt(exempt)
        self._enabled = settings.cancel_on_disconnect

    def inside(self, outer: Layer) -> Layer | None:
        """Return None if a layer further out listens already."""
        return None if isinstance(outer, DisconnectMiddleware) and outer._enabled else self  # noqa: SLF001 - of this class

    def on_wait(self, exchange: Exchange, started_at: float) -> None:  # noqa: ARG002 - the signature of the hook
        """Start to listen for the disconnect."""
        if self._enabled:
            _listen(exchange)


async def cancel_on_disconnect(connection: HTTPConnection) -> None:
    """Cancel the handlers of a route or router when the client disconnects: `Depends(cancel_on_disconnect)`.

    It takes effect when FastAPI calls the dependency; with LIMITS_CANCEL_ON_DISCONNECT, from the start of the request.
    If a route depends on this and on `ignore_disconnect`, the last one counts. It has no effect if the section `limits`
    is None.

    Raises:
        ConfigurationError: There is no middleware that can cancel the request, such as `DisconnectMiddleware`.
    """
    scope = connection.scope
    if scope["type"] != "http":
        return
    exchange = cancellable_exchange(scope)
    if exchange is not None:
        if exchange.listener is None:
            _listen(exchange)
    elif _scope.installed(scope) is None:
        raise ConfigurationError("cancel_on_disconnect has no effect here: add DisconnectMiddleware to the app")


async def ignore_disconnect() -> None:
    """Let the handlers of a route or router finish even if the client disconnects: `Depends(ignore_disconnect)`."""


def _listen(exchange: Exchange) -> None:
    listener = DisconnectListener(exchange.receive_from_server, partial(_cancel, exchange))
    exchange.listener = listener
    exchange.receive_from_server = listener.receive
    headers = exchange.headers
    announced = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    if exchange.request_complete or not announced:
        listener.listen()


def _cancel(exchange: Exchange) -> None:
    """Cancel the app, unless the response has started or the route ignores the disconnect."""
    if _may_cancel(exchange.scope) and exchange.interrupt(_no_answer):
        exchange.client_disconnected = True


def _may_cancel(scope: Scope) -> bool:
    """Return whether the last of the two dependencies of the route allows it; True without one: the setting is on."""
    choices = [each for each in route_dependencies(scope) if each in (cancel_on_disconnect, ignore_disconnect)]
    return not choices or choices[-1] is cancel_on_disconnect


async def _no_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Send nothing: the client has disconnected."""
