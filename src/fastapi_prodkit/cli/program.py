"""The list of commands, and how a command exits."""

import importlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from fastapi_prodkit import __version__
from fastapi_prodkit._terminal import coloured
from fastapi_prodkit.cli.failure import describe

__all__ = ["COMMANDS", "CommandGroup", "main"]

# Each command is a module of this package with a `typer.Typer` named `app`; the text is its line in the help. To keep
# `--help` fast, a module is imported only when its command is used, and imports its libraries only when it runs.
COMMANDS: Final[dict[str, str]] = {
    "serve": "Serve an app with uvicorn and production defaults.",
    "doctor": "Check a service for unsafe, slow or wrong configuration.",
    "health": "Check that a service is healthy.",
    "routes": "List every route and who may call it, or compare with routes.lock.",
    "settings": "Show every variable with its value and source, or export them.",
    "db": "Migrate the database.",
    "key": "Make an API key.",
    "token": "Make an access token, for development and tests.",
    "issuer": "Run an OpenID issuer for development.",
    "new": "Create a service from the example.",
}

_FAILED, _MISUSED, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143
_RED, _PLAIN = "\033[31m", "\033[0m"


class UnknownCommandError(typer.TyperException):
    """The command does not exist; the message suggests another one."""

    exit_code = _MISUSED


class CommandGroup(TyperGroup):
    """Suggest the most similar command for an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            options = [option for parameter in self.get_params(ctx) for option in parameter.opts]
            known = {option.lstrip("-"): option for option in options}
            known |= {name.rpartition(" ")[2]: name for name in reversed(list(self._names(ctx)))}
            near = get_close_matches(args[0], known, n=1)
            instead = f"{ctx.command_path} {known[near[0]]}" if near else f"{ctx.command_path} --help"
            raise UnknownCommandError(f"there is no command {args[0]!r}; try: {instead}")
        return super().resolve_command(ctx, args)

    def _names(self, ctx: Any) -> Iterator[str]:
        """Yield the commands, then the subcommands of groups, such as `db upgrade`."""
        groups = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        yield from (name for name, _ in groups)
        yield from (f"{name} {inner}" for name, group in groups for inner in getattr(group, "commands", ()))


class _Program(CommandGroup):
    """The group of all commands in `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the base's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the base's signature
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(f"fastapi_prodkit.cli.{cmd_name}").app)
        command.short_help = COMMANDS[cmd_name]
        return command


app = typer.Typer(cls=_Program, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        typer.echo(f"fastapi-prodkit {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 failed, 2 usage error, 3 a check has failed, 130 and 143 stopped by a signal. "
    "FASTAPI_PRODKIT_TRACEBACK=1 shows the traceback of an error."
)
def _command(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Create, run, check and migrate a FastAPI service."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; an error is one line on standard error.

    Args:
        arguments: Arguments after `fastapi-prodkit`. Default: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _ended_by_sigterm(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _print_error(f"warning: {message}")
            result = app(arguments, prog_name="fastapi-prodkit", standalone_mode=False)
    except typer.TyperException as error:
        return _report_usage_error(error)
    except typer.Abort:
        _print_error("interrupted")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - any error of a command becomes one line and an exit code
        if os.environ.get("FASTAPI_PRODKIT_TRACEBACK"):
            traceback.print_exc()
        _print_error(describe(error))
        return _FAILED
    if result == _INTERRUPTED:  # typer returns this for KeyboardInterrupt
        _print_error("interrupted")
    return result if isinstance(result, int) else 0


def _report_usage_error(error: typer.TyperException) -> int:
    """Print the usage error in one line, with a suggestion; return the exit code."""
    message = error.format_message()
    if "\n" in message:  # a command without arguments shows its help
        typer.echo(message, err=True)
        return _MISUSED
    path = getattr(getattr(error, "ctx", None), "command_path", "fastapi-prodkit")
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        near = error.possibilities
        message = f"there is no option {error.option_name}; try: {path} {near[0] if near else '--help'}"
    elif not isinstance(error, UnknownCommandError):
        message = message.replace("Value error, ", "").rstrip(".")
        message = f"{message}; try: {path} {_choice(error, message) or '--help'}"
    _print_error(message)
    return error.exit_code


def _choice(error: typer.TyperException, message: str) -> str | None:
    """Return the option with the choice most similar to what was typed; None if there is no similar one."""
    typed = re.search(r"'([^']*)' is not one of (.*)", message)
    near = get_close_matches(typed[1], re.findall(r"'([^']*)'", typed[2]), n=1) if typed else []
    parameter = getattr(error, "param", None)
    return f"{parameter.opts[0]} {near[0]}" if near and parameter else None


def _print_error(message: str) -> None:
    label = f"{_RED}fastapi-prodkit:{_PLAIN}" if coloured(sys.stderr) else "fastapi-prodkit:"
    typer.echo(f"{label} {message}", err=True, color=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Install a handler that ends the command on SIGTERM: without one, process 1 of a container ignores the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: object) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
