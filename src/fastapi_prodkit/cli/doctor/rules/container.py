"""Rules about the container that this process runs in."""

from collections.abc import Iterator

from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.cli.doctor.subject import Subject

__all__ = ["RULES"]

_SHELLS = {"ash", "bash", "dash", "sh", "zsh"}
_ROOM = 128 * 2**20  # bytes that a worker with FastAPI, SQLAlchemy and some data takes


@rule("container-root", "warning", "The container runs as root")
def root(subject: Subject) -> Iterator[Fault]:
    """Tell of a process that may do anything in its container."""
    if subject.container is not None and subject.container.root:
        yield Fault("Whoever breaks in can change what runs.", "Add USER with another account to the Dockerfile.")


@rule("container-shell", "warning", "SIGTERM goes to a shell")
def shell(subject: Subject) -> Iterator[Fault]:
    """Tell of a process 1 that does not pass the signal on: every stop is a kill."""
    if subject.container is not None and subject.container.first in _SHELLS:
        yield Fault(
            f"Process 1 is {subject.container.first}, which does not pass SIGTERM on: each deployment cuts requests.",
            'Write CMD in the form ["fastapi-prodkit", "serve", ...], or end the start script with exec.',
        )


@rule("container-workers", "warning", "More workers than processors")
def workers(subject: Subject) -> Iterator[Fault]:
    """Tell of workers that wait for each other."""
    if subject.container is None or subject.container.cores is None or subject.workers is None:
        return
    if subject.workers > max(1, subject.container.cores):
        yield Fault(
            f"WEB_CONCURRENCY is {subject.workers}, and the container has {subject.container.cores:g} processors.",
            "Run one worker for each processor, and more containers.",
        )


@rule("container-memory", "warning", "The memory is too little for the workers")
def memory(subject: Subject) -> Iterator[Fault]:
    """Tell of a container that is killed under load."""
    if subject.container is None or subject.container.memory is None:
        return
    count = subject.workers or 1
    if subject.container.memory < count * _ROOM:
        yield Fault(
            f"{subject.container.memory // 2**20} MiB for {count} worker(s): each takes about {_ROOM // 2**20} MiB.",
            "Raise the limit, or lower WEB_CONCURRENCY.",
        )


@rule("container-env-file", "warning", "A .env file is in the image")
def env_file(subject: Subject) -> Iterator[Fault]:
    """Tell of settings, and secrets, that everybody has who has the image."""
    if subject.container is None:
        return
    found = sorted(path.name for path in subject.directory.glob(".env*") if not path.name.endswith("example"))
    if found:
        yield Fault(
            f"{', '.join(found)}: whoever has the image has what it says.",
            "Name .env* in .dockerignore, and have the platform inject variables.",
        )


RULES = (root, shell, workers, memory, env_file)
