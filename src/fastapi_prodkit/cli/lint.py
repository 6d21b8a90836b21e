"""`fastapi-prodkit db check --lint`: find new migrations that are unsafe while the service runs."""

import os
from typing import Any

import typer

__all__ = ["lint"]


def lint(config: Any, start: str | None, base: str | None) -> bool:
    """Print unsafe operations in new migrations to standard error, and return whether there are none.

    Args:
        config: Alembic's configuration.
        start: Check the revisions after this one.
        base: Check the revisions that are not on this branch.
    """
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - on first use

    from fastapi_prodkit.database.migration_lint import lint as verdicts  # noqa: PLC0415 - on first use
    from fastapi_prodkit.database.migration_sql import new_revisions  # noqa: PLC0415 - on first use

    directory = ScriptDirectory.from_config(config)
    which, scripts = new_revisions(config, directory, start, base)
    unsafe = 0
    for verdict in verdicts(config, directory, scripts):
        unsafe += bool(verdict.findings)
        if verdict.findings or verdict.passed:
            _say(os.path.relpath(verdict.path))
        for finding in verdict.findings:
            _say(f"  {finding.rule}: {finding.message}")
            _say(*(f"    {line}" for line in (finding.statement, finding.remedy) if line))
        _say(*(f"  {passed}" for passed in verdict.passed))
    _say(f"Migrations {which}: {len(scripts)}; unsafe: {unsafe}.")
    return not unsafe


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line, err=True)
