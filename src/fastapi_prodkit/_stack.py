"""What all middleware here has in common.

A piece says what it does when a request enters, when its response starts and when it is over, and `Stack` calls it.
That is what a chain of ASGI middleware does, at half its price: one look at each message for all of them, the
request's headers parsed once, and no wrapper around a wrapper. A piece that has to wait, or to wrap the app, does so
for the requests that need it. Alone, each piece is an ASGI middleware like any other.
"""

from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from functools import cached_property
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit import _context
from fastapi_prodkit._exchange import KEY, LOGGED, Exchange, RawHeaders
from fastapi_prodkit._waiting import FINISHED, go_on

Fail = Callable[[Exchange, Exception], bool]


class Piece:
    """The base of every middleware. Whatever of the five it does not need, it leaves out, and it costs nothing."""

    app: ASGIApp
    scope_types: frozenset[str] = frozenset({"http"})
    interrupts = False  # it may interrupt the app, and so needs an exchange that is opened where it stands
    starts_usual = True  # its `start` has something to do even if the app sets nothing but type and length

    def enter(self, exchange: Exchange) -> ASGIApp | None:
        """Begin a request. Return what serves it instead, if anything does: a refusal, or what calls `proceed`."""

    def wait(self, exchange: Exchange, since: float) -> None:
        """Take note that the app waits for something, or may from now on: others run meanwhile.

        The app has had the request since then, on the clock of `perf_counter`. For pieces that interrupt: they are told
        when it waits for the first time, before anything else of the event loop runs, and may be told again.
        """

    def start(self, exchange: Exchange, headers: RawHeaders, present: Mapping[bytes, bytes]) -> None:
        """Change the headers of a response that starts, in place; `present` is what the app has set."""

    def leave(self, exchange: Exchange) -> None:
        """Take note of a request that is over."""

    def fail(self, exchange: Exchange, error: Exception) -> bool:  # noqa: ARG002 - for pieces that override it
        """Take note of an exception, and say whether that is the end of it; the innermost piece that does is asked."""
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in self.scope_types:
            await self.app(scope, receive, send)
            return
        exchange = None if self.interrupts else Exchange.current(scope)
        if exchange is None:
            await self._alone(scope, receive, send)
            return
        exchange.join(self._alone)
        await exchange.proceed(receive, send)

    @cached_property
    def _alone(self) -> "Stack":
        return Stack([self], self.app)


_fail_on: Final = Piece().fail  # where no piece has something to say about it


class Stack:
    """Pieces around an app, outermost first.

    A piece that answers a request ends its way in. The pieces further in than the first that may do so have nothing
    to do with responses: they have no `start` and no `leave`.
    """

    def __init__(self, pieces: Sequence[Piece], app: ASGIApp) -> None:
        self.app = app
        inside_out = pieces[::-1]
        self.entering = [piece.enter for piece in pieces if _does(piece, "enter")]
        self.interrupts = any(piece.interrupts for piece in pieces)
        self.waiting = [piece.wait for piece in pieces if _does(piece, "wait")]
        self.starting = [piece.start for piece in inside_out if _does(piece, "start")]
        self.starting_usual = [piece.start for piece in inside_out if piece.starts_usual and _does(piece, "start")]
        self.leaving = [piece.leave for piece in inside_out if _does(piece, "leave")]
        self.failing: Fail = next((piece.fail for piece in inside_out if _does(piece, "fail")), _fail_on)

    def within(self, outer: "Stack") -> "Stack":
        """Return what does for a request what both do, the way in apart."""
        both = Stack.__new__(Stack)  # once for each request: `copy` takes ten times as long
        both.app, both.entering = self.app, self.entering
        both.interrupts, both.waiting = outer.interrupts, outer.waiting
        both.starting = [*self.starting, *outer.starting]
        both.starting_usual = [*self.starting_usual, *outer.starting_usual]
        both.leaving = [*self.leaving, *outer.leaving]
        both.failing = outer.failing if self.failing is _fail_on else self.failing
        return both

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: C901 - a call costs, each time
        """Serve one request."""
        outer: Exchange | None = scope.get(KEY)
        scope[KEY] = exchange = Exchange(self, outer, scope, receive, send)
        token: Token[Any] | None = _context.begin(exchange.context)
        try:
            # What `proceed` does, written out: the call would cost a fiftieth of a request to bare FastAPI.
            for enter in (entering := iter(self.entering)):
                answer = enter(exchange)
                if answer is not None:
                    exchange.stop_at(entering, self.app)
                    await answer(scope, exchange.receive, exchange.send)
                    break
            else:
                steps = self.app(scope, exchange.receive, exchange.send).__await__()
                awaited = next(steps, FINISHED)
                if awaited is not FINISHED:
                    exchange.watch(exchange.begun)
                    await go_on(steps, awaited)
        except CancelledError as cancelled:
            if not await exchange.settle():
                # Before the end of the response: some servers say so of a client that has left.
                exchange.left |= not exchange.complete
                vars(cancelled)[LOGGED] = True  # a stream that ends with the process is no error to be traced
                raise
        except Exception as error:
            await exchange.settle()
            if not exchange.stack.failing(exchange, error):
                # Of one that was not logged the context stays: the server logs it after this call.
                token = token if LOGGED in vars(error) else None
                raise
        else:
            if exchange.interruption is not None:
                await exchange.settle()
        finally:
            exchange.end()
            # What refers to the exchange, and is referred to by it, would be a cycle for the garbage collector to find.
            scope[KEY] = outer
            exchange.from_server = receive
            if token is not None:
                _context.end(token)


def _does(piece: Piece, role: str) -> bool:
    return getattr(type(piece), role) is not getattr(Piece, role)
