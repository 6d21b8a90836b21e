"""The command `doctor`: its options and exit codes."""

import os
from difflib import get_close_matches
from typing import Annotated

import typer

from fastapi_prodkit.cli.doctor.examination import examine, gather
from fastapi_prodkit.cli.doctor.finding import SEVERITIES, Severity
from fastapi_prodkit.cli.doctor.report import as_github, as_json, as_text
from fastapi_prodkit.cli.program import UnknownCommandError
from fastapi_prodkit.cli.target import Environment

__all__ = ["app"]

_FOUND = 1

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Exit codes: 0 no finding reaches --fail-on, 1 a finding does, 2 usage error. Without MODULE:APP it checks "
    "settings, files, dependencies and the container."
)
def doctor(  # noqa: PLR0913 - an option each
    application: Annotated[str | None, typer.Argument(metavar="MODULE:APP", help="Such as service.main:app.")] = None,
    *,
    environment: Annotated[
        Environment | None,
        typer.Option(help="Environment to check; by default staging if ENVIRONMENT is staging, otherwise prod."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="ID", help="Skip a rule; may be repeated.")] = None,
    fail_on: Annotated[Severity, typer.Option(help="Lowest severity that fails the command.")] = "error",
    json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    github: Annotated[bool, typer.Option("--github", help="Write annotations for GitHub Actions.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the database.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Time-out for the database, seconds.")
    ] = 5.0,
    factory: Annotated[bool, typer.Option("--factory", help="APP is a function that returns the app.")] = False,
) -> None:
    """Check a service for unsafe, slow or wrong configuration.

    The app is imported as in production, but not started. The settings are those of --environment. Nothing is changed,
    and no secret is shown.
    """
    if json and github:
        raise typer.BadParameter("--json and --github exclude each other: choose one")
    ignored = _known(ignore or [])
    facts = gather(
        application,
        environment=environment or ("staging" if os.environ.get("ENVIRONMENT") == "staging" else "prod"),
        factory=factory,
        timeout=None if offline else timeout,
    )
    examination = examine(facts, ignored=ignored)
    if json:
        typer.echo(as_json(examination, application))
    else:
        typer.echo(as_github(examination) if github else as_text(examination), color=True)
    bad = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    raise typer.Exit(_FOUND if any(finding.severity in bad for finding in examination.findings) else 0)


def _known(ignored: list[str]) -> list[str]:
    """Return the ids; raise for an id without a rule, because it would ignore nothing."""
    from fastapi_prodkit.cli.doctor.rules import RULES  # noqa: PLC0415 - `--help` does not need them

    names = [rule.id for rule in RULES]
    for name in ignored:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            instead = f"fastapi-prodkit doctor --ignore {near[0]}" if near else "fastapi-prodkit doctor --help"
            raise UnknownCommandError(f"there is no rule {name!r}; try: {instead}")
    return ignored
