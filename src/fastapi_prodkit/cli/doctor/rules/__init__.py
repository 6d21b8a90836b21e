"""All rules, one module per subject."""

from typing import Final

from fastapi_prodkit.cli.doctor.finding import Rule
from fastapi_prodkit.cli.doctor.rules import (
    application,
    authentication,
    container,
    database,
    dependencies,
    files,
    process,
    settings,
)

__all__ = ["RULES"]

RULES: Final[tuple[Rule, ...]] = (
    *settings.RULES,
    *files.RULES,
    *application.RULES,
    *authentication.RULES,
    *process.RULES,
    *database.RULES,
    *dependencies.RULES,
    *container.RULES,
)
