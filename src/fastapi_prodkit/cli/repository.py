"""Create the first commit of a service."""

import shutil
import subprocess
from pathlib import Path

__all__ = ["commit"]

# The author if git has none configured, as in a container.
_DEFAULT_AUTHOR = {"user.name": "fastapi-prodkit new", "user.email": "fastapi-prodkit-new@localhost"}


def commit(folder: Path) -> str:
    """Create a git repository in the folder, commit all files, and return a sentence about the result.

    If the folder is inside a repository already, nothing is committed.
    """
    if shutil.which("git") is None:
        return "git is not installed, so there is no repository yet."
    if _git(folder.parent, "rev-parse", "--is-inside-work-tree").returncode == 0:
        return "It is inside a repository already: commit it there."
    unknown = [f"{key}={value}" for key, value in _DEFAULT_AUTHOR.items() if _git(folder, "config", key).returncode]
    for command, *options in (
        ("init", "--quiet", "--initial-branch=main"),
        ("add", "--all"),
        ("commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message=Start from fastapi-prodkit new"),
    ):
        done = _git(folder, *(part for pair in unknown for part in ("-c", pair)), command, *options)
        if done.returncode:
            return f"git {command} failed, so there is no first commit yet: {_last_line(done.stderr)}"
    return "Its first commit is on the branch main."


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["git gives no reason"])[-1]
