"""`fastapi-prodkit`: create, run, check and migrate a FastAPI service, from a terminal or in a deployment."""

from fastapi_prodkit import _extras

_extras.require("typer", extra="cli")

from fastapi_prodkit.cli.program import COMMANDS, main  # noqa: E402 - after the check above

__all__ = ["COMMANDS", "main"]
