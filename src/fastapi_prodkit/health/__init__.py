"""Three probes: `/health` (the process responds), `/ready` (it can serve traffic), `/startup` (it has started).

Liveness runs no checks: a probe that asked the database would restart every process when the database is down.
Readiness runs all checks at once, each with a time-out. Results are cached for a moment, and probes that arrive at the
same time share one run, so that the cost does not grow with the number of load balancers.

The routes are plain Starlette routes, with and without a trailing slash: they are never redirected, are not part of the
OpenAPI schema, and dependencies of the app, such as authentication, do not run for them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LabelledRoute
from fastapi_prodkit._bearer import BearerToken
from fastapi_prodkit.health.checks import Check, Checks, HealthCheck
from fastapi_prodkit.sections import HealthSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Check", "HealthCheck", "health_router"]


def health_router(  # noqa: PLR0913 - keywords
    settings: HealthSettings | None = None,
    *,
    checks: Mapping[str, Check] | None = None,
    draining: Callable[[], bool] | None = None,
    warning: Callable[[], str | None] | None = None,
    registry: "CollectorRegistry | None" = None,
    clock: Callable[[], float] = time.monotonic,
) -> APIRouter:
    """Return a router that answers GET and HEAD on the paths of the three probes.

    Args:
        settings: The paths, the time-out of a check, how long results are cached, and who sees the details.
        checks: Name -> check, which may be a `HealthCheck` with options of its own. A check raises to fail, and raises
            `CheckWarning` to pass with status `warn`. The mapping is read at each run, so checks can be added later.
        draining: Called first on every readiness probe; while it returns True the answer is 503.
        warning: Called on every liveness probe; returns what is wrong with the process, or None. The process still
            responds, so the answer is 200 with the status `warn`.
        registry: Where wrong tokens are counted; prometheus_client's default registry unless given.
        clock: Seconds, as `time.monotonic` counts them; decides when a result is too old.

    Raises:
        ConfigurationError: A check has no name, or is not an async callable.
    """
    settings = settings or HealthSettings()
    watched = Checks(settings, {} if checks is None else checks, clock)
    token = None if settings.token is None else BearerToken(settings.token, registry=registry)

    def may_see_details(request: Request) -> bool:
        """Return whether the client may see the details; without the right token it gets the status only."""
        return settings.details or (token is not None and token.is_sent(request))

    async def live(request: Request) -> JSONResponse:
        wrong = warning() if warning is not None else None
        if wrong is None:
            return _response({"status": "pass"})
        return _response({"status": "warn", "output": wrong} if may_see_details(request) else {"status": "warn"})

    async def ready(request: Request) -> JSONResponse:
        if draining is not None and draining():
            return _response({"status": "fail"})
        return await report(request, startup=False)

    async def startup(request: Request) -> JSONResponse:
        return await report(request, startup=True)

    async def report(request: Request, *, startup: bool) -> JSONResponse:
        found = await watched.report(startup=startup, details=may_see_details(request))
        return _response(found, retry_after=settings.cache)

    for probe in (live, ready, startup):
        vars(probe)[_scope.ENDPOINT_ACCESS] = "probe"
    probes = ((settings.live_paths, live), (settings.ready_paths, ready), (settings.startup_paths, startup))
    return APIRouter(routes=[LabelledRoute(path, probe) for paths, probe in probes for path in _spellings(paths)])


def _spellings(paths: Sequence[str]) -> list[str]:
    return [spelling for path in paths for spelling in ((path, f"{path}/") if path != "/" else (path,))]


def _response(report: Mapping[str, Any], retry_after: float = 0) -> JSONResponse:
    headers = {"cache-control": "no-store"}
    if report["status"] != "fail":
        return JSONResponse(report, 200, headers, "application/health+json")
    headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    return JSONResponse(report, 503, headers, "application/health+json")
