"""The app and its settings, as production would make them, except that nothing is refused."""

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
    """What came of loading; see `Facts`."""

    app: Any = None
    settings: Any = None
    unusable: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    warned: tuple[str, ...] = ()
    failure: str | None = None


def load(target: str | None, *, environment: str, factory: bool = False) -> Loaded:
    """Import the app, if there is one, and read its settings.

    Without an app, or with one that our own error keeps from being made, the settings are `Settings()`.

    Raises:
        UnknownAppError: There is no such module, or nothing of the name in it.
    """
    loaded = Loaded()
    with as_in(environment), production_rules.deferred() as loaded.refused, _collected_warnings() as warned:
        if target is None or not _load_app(loaded, target, factory=factory):
            _read_settings(loaded)
    loaded.warned = tuple(dict.fromkeys(warned))
    return loaded


def _load_app(loaded: Loaded, target: str, *, factory: bool) -> bool:
    """Load the app, or keep why that failed, and say whether no error of ours was in the way."""
    try:
        found = resolve(target, command="doctor")
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
    except Exception as error:  # noqa: BLE001 - whatever an app raises when it is made is what is wrong with it
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
    module = sys.modules.get("fastapi_prodkit.settings")  # loaded, if these are ours
    return module is not None and isinstance(settings, module.Settings)


def unwrap(app: Any) -> Any:
    """Return the app below the middleware that was wrapped around it by hand."""
    from starlette.applications import Starlette  # noqa: PLC0415 - on first use

    seen = app
    while seen is not None and not isinstance(seen, Starlette):
        seen = getattr(seen, "app", None)
    return app if seen is None else seen


def _build(app: Any) -> None:
    """Make the middleware, as the first request would: what cannot be made is told as well."""
    from starlette.applications import Starlette  # noqa: PLC0415 - on first use

    if isinstance(app, Starlette) and app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what is warned about settings, and pass over other warnings."""
    texts: list[str] = []

    def hear(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, SettingsWarning):
            texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", SettingsWarning)
        logging.captureWarnings(capture=True)  # once it is on, an app that switches it on takes nothing away
        warnings.showwarning = hear  # type: ignore[assignment]  # what else it is called with is not needed
        try:
            yield texts
        finally:
            logging.captureWarnings(capture=False)
