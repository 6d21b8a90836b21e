"""`fastapi-prodkit settings`: show every variable of a service, or export them in several formats."""

import json
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fastapi_prodkit.cli.inventory import Variable, variables
from fastapi_prodkit.cli.target import Environment, as_in, resolve
from fastapi_prodkit.cli.terminal import show_progress
from fastapi_prodkit.exceptions import ConfigurationError, SettingsError
from fastapi_prodkit.logging.redaction import REDACTED

__all__ = ["app"]

_UNUSABLE = 1
_SECRET: Final = "arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME"  # noqa: S105 - a placeholder
_DEFAULT_SOURCES: Final = ("", "the profile")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Format(StrEnum):
    """Output format."""

    TABLE = "table"
    ENV = "env"
    MARKDOWN = "markdown"
    ECS = "ecs"
    JSON = "json"


_JUDGED: Final = (Format.TABLE, Format.JSON, Format.ECS)  # formats that depend on values, so the settings are validated


@app.command()
def settings(  # noqa: PLR0913 - an option each
    target: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="The class, such as service.config:ServiceSettings.")
    ] = "fastapi_prodkit:Settings",
    *,
    form: Annotated[
        Format,
        typer.Option("--format", help="env: an .env.example; ecs: parts of a container definition."),
    ] = Format.TABLE,
    environment: Annotated[
        Environment | None,
        typer.Option(help="Replaces ENVIRONMENT: prod reads .env.prod and refuses unsafe values."),
    ] = None,
    secret: Annotated[
        str,
        typer.Option(
            metavar="ARN", help="For ecs: the ARN of the secret in AWS Secrets Manager that holds the values."
        ),
    ] = _SECRET,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file; fails if it exists.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> int:
    """Show every variable with type, default, current value and source. Secrets are masked.

    If the settings are invalid, the exit code is 1 and standard error has the reason; the variables are still shown.
    """
    if output is not None and output.exists() and not force:
        again = _typed(target, {"format": form, "environment": environment, "secret": secret, "output": output})
        raise ConfigurationError(f"{output} exists already; try: {again} --force")
    with as_in(environment), show_progress(f"reading {target}"):
        settings_cls = _class(target)
        every = _read(settings_cls)
        problem = _problem(settings_cls) if form in _JUDGED else None
    _show(_FORMATS[form](every, secret), len(every), output)
    if problem is not None:
        typer.echo(f"\n{problem}", err=True)
    return 0 if problem is None else _UNUSABLE


def _typed(target: str, options: Mapping[str, object]) -> str:
    """Return the command line with these options, without those that have their default."""
    given = {name: str(value) for name, value in options.items() if value not in (None, Format.TABLE, _SECRET)}
    words = [target, *(word for name, value in given.items() for word in (f"--{name}", value))]
    return shlex.join(["fastapi-prodkit", "settings", *words])


def _class(target: str) -> Any:
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - `--help` does not need it

    found = resolve(target, command="settings", kind=Settings)
    if not (isinstance(found, type) and issubclass(found, Settings)):
        raise ConfigurationError(f"{target} is no settings class; name one that derives from fastapi_prodkit.Settings")
    return found


def _read(settings_cls: Any) -> list[Variable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are repeated when the settings are validated
        return variables(settings_cls)


def _problem(settings_cls: Any) -> str | None:
    """Return why the settings are invalid; None if they are valid."""
    try:
        settings_cls()
    except SettingsError as error:
        return str(error)
    return None


def _show(text: str, count: int, output: Path | None) -> None:
    if output is None:
        typer.echo(text)
        return
    output.write_text(f"{text}\n", encoding="utf-8")
    typer.echo(f"{output} has {count} variables")


def _table(every: Sequence[Variable], _secret: str) -> str:
    """Return one line per variable, with its current value and its description below."""
    lines = []
    for section, members in _sections(every):
        lines += ["", section or "service-wide"]
        for each in members:
            lines.append(f"  {each.name}  ({each.type})  {_default(each)}")
            if each.source:
                lines.append(f"      = {each.value}   from {each.source}")
            lines.append(f"      {each.description}")
    return "\n".join(lines[1:])


def _default(each: Variable) -> str:
    if each.required:
        return "required"
    if each.begins:
        return f"without it there is no {each.section}"
    return f"default {each.default}" if each.default else "no default"


def _env(every: Sequence[Variable], _secret: str) -> str:
    """Return a file to copy: required variables are empty, all others are commented out with their defaults."""
    lines = ["# Copy to .env or .env.{ENVIRONMENT}, and uncomment the lines you want to change."]
    for section, members in _sections(every):
        lines += ["", f"# --- {section or 'service-wide'}"]
        for each in members:
            lines += [f"# {each.description} ({each.type})".replace("#  (", "# (")]
            lines += [f"{'' if each.required else '# '}{each.name}={_quoted(each.default or '')}"]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Quote for python-dotenv: in single quotes if no escapes are needed, else in double quotes."""
    if not any(letter in value for letter in " \t#;'\"\n\r"):
        return value
    if not any(letter in value for letter in "'\\\n\r"):
        return f"'{value}'"
    for letter, escape in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r")):
        value = value.replace(letter, escape)
    return f'"{value}"'


def _markdown(every: Sequence[Variable], _secret: str) -> str:
    lines = ["| Variable | Type | Default | Meaning |", "|---|---|---|---|"]
    for each in every:
        default = "required" if each.required else f"`{each.default}`" if each.default else "none"
        cells = (f"`{each.name}`", each.type, default, each.description)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def _ecs(every: Sequence[Variable], secret: str) -> str:
    """Return `environment` and `secrets` of a container definition, for variables that are set; secrets by ARN."""
    given = [each for each in every if each.source not in _DEFAULT_SOURCES]
    given += [each for each in every if each.required and each not in given]
    plain = [{"name": each.name, "value": each.value or ""} for each in given if not _hidden(each)]
    hidden = [{"name": each.name, "valueFrom": f"{secret}:{each.name}::"} for each in given if _hidden(each)]
    return json.dumps({"environment": plain, "secrets": hidden}, indent=2)


def _hidden(each: Variable) -> bool:
    """Return whether a value belongs into a secret, by its type or because it contains a password."""
    return each.secret or REDACTED in (each.value or "")


def _json(every: Sequence[Variable], _secret: str) -> str:
    return json.dumps([vars(each) for each in every], indent=2)


def _sections(every: Iterable[Variable]) -> Iterator[tuple[str, list[Variable]]]:
    for section, members in groupby(every, key=lambda each: each.section):
        yield section, list(members)


_FORMATS: Final[dict[Format, Callable[[Sequence[Variable], str], str]]] = {
    Format.TABLE: _table,
    Format.ENV: _env,
    Format.MARKDOWN: _markdown,
    Format.ECS: _ecs,
    Format.JSON: _json,
}
