"""One layer in place of those that Starlette and FastAPI put around every app, until they have something to do.

They act on exceptions: the outermost answers with the 500, the innermost calls the app's exception handlers, and one in
between answers for a body that is too large. Standing around the app, each costs every request a coroutine, and most of
them another one for each message: together a tenth of what bare FastAPI takes. So the app is served without them, and
they are put around an exception once there is one.
"""

from copy import copy
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_prodkit._exchange import Exchange

__all__ = ["Rescue"]

# By name: some of them are private. A version that has others keeps those where they are.
_ON_EXCEPTIONS: Final = frozenset(
    {
        "starlette.middleware.errors.ServerErrorMiddleware",
        "fastapi.telemetry._asgi.ExceptionTelemetryMiddleware",
        "fastapi._body_limit.AppBodyLimitMiddleware",
        "starlette.middleware.exceptions.ExceptionMiddleware",  # middleware of the app's own keeps it further in
    }
)
_SCOPE: Final = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "root_path": "", "headers": ()}
_ERROR: Final = "fastapi_prodkit.error"  # where the scope has what is to be raised


class Rescue:
    """Do for an exception what the layers around an app would have done.

    It stands inside of an exchange, which knows whether a response has started.

    Attributes:
        app: The app without them.
        marks: What they leave in the scope of every request, for the app to find.
    """

    def __init__(self, app: Any) -> None:
        layers = []
        while f"{type(app).__module__}.{type(app).__qualname__}" in _ON_EXCEPTIONS:
            layers.append(app)
            app = app.app
        self.app: ASGIApp = app
        self._around: Any = _fail
        for layer in reversed(layers):
            self._around = _copy(layer, self._around)
        self.marks = self._find_marks()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope.update(self.marks)
        try:
            await self.app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - it is raised on, or answered
            scope[_ERROR] = error
            await self._around(scope, receive, _send_nothing if _has_started(scope) else send)

    def _find_marks(self) -> dict[str, Any]:
        """Have them serve a request that is over at once, and see what there is in its scope."""
        scope = dict(_SCOPE)
        next(self._around(scope, None, None).__await__(), None)
        return {name: value for name, value in scope.items() if name not in _SCOPE}


def _copy(layer: Any, app: ASGIApp) -> Any:
    copied = copy(layer)
    copied.app = app
    return copied


async def _fail(scope: Scope, _receive: Receive, send: Send) -> None:
    if _ERROR not in scope:
        return
    if _has_started(scope):  # they are to know, and nobody else
        await send({"type": "http.response.start", "status": 500, "headers": []})
    raise scope.pop(_ERROR)


def _has_started(scope: Scope) -> bool:
    exchange = Exchange.of(scope)
    return scope["type"] == "http" and exchange is not None and bool(exchange.status) and exchange.interruption is None


async def _send_nothing(message: Message) -> None: ...
