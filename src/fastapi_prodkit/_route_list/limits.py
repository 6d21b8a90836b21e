"""The limits of a route: its own, and those of the layers around it."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit._pipeline.edge import Edge
from fastapi_prodkit._pipeline.layers import READING
from fastapi_prodkit.body_limit import BodyLimitMiddleware, own_limit
from fastapi_prodkit.deadline import DeadlineMiddleware, timeout_of
from fastapi_prodkit.rate_limit.decorated import decorated_limits
from fastapi_prodkit.rate_limit.dependency import RateLimit
from fastapi_prodkit.rate_limit.endpoints import is_exempt
from fastapi_prodkit.rate_limit.middleware import RateLimitMiddleware

__all__ = ["Limits"]

_DEFAULT: Final = "default"
_NONE: Final = "none"
_LIMITING: Final = (RateLimitMiddleware, DeadlineMiddleware, BodyLimitMiddleware)
_UNITS: Final = (("MiB", 2**20), ("KiB", 2**10))


class _Placed(NamedTuple):
    """A layer, and where it is.

    Attributes:
        layer: The layer.
        prefix: The path of the app around which it is.
        exempt: The paths in this app that it exempts.
        general: It is around the outermost app, so that its limit is the default.
    """

    layer: Any
    prefix: str
    exempt: Collection[str]
    general: bool

    def applies(self, method: str, path: str) -> bool:
        below = path.removeprefix(self.prefix)
        return method not in READING or (below.rstrip("/") or "/") not in self.exempt

    def text(self, limit: str) -> str:
        return _DEFAULT if self.general else limit


@dataclass(frozen=True)
class Limits:
    """The layers with limits on the way to a route, and what each of them and the route say.

    Attributes:
        rates: The layers that count requests, outermost first.
        deadline: The innermost layer with a deadline, which replaces those further out.
        bodies: The layers that limit a body, outermost first.
        size: The largest body, bytes; infinity without a limit.
        app_size: That of FastAPI's argument `max_body_size`, which each route of the app has as well.
        general_size: That of the outermost app.
        has_edge: An edge is on the way: those of mounted apps are not used.
        outermost: No app is on the way.
    """

    rates: tuple[_Placed, ...] = ()
    deadline: _Placed | None = None
    bodies: tuple[_Placed, ...] = ()
    size: float = math.inf
    app_size: int | None = None
    general_size: float = math.inf
    has_edge: bool = False
    outermost: bool = True

    def inside(self, app: Starlette, prefix: str, *, management: bool = False) -> "Limits":
        """Return the limits inside of an app.

        Args:
            app: The app, with the layers around it.
            prefix: The path of the app.
            management: For its management routes, which the edge serves.
        """
        edge = None if self.has_edge else Edge.of(app)
        limits = self if edge is None else replace(self, has_edge=True)
        if edge is not None:
            overriding = () if management else edge.management.paths  # no layer exempts these routes of the app
            for layer in edge.layers:
                exempt = set(layer.exempt).difference(overriding)
                limits = limits.behind(_Placed(layer, prefix, exempt, self.outermost))
        if not management:
            app_size = getattr(app, "max_body_size", None)
            limits = replace(limits, app_size=app_size, size=limits.size if app_size is None else app_size)
            for layer in _added_layers(app):
                limits = limits.behind(_Placed(layer, prefix, layer.exempt, self.outermost))
        return replace(limits, outermost=False, general_size=limits.size if self.outermost else self.general_size)

    def behind(self, placed: _Placed) -> "Limits":
        """Return the limits behind one more layer."""
        layer = placed.layer
        if isinstance(layer, DeadlineMiddleware):
            return replace(self, deadline=placed)
        if isinstance(layer, RateLimitMiddleware) and all(layer.inside(each.layer) for each in self.rates):
            return replace(self, rates=(*self.rates, placed))
        if isinstance(layer, BodyLimitMiddleware):
            smaller = any(each.layer.size < layer.size for each in self.bodies)
            return replace(self, bodies=(*self.bodies, placed), size=self.size if smaller else layer.size)
        return self

    def rate_text(self, route: Any, endpoint: Any, method: str, path: str) -> str:
        """Return the rate limits of a route: the default one, and its own.

        Args:
            route: The route, or FastAPI's context of it.
            endpoint: Its endpoint, or the mounted app.
            method: One of its methods, or `WEBSOCKET`.
            path: Its path.
        """
        counted = [each for each in self.rates if each.applies(method, path) and each.layer.counts(endpoint)]
        texts = [each.text(str(each.layer)) for each in counted]
        if not any(each.general for each in self.rates) and not is_exempt(endpoint):
            texts.insert(0, _DEFAULT)  # which is none here, and may be a limit in another environment
        texts += map(str, _own_limits(route, endpoint, method))
        return "; ".join(dict.fromkeys(texts)) or "exempt"

    def deadline_text(self, route: Any, method: str, path: str) -> str:
        """Return the deadline of a route; arguments as for `rate_text`."""
        if self.deadline is None:
            return _DEFAULT  # which is none: without the layer a `Timeout` has no effect
        if not self.deadline.applies(method, path):
            return _NONE
        own = timeout_of(route)
        if own is not None:
            return _seconds(own.seconds)
        return self.deadline.text(_seconds(self.deadline.layer.seconds))

    def body_text(self, route: Any) -> str:
        """Return the largest body of a request for a route, or for what is mounted."""
        own = own_limit(route)
        if own not in (None, self.app_size):
            return _bytes(own)
        return _DEFAULT if self.size == self.general_size else _bytes(self.size)

    @property
    def defaults(self) -> str:
        """What `default` stands for."""
        rates = "; ".join(str(each.layer) for each in self.rates) or _NONE
        deadline = _seconds(None if self.deadline is None else self.deadline.layer.seconds)
        return f"rate limit {rates}, deadline {deadline}, body {_bytes(self.size)}"


def _added_layers(app: Starlette) -> Iterator[Any]:
    """Yield new layers as `app.add_middleware` was told, without those of the app: they have no attribute for it."""
    for each in app.user_middleware:
        make: Any = each.cls
        if isinstance(each.cls, type) and issubclass(each.cls, _LIMITING):
            yield make(_no_app, *each.args, **each.kwargs)


def _own_limits(route: Any, endpoint: Any, method: str) -> Iterator[Any]:
    found = [each for each in walk_dependencies(getattr(route, "dependant", None)) if isinstance(each, RateLimit)]
    yield from dict.fromkeys(found)  # a request counts once per object
    yield from decorated_limits(endpoint, method)


def _seconds(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds:g} s"


def _bytes(size: float | None) -> str:
    if size is None or size == math.inf:
        return _NONE
    for name, unit in _UNITS:
        if size >= unit and size % unit == 0:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"


async def _no_app(scope: Scope, receive: Receive, send: Send) -> None: ...
