"""Migrations from code, for the demo and the tests; a deployment runs `fastapi-prodkit db upgrade` first.

The service never migrates at start-up: replicas would run the migrations at the same time, and a service with a long
migration would seem not to start.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config

from service.config import ServiceSettings


def alembic_config(settings: ServiceSettings) -> Config:
    """Return the configuration for Alembic's commands."""
    return Config(Path(__file__).parents[1] / "alembic.ini", attributes={"settings": settings})


def upgrade(settings: ServiceSettings) -> None:
    """Run the migrations that the database lacks."""
    command.upgrade(alembic_config(settings), "head")
