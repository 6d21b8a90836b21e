"""The checks of readiness and start-up, each with a time-out, a cache and a severity."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC, datetime
from types import FunctionType, MethodType
from typing import Any, Literal

from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError
from fastapi_prodkit.sections import HealthSettings

__all__ = ["Check", "Checks", "HealthCheck"]

Check = Callable[[], Awaitable[None]]
_Status = Literal["pass", "warn", "fail"]
_SEVERITY: tuple[_Status, ...] = ("pass", "warn", "fail")

_logger = logging.getLogger("fastapi_prodkit.health")


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """A check with its own options. It can be called like the wrapped check, so it is a check itself.

    Args:
        call: The check.
        timeout: Longest time for the check, seconds; HEALTH_TIMEOUT unless given.
        cache: How long its result is reused, seconds; HEALTH_CACHE unless given.
        critical: Whether a failure makes the service fail; otherwise a failure is a warning.
        startup: Whether the check is for start-up: `/startup` and `/ready` fail until it has passed once, and then it
            is not called again.

    Raises:
        ConfigurationError: A time is out of range.
    """

    call: Check
    _: KW_ONLY
    timeout: float | None = None
    cache: float | None = None
    critical: bool = True
    startup: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ConfigurationError("HealthCheck: timeout must be more than 0 seconds; leave it out for the default")
        if self.cache is not None and not self.cache >= 0:
            raise ConfigurationError("HealthCheck: cache must be 0 or more seconds; with 0 every probe runs the check")

    def __call__(self) -> Awaitable[None]:
        """Call the check, and return its result."""
        return self.call()


class Checks:
    """Run the checks that are due, all at once, and report the worst status.

    Raises:
        ConfigurationError: A check has no name, or is not an async callable.
    """

    def __init__(self, settings: HealthSettings, checks: Mapping[str, Check], clock: Callable[[], float]) -> None:
        for name, check in checks.items():
            _verify(name, check.call if isinstance(check, HealthCheck) else check)
        self._settings = settings
        self._checks = checks
        self._clock = clock
        self._watches: dict[str, _Watch] = {}

    async def report(self, *, startup: bool, details: bool) -> dict[str, Any]:
        """Return the worst status of all checks, or of start-up checks only; with details, each check's result too."""
        watches = {name: self._watch(name, check) for name, check in self._checks.items()}
        if startup:
            watches = {name: watch for name, watch in watches.items() if watch.options.startup}
        runs = [watch.run() for watch in watches.values() if watch.is_due()]
        if runs:
            await asyncio.wait(runs)  # not gather(), which cancels the runs when a client disconnects
        results = {name: watch.result for name, watch in watches.items()}
        worst = max((result.status for result in results.values()), key=_SEVERITY.index, default="pass")
        if not details:
            return {"status": worst}
        return {"status": worst, "checks": {name: [result.details()] for name, result in results.items()}}

    def _watch(self, name: str, check: Check) -> "_Watch":
        watch = self._watches.get(name)
        if watch is None or watch.check is not check:
            watch = self._watches[name] = _Watch(name, check, self._settings, self._clock)
        return watch


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of one check, with the terms of draft-inadarei-api-health-check-06, section 4."""

    status: _Status
    seconds: float
    output: str | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def details(self) -> dict[str, Any]:
        milliseconds = round(self.seconds * 1000, 1)
        at = self.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        details = {"status": self.status, "observedValue": milliseconds, "observedUnit": "ms", "time": at}
        return details if self.output is None else {**details, "output": self.output}


class _Watch:
    """One check with its last result, and its current run, which probes at the same time share."""

    def __init__(self, name: str, check: Check, settings: HealthSettings, clock: Callable[[], float]) -> None:
        self.check = check
        self.options = options = check if isinstance(check, HealthCheck) else HealthCheck(check)
        self.result: _Result
        self._name = name
        self._timeout = settings.timeout if options.timeout is None else options.timeout
        self._cache = settings.cache if options.cache is None else options.cache
        self._clock = clock
        self._expires = -math.inf
        self._failing = False
        self._call: asyncio.Task[_Result] | None = None
        self._running: asyncio.Task[None] | None = None

    def is_due(self) -> bool:
        return self._clock() >= self._expires

    def run(self) -> asyncio.Task[None]:
        """Return the current run, or start one."""
        if self._running is None or _is_over(self._running):
            self._running = asyncio.create_task(self._run())
        return self._running

    async def _run(self) -> None:
        if self._call is None or _is_over(self._call):  # a call that ignores its cancellation is not repeated
            self._call = asyncio.create_task(_call(self._name, self.check))
        call = self._call
        # Neither wait_for() nor timeout(): both wait until the call that they have cancelled has ended.
        await asyncio.wait([call], timeout=self._timeout)
        if not call.done() and not call.cancelling():  # once: a driver cancelled again leaves its query running
            call.cancel()
        self._keep(_Result("fail", self._timeout, "timed out") if call.cancelling() else call.result())

    def _keep(self, result: _Result) -> None:
        fails = result.status == "fail"
        if fails and not self._failing:
            _logger.warning("check %s fails: %s", self._name, result.output)
        elif self._failing and not fails:
            _logger.info("check %s has recovered", self._name)
        self._failing = fails
        self.result = replace(result, status="warn") if fails and not self.options.critical else result
        started = self.options.startup and not fails
        self._expires = math.inf if started else self._clock() + self._cache


async def _call(name: str, check: Check) -> _Result:
    """Run one check. The result has no message of an exception, which may contain credentials."""
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
    """Return whether the task has ended, by itself or together with its event loop."""
    return task.done() or task.get_loop() is not asyncio.get_running_loop()


def _verify(name: str, check: Check) -> None:
    if not name:
        raise ConfigurationError("checks: a check has an empty name; name it after what it checks, such as 'database'")
    if not callable(check):
        raise ConfigurationError(f"checks: {name!r} is not callable; pass the async function, without calling it")
    # A lambda or a callable object may return an awaitable; if it does not, its check fails with this reason.
    function = inspect.unwrap(check)
    declared = isinstance(function, FunctionType | MethodType) and function.__name__ != "<lambda>"
    if declared and not inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"checks: {name!r} is not async; declare it with `async def`")
