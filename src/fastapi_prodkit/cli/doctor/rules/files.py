"""Rules about the files under git: those with variables, and those that start the service."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule

__all__ = ["RULES"]

_EXAMPLES = ("dist", "example", "sample", "template")  # endings of names of files to copy
_CONFIGURATION = {
    *(".cfg", ".conf", ".env", ".ini", ".json", ".properties", ".sh", ".tf", ".tfvars", ".toml", ".yaml", ".yml"),
}
_LARGEST = 1_000_000  # bytes; a larger file is not a configuration file
# Commands in a shell script, JSON or YAML. Commands with `--reload` are for development and ignored.
_UVICORN = re.compile(
    r"""(?m)^(?!.*--reload)[^#\n]*(?:\buvicorn["',\s]+[\w.]+:\w|\bUvicornWorker\b|\bfastapi["',\s]+run\b)"""
)


@rule("files-env-file", "error", "A .env file is under git")
def env_file(facts: Facts) -> Iterator[Problem]:
    """Report tracked .env files; their content is not read."""
    for name in facts.tracked:
        if _is_dotenv(name) and not name.endswith(_EXAMPLES):
            yield Problem(
                f"{name}: git keeps its secrets for ever, and anyone with the repository can read them.",
                f"git rm --cached {name}, add it to .gitignore, and change the secrets in it.",
            )


@rule("files-uvicorn", "warning", "The head of a request has no size limit")
def uvicorn(facts: Facts) -> Iterator[Problem]:
    """Report tracked files that start a server without a limit for the head of a request."""
    for name in facts.tracked:
        if _is_command(name) and _UVICORN.search(text := _read(facts, name)) and "h11" not in text.lower():
            yield Problem(
                f"{name} starts uvicorn, which does not limit the head: one endless header line blocks it for seconds.",
                "Use fastapi-prodkit serve or uvicorn --http h11. If a load balancer limits heads, ignore this.",
            )


def _is_dotenv(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name == ".env" or path.name.startswith(".env.") or path.suffix == ".env"


def _is_command(name: str) -> bool:
    """Return whether a file may start the service in production."""
    path = PurePosixPath(name)
    configuration = _is_dotenv(name) or path.suffix in _CONFIGURATION or "Dockerfile" in path.name
    return configuration or path.name == "Procfile" or path.suffix == ".service"


def _read(facts: Facts, name: str) -> str:
    file = facts.directory / name
    try:
        return file.read_text(errors="replace") if file.stat().st_size <= _LARGEST else ""
    except OSError:  # it is only in the index, or a link to nowhere
        return ""


RULES = (env_file, uvicorn)
