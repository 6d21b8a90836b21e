"""`fastapi-prodkit db check --lint`: say which new migrations are unsafe beside a running service."""

import os
from typing import Any

import typer

__all__ = ["lint"]


def lint(config: Any, start: str | None, base: str | None) -> bool:
    """Say on standard error what is unsafe in the new migrations, and return whether there is nothing.

    Args:
        config: Alembic's configuration.
        start: The revision above which they begin.
        base: The branch that has the older ones.
    """
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - on first use

    from fastapi_prodkit.database.migration_lint import lint as verdicts  # noqa: PLC0415 - likewise
    from fastapi_prodkit.database.migration_sql import new_revisions  # noqa: PLC0415 - likewise

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
