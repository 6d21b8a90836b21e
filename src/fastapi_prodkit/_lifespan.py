"""One lifespan out of several: ours, the user's, and those of mounted apps, which Starlette does not run."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, cast

from fastapi.routing import iter_route_contexts
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router

from fastapi_prodkit import _scope

# Starlette's type is a union of the two cases, state or None; it is the same function that may yield either.
Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def compose(app: Starlette, ours: Sequence[Lifespan]) -> None:
    """Make the app run `ours`, then its own lifespan, then those of the apps mounted in it; and end them in reverse.

    What the lifespans yield as state is merged; the app's own wins over a mounted one's. A mounted app whose lifespan
    the user's own one already runs, which is the known workaround, is not started twice.
    """
    own = cast("Lifespan", app.router.lifespan_context)

    @asynccontextmanager
    async def lifespan(running: Starlette) -> AsyncIterator[Mapping[str, Any] | None]:
        async with AsyncExitStack() as stack:
            for each in ours:
                await stack.enter_async_context(each(running))
            # By identity, because routers have no hash; one that is mounted twice is one.
            mounted = {id(router): (sub, router) for sub, router in _mounted(app.routes)}
            watches = [_Watched(*each) for each in mounted.values() if each[1].lifespan_context is not own]
            own_state = await stack.enter_async_context(own(running))
            state: dict[str, Any] = {}
            for watched in watches:
                if not watched.release():
                    theirs = await stack.enter_async_context(watched.lifespan(watched.app))
                    state |= theirs or {}
            state |= own_state or {}
            yield state or None

    setattr(lifespan, _scope.LIFESPAN_COMPOSED, True)
    app.router.lifespan_context = lifespan  # type: ignore[assignment]  # see Lifespan


class _Watched:
    """Notice whether somebody else starts a mounted app's lifespan."""

    def __init__(self, app: Any, router: Router) -> None:
        self.app = app
        self.lifespan = cast("Lifespan", router.lifespan_context)
        self._router = router
        self._started = False
        router.lifespan_context = self._start  # type: ignore[assignment]  # see Lifespan

    def release(self) -> bool:
        """Put the app's lifespan back, and return whether it has been started."""
        self._router.lifespan_context = self.lifespan  # type: ignore[assignment]  # see Lifespan
        return self._started

    def _start(self, app: Any) -> AbstractAsyncContextManager[Mapping[str, Any] | None]:
        self._started = True
        return self.lifespan(app)


def _mounted(routes: Sequence[BaseRoute]) -> Iterator[tuple[Any, Router]]:
    """Yield each app below the routes with its router, which has the lifespan; a bare router is its own."""
    for context in iter_route_contexts(routes):
        route = context.original_route
        app: Any = route.app if isinstance(route, Mount | Host) else None
        while app is not None and not isinstance(app, Starlette | Router):
            app = getattr(app, "app", None)  # middleware of the mount
        if app is not None:
            router = app if isinstance(app, Router) else app.router
            yield app, router
            if not hasattr(router.lifespan_context, _scope.LIFESPAN_COMPOSED):
                yield from _mounted(router.routes)
