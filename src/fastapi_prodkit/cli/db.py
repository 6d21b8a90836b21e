"""`fastapi-prodkit db`: run migrations with Alembic, as a separate step before the service starts."""

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastapi_prodkit import _extras
from fastapi_prodkit.cli.program import CommandGroup

__all__ = ["app"]

_THE_ANSWER_IS_NO = 3
_LOGGERS = (
    "alembic.runtime.migration",
    "fastapi_prodkit.database.migrations",
    "fastapi_prodkit.database.migration_lock",
    "fastapi_prodkit.database.migration_steps",
)

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _db(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            envvar=["ALEMBIC_CONFIG", "DATABASE_MIGRATIONS_CONFIG"],
            help="alembic.ini or pyproject.toml; by default in the current directory.",
        ),
    ] = None,
) -> None:
    """Migrate the database with Alembic, using the settings of the service.

    The database is DATABASE_URL, or DATABASE_MIGRATIONS_URL if set; a settings class in alembic/env.py takes
    precedence. On PostgreSQL one process migrates at a time, and the others wait.
    """
    ctx.obj = config


_Sql = Annotated[bool, typer.Option("--sql", help="Print the SQL instead of running it; does not connect.")]
_LockTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Longest wait for another process, seconds; by default DATABASE_MIGRATIONS_LOCK_TIMEOUT.",
    ),
]
_StatementLockTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Longest wait of a statement for its lock, seconds, or 0 for no limit; "
        "by default DATABASE_MIGRATIONS_STATEMENT_LOCK_TIMEOUT.",
    ),
]


@app.command()
def upgrade(
    ctx: typer.Context,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Target: a revision, +1, or head.")] = "head",
    *,
    sql: _Sql = False,
    lock_timeout: _LockTimeout = None,
    statement_lock_timeout: _StatementLockTimeout = None,
) -> None:
    """Run pending migrations.

    If a newer release has already migrated the database further, nothing is changed.
    """
    command = _extras.require("alembic.command", extra="database")
    from alembic.util import CommandError  # noqa: PLC0415 - on first use

    with _progress() as steps:
        try:
            command.upgrade(_config(ctx, lock_timeout, statement_lock_timeout), revision, sql=sql)
        except CommandError as error:
            if revision not in ("head", "heads") or "Can't locate revision" not in str(error):
                raise
            _say("Nothing to do: the database is ahead, a newer release has migrated it.")
            return
    if not sql:
        _summary(steps, "Nothing to do: the database is up to date.")


class _Downgrade(TyperCommand):
    """Accept `-1` as a revision, not as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move arguments such as `-1` behind the options, after `--`."""
        back = [arg for arg in args if re.fullmatch(r"-\d+", arg)]
        return super().parse_args(ctx, [*(arg for arg in args if arg not in back), *(["--", *back] if back else [])])


@app.command(cls=_Downgrade)
def downgrade(
    ctx: typer.Context,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Target: a revision, -1, or base; with --sql FROM:TO.")
    ],
    *,
    sql: _Sql = False,
    lock_timeout: _LockTimeout = None,
    statement_lock_timeout: _StatementLockTimeout = None,
) -> None:
    """Revert migrations."""
    command = _extras.require("alembic.command", extra="database")

    with _progress() as steps:
        command.downgrade(_config(ctx, lock_timeout, statement_lock_timeout), revision, sql=sql)
    if not sql:
        _summary(steps, "Nothing to do: the database is at this revision already.")


@app.command()
def current(
    ctx: typer.Context,
    *,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 unless it is the newest revision.")] = False,
) -> None:
    """Show the current revision of the database."""
    command = _extras.require("alembic.command", extra="database")
    from alembic.util import DatabaseNotAtHead  # noqa: PLC0415 - on first use

    with _progress():
        try:
            command.current(_config(ctx), check_heads=check)
        except DatabaseNotAtHead:
            _say("The database is not at the newest revision.")
            raise typer.Exit(_THE_ANSWER_IS_NO) from None


@app.command()
def history(
    ctx: typer.Context,
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show files and dates.")] = False,
) -> None:
    """List the migrations, newest first; does not connect."""
    command = _extras.require("alembic.command", extra="database")

    command.history(_config(ctx), verbose=verbose)


@app.command()
def revision(
    ctx: typer.Context,
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="What the migration does.")],
    *,
    autogenerate: Annotated[
        bool, typer.Option("--autogenerate", help="Generate operations that make the database match the models.")
    ] = False,
) -> None:
    """Create a new migration. Review it before you run it."""
    command = _extras.require("alembic.command", extra="database")

    with _progress():
        command.revision(_config(ctx), message, autogenerate=autogenerate)


@app.command()
def check(
    ctx: typer.Context,
    *,
    lint: Annotated[bool, typer.Option("--lint", help="Find unsafe operations in new PostgreSQL migrations.")] = False,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="REVISION", help="With --lint: check later revisions; by default pending ones."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BRANCH", help="With --lint: check revisions not on it; by default main."),
    ] = None,
) -> None:
    """Compare models and migrations; --lint checks new migrations.

    The exit code is 3 if they differ, or if a new migration is unsafe.
    """
    if lint:
        _check_safety(ctx, start, base)
    elif start or base:
        raise typer.BadParameter("--from and --base belong to --lint")
    else:
        _check_models(ctx)


def _check_safety(ctx: typer.Context, start: str | None, base: str | None) -> None:
    from fastapi_prodkit.cli.lint import lint  # noqa: PLC0415 - it needs extras

    if not lint(_config(ctx), start, base):
        raise typer.Exit(_THE_ANSWER_IS_NO)


def _check_models(ctx: typer.Context) -> None:
    command = _extras.require("alembic.command", extra="database")
    from alembic.util import AutogenerateDiffsDetected, CommandError  # noqa: PLC0415 - on first use

    with _progress():
        try:
            command.check(_config(ctx))
        except AutogenerateDiffsDetected as error:
            _say("The migrations lack changes of the models:")
            for difference in error.diffs:
                _say(f"  {_describe(difference)}")
            raise typer.Exit(_THE_ANSWER_IS_NO) from None
        except CommandError as error:
            if "not up to date" not in str(error):
                raise
            _say("The database lacks migrations: run `fastapi-prodkit db upgrade` first.")
            raise typer.Exit(_THE_ANSWER_IS_NO) from None


class _Progress(logging.Handler):
    """Logging handler that prints migrations as they start and finish.

    It handles records of Alembic and of this package, and is removed after the command. An `env.py` that configures
    logging replaces it.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.begun = time.perf_counter()
        self.steps: set[str] = set()  # a set, so that repeated attempts count once

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.name.startswith("alembic"):
            if not message.startswith("Running "):
                return
            self.steps.add(message)
        _say(message)


@contextmanager
def _progress() -> Iterator[_Progress]:
    handler = _Progress()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _config(ctx: typer.Context, lock_timeout: float | None = None, statement_lock_timeout: float | None = None) -> Any:
    from fastapi_prodkit.database.migrations import alembic_config  # noqa: PLC0415 - it needs an extra
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - on first use

    config = alembic_config(ctx.obj)
    config.attributes |= {
        "default_settings": Settings,
        "lock_timeout": lock_timeout,
        "statement_lock_timeout": statement_lock_timeout,
    }
    return config


def _summary(progress: _Progress, nothing: str) -> None:
    if not progress.steps:
        _say(nothing)
        return
    count = len(progress.steps)
    noun = "migration" if count == 1 else "migrations"
    _say(f"Done: {count} {noun} in {time.perf_counter() - progress.begun:.2f} s.")


def _describe(difference: Any) -> str:
    """Return a description of one of Alembic's differences: the operation and its object."""
    if isinstance(difference, list):  # several changes of one column
        return "; ".join(_describe(change) for change in difference)
    operation, *parts = difference
    names = [part if isinstance(part, str) else getattr(part, "name", None) for part in parts[:3]]
    table = getattr(getattr(parts[-1], "table", None), "name", None)
    place = f"on {table}" if table and table not in names else None
    return " ".join(word for word in (operation.replace("_", " "), *names, place) if word)


def _say(message: str) -> None:
    typer.echo(message, err=True)
    sys.stderr.flush()
