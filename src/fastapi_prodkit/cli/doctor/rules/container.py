"""Rules about the container that this process runs in."""

from collections.abc import Iterator

from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule

__all__ = ["RULES"]

_SHELLS = {"ash", "bash", "dash", "sh", "zsh"}
_WORKER = 128 * 2**20  # bytes of a worker with FastAPI, SQLAlchemy and some data


@rule("container-root", "warning", "The container runs as root")
def root(facts: Facts) -> Iterator[Problem]:
    """Report a process that runs as root in its container."""
    if facts.container is not None and facts.container.root:
        yield Problem("An attacker could change the program.", "Add USER with another account to the Dockerfile.")


@rule("container-shell", "warning", "SIGTERM goes to a shell")
def shell(facts: Facts) -> Iterator[Problem]:
    """Report a process 1 that does not forward SIGTERM: each stop ends with SIGKILL."""
    if facts.container is not None and facts.container.first in _SHELLS:
        yield Problem(
            f"Process 1 is {facts.container.first}, which does not forward SIGTERM: each deployment aborts requests.",
            'Write CMD in the form ["fastapi-prodkit", "serve", ...], or end the start script with exec.',
        )


@rule("container-workers", "warning", "More workers than processors")
def workers(facts: Facts) -> Iterator[Problem]:
    """Report more workers than processor cores."""
    if facts.container is None or facts.container.cores is None or facts.workers is None:
        return
    if facts.workers > max(1, facts.container.cores):
        yield Problem(
            f"WEB_CONCURRENCY is {facts.workers}, and the container has {facts.container.cores:g} processors.",
            "Run one worker for each processor, and more containers.",
        )


@rule("container-memory", "warning", "The memory is too little for the workers")
def memory(facts: Facts) -> Iterator[Problem]:
    """Report a memory limit at which the container is killed under load."""
    if facts.container is None or facts.container.memory is None:
        return
    count = facts.workers or 1
    if facts.container.memory < count * _WORKER:
        yield Problem(
            f"{facts.container.memory // 2**20} MiB for {count} worker(s): each takes about {_WORKER // 2**20} MiB.",
            "Raise the limit, or lower WEB_CONCURRENCY.",
        )


@rule("container-env-file", "warning", "A .env file is in the image")
def env_file(facts: Facts) -> Iterator[Problem]:
    """Report .env files in the image, whose secrets every user of the image can read."""
    if facts.container is None:
        return
    found = sorted(path.name for path in facts.directory.glob(".env*") if not path.name.endswith("example"))
    if found:
        yield Problem(
            f"{', '.join(found)}: anyone with the image can read its secrets.",
            "Add .env* to .dockerignore, and set variables on the platform.",
        )


RULES = (root, shell, workers, memory, env_file)
