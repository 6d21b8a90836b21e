"""Three probes: `/health` the process answers, `/ready` it should be sent traffic, `/startup` it has come up.

Liveness touches nothing else: a probe that asks the database restarts the whole fleet when the database is down.
Readiness runs the checks, all at once, each within its time. Their results are reused for a moment, and probes that
come at the same time share one run, so that probing costs the same however many balancers ask.

The routes are plain Starlette routes, in both spellings of the path: they are never redirected, are not part of the
OpenAPI schema, and dependencies of the app, such as authentication, do not run for them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

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
        settings: The paths, time for one check, how long results are reused, and who is told the details.
        checks: Name -> check, which may be a `HealthCheck` with options of its own. A check raises to fail, and raises
            `CheckWarning` to pass with status `warn`. The mapping is read at each run, so checks can be added later.
        draining: Read first on every readiness probe; while it returns True the answer is 503.
        warning: Read on every liveness probe: what is wrong with a process that still answers, or None. It says so
            with status `warn`, and with 200.
        registry: Where wrong tokens are counted; prometheus_client's default registry unless given.
        clock: Seconds, as `time.monotonic` counts them; decides when a result is too old.

    Raises:
        ConfigurationError: A check has no name, or is not an async callable.
    """
    settings = settings or HealthSettings()
    watched = Checks(settings, {} if checks is None else checks, clock)
    token = None if settings.token is None else BearerToken(settings.token, registry=registry)

    def is_told(request: Request) -> bool:
        """Say whether the client may know more than the status; a wrong token is no reason to leave it unanswered."""
        return settings.details or (token is not None and token.is_sent(request))

    async def live(request: Request) -> JSONResponse:
        wrong = warning() if warning is not None else None
        if wrong is None:
            return _response({"status": "pass"})
        return _response({"status": "warn", "output": wrong} if is_told(request) else {"status": "warn"})

    async def ready(request: Request) -> JSONResponse:
        if draining is not None and draining():
            return _response({"status": "fail"})
        return await report(request, startup=False)

    async def startup(request: Request) -> JSONResponse:
        return await report(request, startup=True)

    async def report(request: Request, *, startup: bool) -> JSONResponse:
        found = await watched.report(startup=startup, details=is_told(request))
        return _response(found, retry_after=settings.cache)

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
