"""The first commit of a service."""

import shutil
import subprocess
from pathlib import Path

__all__ = ["commit"]

# The author, for those who have not told git who they are, as in a container.
_NOBODY = {"user.name": "fastapi-prodkit new", "user.email": "fastapi-prodkit-new@localhost"}


def commit(folder: Path) -> str:
    """Put the folder under git with all that is in it, and return a sentence about it.

    A folder that lies in a repository already becomes part of that one, and is left for its owner to commit.
    """
    if shutil.which("git") is None:
        return "git is not installed, so there is no repository yet."
    if _git(folder.parent, "rev-parse", "--is-inside-work-tree").returncode == 0:
        return "It lies in a repository already: commit it there."
    unknown = [f"{key}={value}" for key, value in _NOBODY.items() if _git(folder, "config", key).returncode]
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
    return (text.strip().splitlines() or ["it does not say why"])[-1]
