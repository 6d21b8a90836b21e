"""`fastapi-prodkit serve module:app`: run uvicorn with production defaults."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastapi_prodkit import _extras
from fastapi_prodkit._config.production_rules import SEPARATE_COUNTS, counts_separately
from fastapi_prodkit.cli.failure import logged_failure
from fastapi_prodkit.cli.target import resolve
from fastapi_prodkit.exceptions import SettingsError

__all__ = ["app"]

KEEP_ALIVE = 75  # seconds; longer than a load balancer's (ALB: 60), so that the load balancer closes connections first

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(  # noqa: PLR0913 - an option each
    application: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Such as service.main:app.")],
    *,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", envvar="HOST", help="Address to listen on; 0.0.0.0 in a container.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="NUMBER", envvar="PORT", min=0, max=65535, help="Port to listen on.")
    ] = 8000,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            envvar="WEB_CONCURRENCY",
            min=1,
            help="Number of worker processes; by default one per available core.",
        ),
    ] = None,
    header_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Time-out for the head of a request, seconds.")
    ] = 10.0,
    factory: Annotated[bool, typer.Option("--factory", help="APP is a function that returns the app.")] = False,
) -> None:
    """Serve an app with uvicorn and production defaults.

    The app configures logging, with one line per request. There is no Server header. Idle connections are kept for
    75 s. At shutdown, requests have SHUTDOWN_GRACE seconds to finish. X-Forwarded-* headers are accepted from
    PROXY_TRUSTED only. A slow client gets 408 after --header-timeout. Without a shared store for rate limits, the
    default is one worker.
    """
    _extras.require("uvicorn", extra="standard")
    from fastapi_prodkit.cli.supervisor import ServeConfig  # noqa: PLC0415 - an extra

    sys.path.insert(0, str(Path.cwd()))
    with logged_failure():
        settings = _settings_of(_load(application, factory=factory))
        processes = workers or _default_workers(settings)
        _refuse_workers(settings, processes)
    config = ServeConfig(
        application,
        factory=factory,
        host=host,
        port=port,
        workers=processes,
        http=_protocol(),
        log_config=None if processes == 1 and logging.root.handlers else _parent_log(settings),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=_grace(settings),  # type: ignore[arg-type]  # passed to asyncio, which accepts a float
        lifespan="on",
    )
    config.header_timeout = header_timeout  # the config is passed to each worker
    config.limits = _limits(settings)
    _announce(config, processes)
    raise typer.Exit(_run(config, processes))


def _load(application: str, *, factory: bool) -> Any:
    loaded = resolve(application, command="serve")
    return loaded() if factory else loaded


def _settings_of(loaded: Any) -> Any:
    """Return the settings that create_app stored with the app; None for other apps."""
    return getattr(getattr(loaded, "state", None), "settings", None)


def _refuse_workers(settings: Any, processes: int) -> None:
    """Refuse settings that each worker would refuse: uvicorn would restart the workers for ever."""
    strict = settings is not None and settings.environment in ("staging", "prod")
    if processes > 1 and strict and counts_separately(settings.rate_limit):
        raise SettingsError({"RATE_LIMIT_ENABLED": f"each of {processes} worker processes {SEPARATE_COUNTS}"})


def _default_workers(settings: Any) -> int:
    if counts_separately(getattr(settings, "rate_limit", None)):
        return 1  # several workers would count separately
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def _grace(settings: Any) -> float:
    from fastapi_prodkit.sections import ShutdownSettings  # noqa: PLC0415 - `--help` does not need it

    shutdown = getattr(settings, "shutdown", None) or ShutdownSettings()
    return float(shutdown.grace)


def _limits(settings: Any) -> Any:
    """Return the section with the limits of a head; None if the app has turned it off."""
    from fastapi_prodkit.sections import LimitsSettings  # noqa: PLC0415 - `--help` does not need it

    return LimitsSettings() if settings is None else settings.limits


def _protocol() -> Any:
    """Return the protocol that limits heads; "auto", uvicorn's own choice, if httptools is not installed."""
    try:
        from fastapi_prodkit.cli.protocol import HeadLimitProtocol  # noqa: PLC0415 - an extra
    except ImportError:
        return "auto"
    return HeadLimitProtocol


def _parent_log(settings: Any) -> dict[str, Any]:
    """Return a logging configuration for a process whose app configures none, such as the parent of the workers."""
    service = getattr(settings, "service", None)
    handler = {
        "()": "fastapi_prodkit.logging.EventHandler",
        "settings": getattr(settings, "log", None),
        "service": getattr(service, "name", "fastapi-service"),
        "version": getattr(service, "version", "0.0.0"),
        "environment": getattr(settings, "environment", "prod"),
    }
    root = {"handlers": ["stdout"], "level": "INFO"}
    return {"version": 1, "disable_existing_loggers": False, "handlers": {"stdout": handler}, "root": root}


def _announce(config: Any, processes: int) -> None:
    logging.getLogger("fastapi_prodkit.serve").info(
        "serving %s: %d worker%s, keep-alive %d s, header timeout %g s, shutdown grace %g s",
        config.app,
        processes,
        "s" * (processes > 1),
        config.timeout_keep_alive,
        config.header_timeout,
        config.timeout_graceful_shutdown,
    )


def _run(config: Any, processes: int) -> int:
    from uvicorn import Server  # noqa: PLC0415 - an extra

    from fastapi_prodkit.cli.supervisor import Supervisor, bound_exit  # noqa: PLC0415 - an extra
    from fastapi_prodkit.shutdown.termination import FAILED_START  # noqa: PLC0415 - `--help` does not need it

    if processes > 1:
        os.environ["WEB_CONCURRENCY"] = str(processes)  # for the workers, which inherit it
        supervisor = Supervisor(config, [config.bind_socket()])
        supervisor.run()
        code = FAILED_START if supervisor.start_failed else 0
        bound_exit(code)
        return code
    server = Server(config)
    server.run()
    return 0 if server.started else FAILED_START
