"""Two probes: `/health` says that the process can answer, `/ready` that it should be sent traffic.

Liveness touches nothing else: a probe that asks the database restarts the whole fleet when the database is down.
Readiness runs the checks, all at once, each within its time. Their result is reused for a moment, and probes that
come at the same time share one run, so that probing costs the same however many balancers ask.

The routes are plain Starlette routes, in both spellings of the path: they are never redirected, are not part of the
OpenAPI schema, and dependencies of the app, such as authentication, do not run for them.
"""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FunctionType, MethodType
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError
from fastapi_prodkit.sections import HealthSettings

__all__ = ["Check", "health_router"]

Check = Callable[[], Awaitable[None]]
_Status = Literal["pass", "warn", "fail"]
_SEVERITY: tuple[_Status, ...] = ("pass", "warn", "fail")

_logger = logging.getLogger(__name__)


def health_router(
    settings: HealthSettings | None = None,
    *,
    checks: Mapping[str, Check] | None = None,
    draining: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> APIRouter:
    """Return a router that answers GET and HEAD on `/health` and `/ready`.

    Args:
        settings: Time for one check, how long results are reused, and whether the answer names the checks.
        checks: Name -> check. A check raises to fail, and raises `CheckWarning` to pass with status `warn`. The
            mapping is read at each run, so checks can be added to it later.
        draining: Read first on every readiness probe; while it returns True the answer is 503.
        clock: Seconds, as `time.monotonic` counts them; decides when a result is too old.

    Raises:
        ConfigurationError: A check has no name, or is not an async callable.
    """
    for name, check in (checks or {}).items():
        _verify(name, check)
    readiness = _Readiness(settings or HealthSettings(), {} if checks is None else checks, clock)

    async def health(_: Request) -> JSONResponse:
        return _response({"status": "pass"})

    async def ready(_: Request) -> JSONResponse:
        if draining is not None and draining():
            return _response({"status": "fail"})
        return await readiness.response()

    return APIRouter(
        routes=[Route(f"/{probe.__name__}{slash}", probe) for probe in (health, ready) for slash in ("", "/")]
    )


@dataclass(frozen=True, slots=True)
class _Result:
    """What one check came to, in the words of draft-inadarei-api-health-check-06, section 4."""

    status: _Status
    seconds: float
    output: str | None = None

    def details(self, at: str) -> dict[str, Any]:
        milliseconds = round(self.seconds * 1000, 1)
        details = {"status": self.status, "observedValue": milliseconds, "observedUnit": "ms", "time": at}
        return details if self.output is None else {**details, "output": self.output}


class _Readiness:
    """Run the checks, remember for a moment what they said, and let concurrent probes share one run."""

    def __init__(self, settings: HealthSettings, checks: Mapping[str, Check], clock: Callable[[], float]) -> None:
        self._settings = settings
        self._checks = checks
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[_Result]] = {}
        self._failing: set[str] = set()
        self._report: dict[str, Any] = {}
        self._expires = -math.inf

    async def response(self) -> JSONResponse:
        if self._clock() >= self._expires:
            await self._run_checks()
        return _response(self._report, retry_after=self._settings.cache)

    async def _run_checks(self) -> None:
        running = {name: self._start(name, check) for name, check in self._checks.items()}
        if running:
            # Neither wait_for() nor timeout(): both cancel what they wait for when a client leaves, and both go on
            # waiting until what they cancelled has really ended.
            await asyncio.wait(running.values(), timeout=self._settings.timeout)
        results = {name: self._result(task) for name, task in running.items()}
        self._log_changes(results)
        self._report = self._summary(results)
        self._expires = self._clock() + self._settings.cache

    def _start(self, name: str, check: Check) -> asyncio.Task[_Result]:
        # A task that is still running is joined: by probes that come at the same time, and by later ones if the check
        # ignores its cancellation.
        task = self._tasks.get(name)
        if task is None or _is_over(task):
            task = self._tasks[name] = asyncio.create_task(_examine(name, check))
        return task

    def _result(self, task: asyncio.Task[_Result]) -> _Result:
        if task.done():
            return task.result()
        if not task.cancelling():  # once: a database driver that is cancelled again leaves its query running
            task.cancel()
        return _Result("fail", self._settings.timeout, "timed out")

    def _log_changes(self, results: Mapping[str, _Result]) -> None:
        failing = {name for name, result in results.items() if result.status == "fail"}
        for name in failing - self._failing:
            _logger.warning("check %s fails: %s", name, results[name].output)
        for name in self._failing - failing:
            _logger.info("check %s has recovered", name)
        self._failing = failing

    def _summary(self, results: Mapping[str, _Result]) -> dict[str, Any]:
        worst = max((result.status for result in results.values()), key=_SEVERITY.index, default="pass")
        if not self._settings.details:
            return {"status": worst}
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"status": worst, "checks": {name: [result.details(at)] for name, result in results.items()}}


async def _examine(name: str, check: Check) -> _Result:
    """Run one check to its end. Messages of exceptions stay out of the result: they may carry credentials."""
    started = time.perf_counter()
    status: _Status = "pass"
    output: str | None = None
    try:
        outcome: object = check()
        if inspect.isawaitable(outcome):
            await outcome
        else:
            status, output = "fail", "not async: the check returned no awaitable"
    except CheckWarning as warning:
        status, output = "warn", str(warning)
    except (Exception, asyncio.CancelledError) as error:  # whatever a check raises is its result
        _logger.debug("check %s raised", name, exc_info=error)
        status, output = "fail", type(error).__name__
    return _Result(status, time.perf_counter() - started, output)


def _is_over(task: asyncio.Task[Any]) -> bool:
    """Whether the task has ended, by itself or together with its event loop."""
    return task.done() or task.get_loop() is not asyncio.get_running_loop()


def _response(report: Mapping[str, Any], retry_after: float = 0) -> JSONResponse:
    headers = {"cache-control": "no-store"}
    if report["status"] != "fail":
        return JSONResponse(report, 200, headers, "application/health+json")
    headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    return JSONResponse(report, 503, headers, "application/health+json")


def _verify(name: str, check: Check) -> None:
    if not name:
        raise ConfigurationError("checks: a check has an empty name; name what it looks at, such as 'database'")
    if not callable(check):
        raise ConfigurationError(f"checks: {name!r} is not callable; pass the async function, without calling it")
    # Lambdas and callable objects may well return an awaitable; if one does not, its check fails and says so.
    function = inspect.unwrap(check)
    declared = isinstance(function, FunctionType | MethodType) and function.__name__ != "<lambda>"
    if declared and not inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"checks: {name!r} is not async; declare it with `async def`")
