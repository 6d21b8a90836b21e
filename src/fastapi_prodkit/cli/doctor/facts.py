"""What the doctor looks at: facts, gathered before the first rule runs, so that a rule is a function of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi_prodkit.sections import DatabaseSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["Container", "Facts", "Server"]


@dataclass(frozen=True)
class Server:
    """What the database said.

    Attributes:
        failure: Why it could not be asked; None if it answered.
        allowed: How many connections it allows this role; None if it is not PostgreSQL.
        superuser: Whether the role may do anything.
        pending: Which migrations it lacks; None if it lacks none, or nobody knows of any.
    """

    failure: str | None = None
    allowed: int | None = None
    superuser: bool = False
    pending: str | None = None


@dataclass(frozen=True)
class Container:
    """What the container that this process runs in gives it.

    Attributes:
        root: Whether the process is root.
        first: Name of process 1, which gets SIGTERM.
        cores: Share of the processors; None without a limit.
        memory: Bytes; None without a limit.
    """

    root: bool
    first: str
    cores: float | None
    memory: int | None


@dataclass(frozen=True)
class Facts:
    """All facts. What is None, or empty, is not known, and `skipped` says why.

    Attributes:
        environment: The one that is judged.
        directory: Where the service's files are.
        app: The app, without the middleware that was wrapped around it by hand.
        settings: Those of the app, or those that the environment makes where no app was named.
        unusable: What no setting can be made of: reasons by variable.
        refused: What production refuses to start with, likewise.
        warned: What reading the settings warned about.
        failure: Why the app could not be loaded.
        tracked: Files under git, relative to the directory.
        installed: Which packages of the server are installed.
        workers: Processes that will serve.
        skipped: What could not be looked at, and why.
    """

    environment: str = "prod"
    directory: Path = Path()
    app: "Starlette | None" = None
    settings: Any = None  # a Settings: its module is not loaded for `--help`
    unusable: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    warned: tuple[str, ...] = ()
    failure: str | None = None
    server: Server | None = None
    container: Container | None = None
    tracked: tuple[str, ...] = ()
    installed: frozenset[str] = frozenset()
    workers: int | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def database(self) -> DatabaseSettings | None:
        """Return the section of the database, if there is one."""
        section: DatabaseSettings | None = getattr(self.settings, "database", None)
        return section
