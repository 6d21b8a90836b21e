"""Combine several lifespans into one: ours, the user's, and those of mounted apps, which Starlette does not run."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, cast

from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router

from fastapi_prodkit import _scope
from fastapi_prodkit.exceptions import ConfigurationError

# Starlette's type is a union of two kinds of lifespan, with and without state; here one function may yield either.
Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def compose(app: Starlette, ours: Sequence[Lifespan], *, mounted: bool = True) -> None:
    """Make the app run `ours`, then its own lifespan, then those of the apps mounted in it; and end them in reverse.

    The states that the lifespans yield are merged; the app's own wins over that of a mounted app. A mounted app's
    lifespan that the app's own lifespan has started, a known workaround, is not started again. With `mounted=False`
    the lifespans of mounted apps are left to the app's own lifespan.
    """
    own = cast("Lifespan", app.router.lifespan_context)

    @asynccontextmanager
    async def lifespan(running: Starlette) -> AsyncIterator[Mapping[str, Any] | None]:
        async with AsyncExitStack() as stack:
            for each in ours:
                await stack.enter_async_context(each(running))
            watches = _watch(app, own) if mounted else []
            own_state = await stack.enter_async_context(own(running))
            state: dict[str, Any] = {}
            for watched in watches:
                if not watched.release():
                    state |= await watched.enter(stack) or {}
            state |= own_state or {}
            yield state or None

    setattr(lifespan, _scope.LIFESPAN_COMPOSED, True)
    app.router.lifespan_context = lifespan  # type: ignore[assignment]  # see Lifespan


class _Watched:
    """Detect whether the app's own lifespan starts the lifespan of a mounted app."""

    def __init__(self, place: str, app: Any, router: Router) -> None:
        self._place = place
        self._app = app
        self._lifespan = cast("Lifespan", router.lifespan_context)
        self._router = router
        self._started = False
        router.lifespan_context = self._start  # type: ignore[assignment]  # see Lifespan

    def release(self) -> bool:
        """Restore the lifespan of the mounted app, and return whether it has been started."""
        self._router.lifespan_context = self._lifespan  # type: ignore[assignment]  # see Lifespan
        return self._started

    async def enter(self, stack: AsyncExitStack) -> Mapping[str, Any] | None:
        """Start the app's lifespan, and return its state.

        Raises:
            ConfigurationError: The lifespan raises a RuntimeError, as a session manager does that is started twice.
        """
        try:
            return await stack.enter_async_context(self._lifespan(self._app))
        except RuntimeError as error:
            raise ConfigurationError(
                f"the lifespan of the app mounted at {self._place} cannot start: {error} (if your own lifespan "
                "starts it already, pass mounted_lifespans=False to create_app or install)"
            ) from error

    def _start(self, app: Any) -> AbstractAsyncContextManager[Mapping[str, Any] | None]:
        self._started = True
        return self._lifespan(app)


def _watch(app: Starlette, own: Lifespan) -> list[_Watched]:
    mounted = list(_mounted(app.routes, "", {id(app.router): app.router}))  # before lifespans are replaced
    return [_Watched(*each) for each in mounted if each[-1].lifespan_context is not own]


def _mounted(routes: Sequence[Any], prefix: str, seen: dict[int, Any]) -> Iterator[tuple[str, Any, Router]]:
    """Yield the path of each mounted app, the app, and its router, which has the lifespan.

    A router that is mounted twice is found once, and so is an app inside of itself: `seen` has each object by its
    identity, because routers have no hash.
    """
    for route in routes:
        # Not iter_route_contexts: FastAPI caches its result, and an app may change its routes until start-up is over.
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _mounted(included.routes, prefix + route.include_context.prefix, seen)
        app: Any = route.app if isinstance(route, Mount | Host) else None
        place = prefix + (route.host if isinstance(route, Host) else getattr(route, "path", ""))
        while app is not None and not isinstance(app, Starlette | Router) and id(app) not in seen:
            seen[id(app)] = app
            app = getattr(app, "app", None)  # middleware of the mount
        router = app.router if isinstance(app, Starlette) else app  # a bare router is its own app
        if router is None or id(router) in seen:
            continue
        seen[id(router)] = router
        yield place or "/", app, router
        if not hasattr(router.lifespan_context, _scope.LIFESPAN_COMPOSED):
            yield from _mounted(router.routes, place, seen)
