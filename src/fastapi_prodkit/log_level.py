"""Change the level of a logger while the service runs, for a limited time.

`GET /log-level` shows the changes, `POST` makes one, `DELETE` reverts. The path exists only if the settings have a
token. Each change and each revert is logged.

A change applies to the process that receives the request. Other workers and containers keep their levels. Each answer
says so, and has the process id.
"""

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Lock, Timer
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from fastapi_prodkit import _scope
from fastapi_prodkit._asgi import LabelledRoute
from fastapi_prodkit._bearer import BearerToken
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.sections import LogSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["log_level_router"]

_LONGEST = 3600.0  # seconds
_REACH = "this process only; other workers and containers keep their levels"

_logger = logging.getLogger(__name__)


def log_level_router(settings: LogSettings | None = None, *, registry: "CollectorRegistry | None" = None) -> APIRouter:
    """Return a router with `/log-level`, or an empty one without `level_token` in the settings.

    The client has to send `Authorization: Bearer <token>`. The route is a plain Starlette route: it is not part of the
    OpenAPI schema, and dependencies of the app do not run for it. Wrong tokens are counted in the registry.
    """
    settings = settings or LogSettings()
    if settings.level_token is None:
        return APIRouter()
    token = BearerToken(settings.level_token, registry=registry)
    levels = _Levels()

    async def log_level(request: Request) -> JSONResponse:
        token.authorize(request)
        if request.method == "POST":
            levels.change(await _read(request))
        elif request.method == "DELETE":
            levels.revert(request.query_params.get("logger"))
        return JSONResponse(levels.state(), headers={"cache-control": "no-store"})

    vars(log_level)[_scope.ENDPOINT_ACCESS] = "LOG_LEVEL_TOKEN"
    methods = ["GET", "POST", "DELETE"]
    return APIRouter(routes=[LabelledRoute(path, log_level, methods=methods) for path in ("/log-level", "/log-level/")])


def _upper(level: Any) -> Any:
    return level.upper() if isinstance(level, str) else level


class _NewLevel(BaseModel):
    """The body of a POST."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    logger: str
    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)]
    seconds: float = Field(gt=0, le=_LONGEST)


@dataclass(frozen=True, slots=True)
class _Change:
    logger: logging.Logger
    level: str
    before: int
    until: datetime
    timer: Timer

    def state(self) -> dict[str, str]:
        until = self.until.isoformat(timespec="seconds").replace("+00:00", "Z")
        before = logging.getLevelName(self.before)
        return {"logger": self.logger.name, "level": self.level, "before": before, "until": until}


class _Levels:
    """The levels that are changed in this process.

    A thread reverts each change, and not the event loop, which may be blocked by too many log lines.
    """

    def __init__(self) -> None:
        self._changes: dict[str, _Change] = {}
        self._lock = Lock()

    def state(self) -> dict[str, Any]:
        """Return the changes, and the process that they apply to."""
        with self._lock:
            return {
                "process": os.getpid(),
                "reach": _REACH,
                "changes": [change.state() for change in self._changes.values()],
            }

    def change(self, wanted: _NewLevel) -> None:
        """Set the level, and start the timer that reverts it; an earlier change of the same logger is replaced."""
        logger = _logger_of(wanted.logger)
        with self._lock:
            earlier = self._changes.get(logger.name)
            before = earlier.before if earlier else logger.level
            if earlier:
                earlier.timer.cancel()
            timer = Timer(wanted.seconds, lambda: self._end(change))
            timer.daemon = True
            until = datetime.now(UTC) + timedelta(seconds=wanted.seconds)
            change = self._changes[logger.name] = _Change(logger, wanted.level, before, until, timer)
            _logger.warning("log level of %s: %s for %g s", logger.name, wanted.level, wanted.seconds)
            logger.setLevel(wanted.level)
            timer.start()

    def revert(self, name: str | None) -> None:
        """Revert the change of one logger, or all of them, before its time."""
        for change in list(self._changes.values()):
            if name in (None, change.logger.name):
                self._end(change)

    def _end(self, change: _Change) -> None:
        with self._lock:
            if self._changes.get(change.logger.name) is not change:  # replaced or reverted meanwhile
                return
            del self._changes[change.logger.name]
            change.timer.cancel()
            change.logger.setLevel(change.before)
        _logger.warning("log level of %s: %s again", change.logger.name, logging.getLevelName(change.before))


def _logger_of(name: str) -> logging.Logger:
    """Return the existing logger of that name: `getLogger` would create a misspelt one, which has no effect."""
    if name != "root" and name not in logging.root.manager.loggerDict:
        raise ProblemError(422, "There is no logger of that name in this process; the root logger is `root`.")
    return logging.getLogger(name)


async def _read(request: Request) -> _NewLevel:
    try:
        return _NewLevel.model_validate_json(await request.body())
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]) from None
