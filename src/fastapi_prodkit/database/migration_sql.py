"""Find new revisions, and render the SQL of each for PostgreSQL, offline."""

import functools
import io
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationStep
from alembic.script import Script, ScriptDirectory
from sqlalchemy.exc import SQLAlchemyError

from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["Rendered", "new_revisions", "render"]

_MAIN = "main"
_POSTGRESQL = DatabaseSettings(url="postgresql://")  # only the dialect is used


@dataclass
class Rendered:
    """The SQL of a revision, and whether the revision itself emitted any of it."""

    sql: str = ""
    has_statements: bool = False


def new_revisions(
    config: Config, directory: ScriptDirectory, start: str | None = None, base: str | None = None
) -> tuple[str, list[Script]]:
    """Return a phrase that says which revisions are new, and their scripts in the order in which they run.

    Args:
        config: Alembic's configuration.
        directory: Its scripts.
        start: New are the revisions after this one; `base` is the state before the first revision.
        base: Without `start`, new are the revisions whose files are not on this branch. Without both, new are those
            that the database lacks, or those that are not on `main` if no database can be reached.

    Raises:
        CommandError: There is no such revision.
        ConfigurationError: git does not know the branch.
    """
    if start is not None:
        return f"above {start}", _above(directory, (start,))
    if base is None:
        try:
            heads = _database_heads(config, directory)
        except (ConfigurationError, MissingExtraError, SQLAlchemyError, OSError):
            base = _MAIN
        else:
            return f"above {', '.join(heads) or 'base'}, where the database is", _above(directory, heads)
    scripts = _all(directory)
    old = {path for folder in {Path(script.path).parent for script in scripts} for path in _files_on(base, folder)}
    return f"not on {base}", [script for script in scripts if Path(script.path) not in old]


def render(config: Config, directory: ScriptDirectory, script: Script) -> Rendered:
    """Return the SQL of one revision, including the time-outs and the transaction that `upgrade` adds.

    Exceptions of the revision and of `env.py` are raised. Afterwards `config` is usable for rendering only.
    """
    step = MigrationStep.upgrade_from_script(directory.revision_map, script)
    upgrade = step.migration_fn
    config.attributes["settings"] = _POSTGRESQL
    config.output_buffer = written = io.StringIO()
    rendered = Rendered()

    @functools.wraps(upgrade)
    def write(**arguments: Any) -> None:
        start = written.tell()
        upgrade(**arguments)
        rendered.has_statements = written.tell() > start

    step.migration_fn = write
    options: dict[str, Any] = {"as_sql": True, "starting_rev": script.down_revision}
    with EnvironmentContext(config, directory, fn=lambda _heads, _context: [step], **options):
        directory.run_env()
    rendered.sql = written.getvalue()
    return rendered


def _database_heads(config: Config, directory: ScriptDirectory) -> tuple[str, ...]:
    found: list[str] = []

    def read(heads: tuple[str, ...], _context: Any) -> list[Any]:
        found.extend(heads)
        return []

    with EnvironmentContext(config, directory, fn=read, dont_mutate=True):
        directory.run_env()
    return tuple(found)


def _all(directory: ScriptDirectory) -> list[Script]:
    return list(directory.walk_revisions())[::-1]


def _above(directory: ScriptDirectory, heads: tuple[str, ...]) -> list[Script]:
    applied = [script.revision for script in directory.get_revisions(heads)]
    done = {script.revision for revision in applied for script in directory.iterate_revisions(revision, "base")}
    return [script for script in _all(directory) if script.revision not in done]


def _files_on(branch: str, folder: Path) -> list[Path]:
    command = ["git", "ls-tree", "-z", "--name-only", branch]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603 - a list
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        reason = getattr(error, "stderr", None) or "git is not installed"
        raise ConfigurationError(
            f"git cannot list the migrations on {branch}: {reason.strip()}; name another one with --base, or a "
            "revision with --from"
        ) from error
    return [folder / name for name in done.stdout.split("\0")]
