"""The hooks of a set of layers, as lists of functions that are ready to be called."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from starlette.types import ASGIApp

__all__ = ["Hooks", "OnEnd", "OnError", "OnRequest", "OnResponseStart", "OnWait", "RawHeaders"]

_Exchange = TypeVar("_Exchange")  # the class Exchange, whose module imports this one

RawHeaders = list[tuple[bytes, bytes]]
OnRequest = Callable[[_Exchange], ASGIApp | None]
OnWait = Callable[[_Exchange, float], None]
OnResponseStart = Callable[[_Exchange, RawHeaders, dict[bytes, bytes]], None]
OnEnd = Callable[[_Exchange], None]
OnError = Callable[[_Exchange, BaseException], bool]


class Hooks(Generic[_Exchange]):
    """The hooks of a set of layers, each list in the order in which it is called.

    Attributes:
        on_request: Outermost first.
        on_wait: Outermost first.
        on_response_start: Innermost first.
        on_plain_response_start: The hooks of `on_response_start` that are called for a plain response, in which the app
            sets no headers other than Content-Type and Content-Length.
        on_end: Innermost first.
        on_error: The hook of the innermost layer that has one, or None.
        may_cancel_app: Some layer may cancel the task that serves the request.
        layers: The layers that handle the request, outermost first, those of outer exchanges included. Of type Any,
            because the module of Layer imports this one.
        further_in: Cache: the hooks of layers inside of these layers. The key is the hooks of the inner layers alone,
            and whether the inner layers have joined the exchange of the outer ones.
    """

    __slots__ = (
        "further_in",
        "layers",
        "may_cancel_app",
        "on_end",
        "on_error",
        "on_plain_response_start",
        "on_request",
        "on_response_start",
        "on_wait",
    )

    def __init__(  # noqa: PLR0913 - one parameter for each hook
        self,
        *,
        on_request: list[OnRequest[_Exchange]],
        on_wait: list[OnWait[_Exchange]],
        on_response_start: list[OnResponseStart[_Exchange]],
        on_plain_response_start: list[OnResponseStart[_Exchange]],
        on_end: list[OnEnd[_Exchange]],
        on_error: OnError[_Exchange] | None,
        may_cancel_app: bool,
        layers: Sequence[Any],
    ) -> None:
        self.on_request = on_request
        self.on_wait = on_wait
        self.on_response_start = on_response_start
        self.on_plain_response_start = on_plain_response_start
        self.on_end = on_end
        self.on_error = on_error
        self.may_cancel_app = may_cancel_app
        self.layers = layers
        self.further_in: dict[tuple[Hooks[_Exchange], bool], Hooks[_Exchange]] = {}

    def joined_to(self, outer: "Hooks[_Exchange]") -> "Hooks[_Exchange]":
        """Return these hooks combined with those of outer layers, except `on_request`, which was called already."""
        return Hooks(
            on_request=self.on_request,
            on_wait=outer.on_wait,
            on_response_start=[*self.on_response_start, *outer.on_response_start],
            on_plain_response_start=[*self.on_plain_response_start, *outer.on_plain_response_start],
            on_end=[*self.on_end, *outer.on_end],
            on_error=self.on_error or outer.on_error,
            may_cancel_app=outer.may_cancel_app,
            layers=self.layers,
        )

    def add_on_response_start(self, hook: OnResponseStart[_Exchange]) -> None:
        """Call `hook` after the `on_response_start` of all layers, in joined hooks and requests in progress too."""
        self.on_response_start.append(hook)
        self.on_plain_response_start.append(hook)
        for (_, joined), inner in self.further_in.items():
            if joined:
                inner.add_on_response_start(hook)
