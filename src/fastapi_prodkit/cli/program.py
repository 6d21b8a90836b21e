"""The list of commands, and how a command ends."""

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

# Each is a module of this package with a `typer.Typer` named `app`, and what `fastapi-prodkit --help` says of it. The
# module is imported when it is asked for, and imports what it works with when it runs: so `--help` is quick.
COMMANDS: Final[dict[str, str]] = {
    "serve": "Serve an app with uvicorn, as production wants it.",
    "doctor": "Say what is unsafe, slow or misconfigured.",
    "health": "Ask a service whether it is well.",
    "settings": "Show every variable, what sets it, and write it down.",
    "db": "Migrate the database.",
    "new": "Make a service of your own from the example.",
}

_FAILED, _MISUSED, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143
_RED, _PLAIN = "\033[31m", "\033[0m"


class UnknownCommandError(typer.TyperException):
    """There is no such command; the message says what to type instead."""

    exit_code = _MISUSED


class CommandGroup(TyperGroup):
    """Name the nearest command where there is none of the name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments begin with."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            options = [option for parameter in self.get_params(ctx) for option in parameter.opts]
            known = {option.lstrip("-"): option for option in options}
            known |= {name.rpartition(" ")[2]: name for name in reversed(list(self._names(ctx)))}
            near = get_close_matches(args[0], known, n=1)
            instead = f"{ctx.command_path} {known[near[0]]}" if near else f"{ctx.command_path} --help"
            raise UnknownCommandError(f"there is no command {args[0]!r}; try: {instead}")
        return super().resolve_command(ctx, args)

    def _names(self, ctx: Any) -> Iterator[str]:
        """Yield the commands, and behind them those of the groups among them: `db`, `db upgrade`."""
        groups = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        yield from (name for name, _ in groups)
        yield from (f"{name} {inner}" for name, group in groups for inner in getattr(group, "commands", ()))


class _Program(CommandGroup):
    """Take the commands from the list."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the base's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - likewise
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
    epilog="Exit codes: 0 done, 1 failed, 2 not understood, 3 the answer is no, 130 and 143 stopped by a signal. "
    "FASTAPI_PRODKIT_TRACEBACK=1 shows where an error comes from."
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
        arguments: What stands behind `fastapi-prodkit`; those of the process by default.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _ended_by_sigterm(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
            result = app(arguments, prog_name="fastapi-prodkit", standalone_mode=False)
    except typer.TyperException as error:
        return _misused(error)
    except typer.Abort:
        _complain("interrupted")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever a command raises ends it, and becomes the line that says why
        if os.environ.get("FASTAPI_PRODKIT_TRACEBACK"):
            traceback.print_exc()
        _complain(describe(error))
        return _FAILED
    if result == _INTERRUPTED:  # typer's answer to KeyboardInterrupt
        _complain("interrupted")
    return result if isinstance(result, int) else 0


def _misused(error: typer.TyperException) -> int:
    """Say in one line what was not understood, and what to type instead."""
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
    _complain(message)
    return error.exit_code


def _choice(error: typer.TyperException, message: str) -> str | None:
    """Return the option with the choice that is nearest to what was typed, if it is near any."""
    typed = re.search(r"'([^']*)' is not one of (.*)", message)
    near = get_close_matches(typed[1], re.findall(r"'([^']*)'", typed[2]), n=1) if typed else []
    parameter = getattr(error, "param", None)
    return f"{parameter.opts[0]} {near[0]}" if near and parameter else None


def _complain(message: str) -> None:
    label = f"{_RED}fastapi-prodkit:{_PLAIN}" if coloured(sys.stderr) else "fastapi-prodkit:"
    typer.echo(f"{label} {message}", err=True, color=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the command in order: it ends process 1 of a container only if there is a handler."""
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
