"""`fastapi-prodkit routes MODULE:APP`: list the routes of an app and who may call them, and compare with a file."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fastapi_prodkit._terminal import coloured
from fastapi_prodkit.cli.annotations import annotation
from fastapi_prodkit.cli.target import Environment
from fastapi_prodkit.cli.terminal import quiet, show_progress
from fastapi_prodkit.exceptions import ConfigurationError, SettingsError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from fastapi_prodkit._route_list.check import Failure
    from fastapi_prodkit._route_list.row import ListedRoute

__all__ = ["app"]

_CHECK_FAILED: Final = 3
_FILE: Final = Path("routes.lock")
_COLUMNS: Final = {
    "METHOD": "method",
    "PATH": "path",
    "RULE": "rule",
    "RATE LIMIT": "limit",
    "DEADLINE": "deadline",
    "BODY": "body",
    "SCHEMA": "in_schema",
    "DEFINED IN": "source",
}
_BOLD, _PLAIN = "\033[1m", "\033[0m"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Exit codes: 0 done, 1 the app cannot be loaded, 2 usage error, 3 a check has failed.")
def routes(  # noqa: PLR0913 - an option each
    application: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Such as service.main:app.")],
    *,
    write: Annotated[bool, typer.Option("--write", help="Write the file, which belongs into the repository.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 if the routes differ from the file.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if a route has no explicit rule, such as public.")
    ] = False,
    lock: Annotated[Path, typer.Option(metavar="FILE", help="Name of the file.")] = _FILE,
    environment: Annotated[
        Environment | None,
        typer.Option(help="Replaces ENVIRONMENT; by default test with --write, --check and --strict."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    github: Annotated[bool, typer.Option("--github", help="Write annotations for GitHub Actions.")] = False,
    factory: Annotated[bool, typer.Option("--factory", help="APP is a function that returns the app.")] = False,
) -> None:
    """List every route: who may call it, its limits, and where it is defined.

    The app is imported, but not started. --write makes a file for reviews, with which --check compares the routes.
    """
    checks = check or strict
    if write and checks:
        raise typer.BadParameter("--write and --check or --strict exclude each other")
    if as_json and (write or checks):
        raise typer.BadParameter("--json is for the list: leave out --write, --check and --strict")
    if github and not checks:
        raise typer.BadParameter("--github is for --check and --strict")
    chosen = environment or ("test" if write or checks else os.environ.get("ENVIRONMENT", "dev"))
    loaded = _load(application, chosen, factory=factory)
    from fastapi_prodkit._route_list.listing import list_routes  # noqa: PLC0415 - `--help` does not need it

    every = list_routes(loaded)
    if write:
        _write(every, lock, chosen, _command(application, lock, environment, factory=factory))
    elif checks:
        _check(every, lock if check else None, strict=strict, github=github)
    else:
        typer.echo(_json(loaded, every, application, chosen) if as_json else _table(loaded, every), color=True)


def _load(target: str, environment: str, *, factory: bool) -> "Starlette":
    from starlette.applications import Starlette  # noqa: PLC0415 - `--help` does not need it

    from fastapi_prodkit.cli.doctor.loading import load  # noqa: PLC0415 - `--help` does not need it

    with quiet(), show_progress(f"loading {target}"):
        loaded = load(target, environment=environment, factory=factory, command="routes")
    if loaded.unusable:
        typer.echo(f"ENVIRONMENT is {environment}: .env and .env.{environment} are read", err=True)
        raise SettingsError(loaded.unusable)
    if loaded.failure is not None:
        raise ConfigurationError(f"{target} cannot be loaded: {loaded.failure}")
    if not isinstance(loaded.app, Starlette):
        raise ConfigurationError(f"{target} is a {type(loaded.app).__name__}, and neither FastAPI nor Starlette")
    return loaded.app


def _command(target: str, lock: Path, environment: str | None, *, factory: bool) -> str:
    """Return the command that writes the file."""
    options = ["--lock", str(lock)] * (lock != _FILE) + ["--factory"] * factory
    options += ["--environment", environment] if environment else []
    return shlex.join(["fastapi-prodkit", "routes", target, "--write", *options])


def _write(every: "Sequence[ListedRoute]", lock: Path, environment: str, command: str) -> None:
    from fastapi_prodkit._route_list.check import differences  # noqa: PLC0415 - `--help` does not need it
    from fastapi_prodkit._route_list.lock import lines_of, write_lines  # noqa: PLC0415 - `--help` does not need it

    changed = differences(every, lock)
    lines = lines_of(every)
    write_lines(lock, lines, command)
    for each in changed.findings if changed else ():
        typer.echo(f"{each.route}  {each.text}")
    typer.echo(f"{lock} has {len(lines)} routes")
    unguarded = sum(each.rule == "unguarded" for each in lines)
    if unguarded:
        typer.echo(f"{unguarded} of them unguarded: the app has no authentication in {environment}", err=True)


def _check(every: "Sequence[ListedRoute]", lock: Path | None, *, strict: bool, github: bool) -> None:
    from fastapi_prodkit._route_list.check import check_routes  # noqa: PLC0415 - `--help` does not need it

    failures = check_routes(every, lock, strict=strict)
    for failure in failures:
        typer.echo("\n".join(_annotations(failure)) if github else str(failure))
    if failures:
        raise typer.Exit(_CHECK_FAILED)
    if lock is not None:
        typer.echo(f"The routes are those of {lock}.")
    if strict:
        typer.echo("Every route has an explicit rule.")


def _annotations(failure: "Failure") -> list[str]:
    lines = []
    for each in failure.findings:
        file, _, line = each.source.rpartition(":")
        place = {"file": file, "line": line} if file else {}
        lines.append(annotation("error", f"{each.route}: {each.text}", title=failure.title, **place))
    return [*(lines or [annotation("error", failure.title, title=failure.title)]), failure.remedy]


def _table(loaded: "Starlette", every: "Sequence[ListedRoute]") -> str:
    """Return the list in aligned columns, and what `default` stands for."""
    from fastapi_prodkit._route_list.listing import defaults_of  # noqa: PLC0415 - `--help` does not need it

    rows = [list(_COLUMNS), *([_cell(each, name) for name in _COLUMNS.values()] for each in every)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if coloured(sys.stdout):
        lines[0] = f"{_BOLD}{lines[0]}{_PLAIN}"
    return "\n".join([*lines, "", f"{len(every)} routes; default: {defaults_of(loaded)}"])


def _cell(route: "ListedRoute", name: str) -> str:
    if name == "in_schema":
        return "yes" if route.in_schema else "no"
    if name == "rule" and route.note:
        return f"{route.rule} ({route.note})"
    return str(getattr(route, name)) or "-"


def _json(loaded: "Starlette", every: "Sequence[ListedRoute]", target: str, environment: str) -> str:
    from fastapi_prodkit._route_list.listing import defaults_of  # noqa: PLC0415 - `--help` does not need it

    listed: list[dict[str, Any]] = [vars(each) for each in every]
    report = {
        "schema": 1,
        "environment": environment,
        "app": target,
        "default": defaults_of(loaded),
        "routes": listed,
    }
    return json.dumps(report, indent=2)
