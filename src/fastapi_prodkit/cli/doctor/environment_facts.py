"""Facts about the environment: files under git, installed packages, and the container."""

import os
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from fastapi_prodkit.cli.doctor.facts import Container

__all__ = ["container", "installed", "tracked"]

_GIT_TIMEOUT = 10.0  # seconds
_SERVER = ("uvicorn", "uvloop", "httptools")
# Paths that exist in containers.
_MARKS = (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io")
_VARIABLES = ("ECS_CONTAINER_METADATA_URI_V4", "KUBERNETES_SERVICE_HOST")


def tracked(directory: Path) -> tuple[tuple[str, ...], str | None]:
    """Return the tracked files below the directory; or none, and the reason.

    Git refuses a repository of another user, because its configuration can run commands. This check is not bypassed.
    """
    command = ["git", "ls-files", "-z"]
    try:
        run = subprocess.run(command, cwd=directory, capture_output=True, timeout=_GIT_TIMEOUT, check=False)  # noqa: S603 - fixed
    except FileNotFoundError:
        return (), "git is not installed"
    except subprocess.TimeoutExpired:
        return (), f"git took longer than {_GIT_TIMEOUT:g} s"
    if run.returncode:
        reason = run.stderr.decode(errors="replace").strip().partition("\n")[0].removeprefix("fatal: ")
        return (), reason.partition(" (")[0] or "git failed"
    return tuple(name for name in run.stdout.decode(errors="surrogateescape").split("\0") if name), None


def installed() -> frozenset[str]:
    """Return which packages of the server are installed."""
    return frozenset(filter(find_spec, _SERVER))


def container(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Container | None:
    """Return the limits of the container of this process; None outside of a container.

    Args:
        root: Root of the file system.
        environment: Environment variables. Default: those of the process.
    """
    variables = os.environ if environment is None else environment
    if not any((root / mark).exists() for mark in _MARKS) and not any(name in variables for name in _VARIABLES):
        return None
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    memory = _read(root / "sys/fs/cgroup/memory.max")
    return Container(
        root=hasattr(os, "geteuid") and os.geteuid() == 0,
        first=_read(root / "proc/1/comm"),
        cores=int(quota) / int(period) if quota.isdigit() and period.isdigit() else None,
        memory=int(memory) if memory.isdigit() else None,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
