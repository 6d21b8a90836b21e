"""One run of the doctor: gather the facts, then apply every rule to them."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi_prodkit._config.worker_count import configured_workers
from fastapi_prodkit.cli.doctor import environment_facts
from fastapi_prodkit.cli.doctor.database_probe import ask
from fastapi_prodkit.cli.doctor.facts import Facts, Server
from fastapi_prodkit.cli.doctor.finding import SEVERITIES, Finding
from fastapi_prodkit.cli.doctor.loading import Loaded, load
from fastapi_prodkit.cli.terminal import quiet, show_progress

__all__ = ["Examination", "examine", "gather"]

_UNREAD = "the app could not be loaded, so its settings are unknown"
_UNUSED = "the app has no settings of fastapi-prodkit: HOSTS_ALLOWED, DATABASE_URL and the others have no effect"


@dataclass(frozen=True)
class Examination:
    """The findings, most severe first, and what was skipped."""

    facts: Facts
    findings: tuple[Finding, ...]


def examine(facts: Facts, *, ignored: Collection[str] = ()) -> Examination:
    """Apply every rule to the facts, except rules whose id is in `ignored`."""
    from fastapi_prodkit.cli.doctor.rules import RULES  # noqa: PLC0415 - `--help` does not need them

    found = [finding for rule in RULES if rule.id not in ignored for finding in rule.findings(facts)]
    return Examination(facts, tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))))


def gather(target: str | None, *, environment: str, factory: bool, timeout: float | None) -> Facts:
    """Load the app, read its settings, query its database, and inspect the environment.

    Args:
        target: The app, as module:app; None to gather only settings and environment.
        environment: The environment whose settings are read.
        factory: Whether the target is a function that returns the app.
        timeout: Time-out for the database, seconds; None to skip the database.

    Raises:
        UnknownAppError: The app does not exist.
    """
    skipped: dict[str, str] = {}
    with quiet():
        with show_progress(f"loading {target or 'the settings'}"):
            loaded = load(target, environment=environment, factory=factory)
        server = _server(loaded, timeout, skipped)
    return replace(
        _around(skipped),
        environment=environment,
        app=_app(loaded, target, skipped),
        settings=loaded.settings,
        unusable=loaded.unusable,
        refused=loaded.refused,
        warned=loaded.warned,
        failure=loaded.failure,
        server=server,
        skipped=skipped,
    )


def _around(skipped: dict[str, str]) -> Facts:
    """Return the facts about the environment of the service."""
    container = environment_facts.container()
    files, untracked = environment_facts.tracked(Path.cwd())
    skipped |= {"files": untracked} if untracked else {}
    skipped |= {} if container else {"container": "this process is not in a container"}
    return Facts(
        directory=Path.cwd(),
        container=container,
        tracked=files,
        installed=environment_facts.installed(),
        workers=configured_workers(),
        now=datetime.now(UTC),
    )


def _server(loaded: Loaded, timeout: float | None, skipped: dict[str, str]) -> Server | None:
    database = getattr(loaded.settings, "database", None)
    if loaded.settings is None:
        skipped["settings"] = "they cannot be used" if loaded.unusable else _UNREAD if loaded.failure else _UNUSED
        skipped["database"] = "its URL is in the settings, which are unknown"
    elif database is None:
        skipped["database"] = "DATABASE_URL is not set"
    elif timeout is None:
        skipped["database"] = "--offline"
    else:
        with show_progress(f"querying the database, for {timeout:g} s at most"):
            return ask(database, timeout)
    return None


def _app(loaded: Loaded, target: str | None, skipped: dict[str, str]) -> Any:
    from starlette.applications import Starlette  # noqa: PLC0415 - `--help` does not need it

    if isinstance(loaded.app, Starlette):
        return loaded.app
    if target is None:
        skipped["app"] = "none was named: fastapi-prodkit doctor module:app"
    elif loaded.unusable:
        skipped["app"] = "its settings cannot be used"
    elif loaded.failure is None:
        skipped["app"] = f"{target} is a {type(loaded.app).__name__}, and neither FastAPI nor Starlette"
    return None
