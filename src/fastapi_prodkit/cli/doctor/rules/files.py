"""Rules about the files of the project: secrets that git keeps for ever."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from fastapi_prodkit import _variables
from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.cli.doctor.placeholders import is_placeholder
from fastapi_prodkit.cli.doctor.subject import Subject

__all__ = ["RULES"]

_CONFIGURATION = {
    *(".cfg", ".conf", ".env", ".ini", ".json", ".properties", ".sh", ".tf", ".tfvars", ".toml", ".yaml", ".yml"),
}
_KEYS = {".key", ".pem"}
_LARGEST = 1_000_000  # bytes; a larger file is no configuration
_SHORTEST = 8  # characters; a shorter value is a word of a sentence
_PRIVATE_KEY = "PRIVATE KEY-----"
_REMEDY = "Change the secret, for git keeps it; take the file out (git rm --cached) and add it to .gitignore."


@rule("files-secret", "error", "A secret is under git")
def secret(subject: Subject) -> Iterator[Fault]:
    """Tell which tracked files hold a private key, or give one of our secret variables a value."""
    if not subject.tracked:
        return
    assignment = _assignment(_secret_variables(subject.settings))
    for name in subject.tracked:
        text = _read(subject, name)
        if PurePosixPath(name).suffix in _KEYS and _PRIVATE_KEY in text:
            yield Fault(f"{name} is a private key.", _REMEDY)
        given = {match[1].upper() for match in assignment.finditer(text) if _is_secret(match[2])}
        for variable in sorted(given):
            yield Fault(f"{name} has a value of {variable}.", _REMEDY)


def _secret_variables(settings: Any) -> list[str]:
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - `--help` does not need it

    model = Settings if settings is None else type(settings)
    fields = _variables.variables(model, model.model_config.get("env_prefix", ""))
    return [name for name, field in fields.items() if field is not None and _holds_secret(field.annotation)]


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or SecretStr in get_args(annotation)


def _assignment(names: list[str]) -> re.Pattern[str]:
    """Match NAME=value, NAME: value and "NAME": "value", as dotenv, YAML, JSON, TOML and shells write them."""
    every = "|".join(map(re.escape, names))
    return re.compile(rf"""(?im)^[^#\n]*?\b({every})["']?[ \t]*[=:][ \t]*["']?([^\s"',]+)""")


def _read(subject: Subject, name: str) -> str:
    path = PurePosixPath(name)
    if not (path.name.startswith(".env") or path.suffix in _CONFIGURATION | _KEYS or "Dockerfile" in path.name):
        return ""
    file = subject.directory / name
    try:
        return file.read_text(errors="replace") if file.stat().st_size <= _LARGEST else ""
    except OSError:  # it is only in the index, or a link to nowhere
        return ""


def _is_secret(value: str) -> bool:
    """Say whether a value opens something: a URL does with a password, and only where others can reach it."""
    if "://" not in value:
        return len(value) >= _SHORTEST and not is_placeholder(value)
    try:
        url = urlsplit(value)
        password, host = unquote(url.password or ""), url.hostname or ""
    except ValueError:
        return False
    # A host without a dot is this machine, or a container beside it: in compose.yaml everybody may know the password.
    return not (is_placeholder(password) or "." not in host or host.startswith("127.") or "$" in value)


RULES = (secret,)
