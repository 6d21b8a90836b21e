"""The facts that rules check. All are gathered before the first rule runs, so a rule is a pure function."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi_prodkit.sections import DatabaseSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["Container", "Facts", "Server"]


@dataclass(frozen=True)
class Server:
    """Facts from the database.

    Attributes:
        failure: Why it could not be queried; None if it answered.
        allowed: Number of connections allowed for the role; None if the database is not PostgreSQL.
        superuser: Whether the role is a superuser.
        pending: Description of pending migrations; None if there are none, or if it is unknown.
    """

    failure: str | None = None
    allowed: int | None = None
    superuser: bool = False
    pending: str | None = None


@dataclass(frozen=True)
class Container:
    """Facts about the container of this process.

    Attributes:
        root: Whether the process runs as root.
        first: Name of process 1, which receives SIGTERM.
        cores: Limit of processor cores; None without a limit.
        memory: Limit of memory, bytes; None without a limit.
    """

    root: bool
    first: str
    cores: float | None
    memory: int | None


@dataclass(frozen=True)
class Facts:
    """All facts. A fact that is None or empty is unknown; `skipped` says why.

    Attributes:
        environment: The environment that is checked.
        directory: Directory of the service's files.
        app: The app, without middleware that was wrapped around the app object.
        settings: Settings of the app; those of the process's environment if no app was named.
        unusable: Reasons by variable, for variables with invalid values.
        refused: Reasons by variable, for values with which production refuses to start.
        warned: Warnings while the settings were read.
        failure: Why the app could not be loaded.
        tracked: Files under git, relative to the directory.
        installed: Which packages of the server are installed.
        workers: Number of worker processes.
        now: When they were gathered.
        skipped: Names of facts that could not be gathered, with the reasons.
    """

    environment: str = "prod"
    directory: Path = Path()
    app: "Starlette | None" = None
    settings: Any = None  # an instance of Settings, whose module is not imported for `--help`
    unusable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    warned: tuple[str, ...] = ()
    failure: str | None = None
    server: Server | None = None
    container: Container | None = None
    tracked: tuple[str, ...] = ()
    installed: frozenset[str] = frozenset()
    workers: int | None = None
    now: datetime | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def database(self) -> DatabaseSettings | None:
        """Return the database section; None if there is none."""
        section: DatabaseSettings | None = getattr(self.settings, "database", None)
        return section
