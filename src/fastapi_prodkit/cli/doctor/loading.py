"""Load the app and its settings as in production, but without refusing unsafe settings."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi_prodkit._config import production_rules
from fastapi_prodkit.cli.failure import describe
from fastapi_prodkit.cli.target import UnknownAppError, as_in, resolve
from fastapi_prodkit.exceptions import ProdkitError, SettingsError, SettingsWarning

__all__ = ["Loaded", "load", "unwrap"]

_TERMINATED = 128 + signal.SIGTERM


@dataclass
class Loaded:
    """The result of loading; see `Facts`."""

    app: Any = None
    settings: Any = None
    unusable: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    warned: tuple[str, ...] = ()
    failure: str | None = None


def load(target: str | None, *, environment: str, factory: bool = False, command: str = "doctor") -> Loaded:
    """Import the app, if one is named, and read its settings.

    Without an app, or if an error of this package prevents loading it, the settings are `Settings()`.

    Args:
        target: The app, as module:app; None without one.
        environment: Value of ENVIRONMENT.
        factory: Whether the target is a function that returns the app.
        command: The command that loads it, for suggestions.

    Raises:
        UnknownAppError: The module does not exist, or does not have this name.
    """
    loaded = Loaded()
    with as_in(environment), production_rules.deferred() as loaded.refused, _collected_warnings() as warned:
        if target is None or not _load_app(loaded, target, factory=factory, command=command):
            _read_settings(loaded)
    loaded.warned = tuple(dict.fromkeys(warned))
    return loaded


def _load_app(loaded: Loaded, target: str, *, factory: bool, command: str) -> bool:
    """Load the app or store the failure; return False if an error of this package was the reason."""
    try:
        found = resolve(target, command=command)
        loaded.app = unwrap(found() if factory else found)
        _build(loaded.app)
    except UnknownAppError:
        raise
    except SystemExit as error:
        if error.code == _TERMINATED:
            raise
        loaded.failure = f"it ends the process: sys.exit({error.code!r})"
    except SettingsError as error:
        loaded.unusable = error.problems
        return False
    except Exception as error:  # noqa: BLE001 - any error of the app is reported
        loaded.failure = describe(error)
        return not isinstance(error, ProdkitError)
    else:
        state = getattr(getattr(loaded.app, "state", None), "settings", None)
        loaded.settings = state if _is_ours(state) else None
    return True


def _read_settings(loaded: Loaded) -> None:
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - `--help` does not need it

    try:
        loaded.settings = Settings()
    except SettingsError as error:
        loaded.unusable |= error.problems


def _is_ours(settings: Any) -> bool:
    module = sys.modules.get("fastapi_prodkit.settings")  # imported already if these settings are ours
    return module is not None and isinstance(settings, module.Settings)


def unwrap(app: Any) -> Any:
    """Return the app inside middleware that was wrapped around the app object."""
    from starlette.applications import Starlette  # noqa: PLC0415 - on first use

    seen = app
    while seen is not None and not isinstance(seen, Starlette):
        seen = getattr(seen, "app", None)
    return app if seen is None else seen


def _build(app: Any) -> None:
    """Build the middleware stack, as the first request would, so that its errors are reported."""
    from starlette.applications import Starlette  # noqa: PLC0415 - on first use

    if isinstance(app, Starlette) and app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect warnings about settings, and ignore other warnings."""
    texts: list[str] = []

    def collect(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, SettingsWarning):
            texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", SettingsWarning)
        logging.captureWarnings(capture=True)  # first: later calls by the app have no effect
        warnings.showwarning = collect  # type: ignore[assignment]  # the other arguments are not needed
        try:
            yield texts
        finally:
            logging.captureWarnings(capture=False)
