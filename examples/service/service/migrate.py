"""Bring the database up to date: `python -m service.migrate`, a step of its own before the service starts.

It is Alembic's `upgrade head` with the service's settings. It never runs at start-up: there, replicas would race, and
a long migration would look like a service that does not come up.
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


if __name__ == "__main__":
    upgrade(ServiceSettings())
    print("The database is up to date.")
