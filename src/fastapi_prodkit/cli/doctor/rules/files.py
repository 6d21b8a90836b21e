"""Rules about the files of the project: secrets that git keeps for ever, and how they start the service."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from fastapi_prodkit._config import variables
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.cli.doctor.placeholders import is_placeholder

__all__ = ["RULES"]

_CONFIGURATION = {
    *(".cfg", ".conf", ".env", ".ini", ".json", ".properties", ".sh", ".tf", ".tfvars", ".toml", ".yaml", ".yml"),
}
_LARGEST = 1_000_000  # bytes; a larger file is no configuration
_LARGEST_KEY = 65_536  # bytes; a larger file of another kind is no key: one of 16384 bits has 13 kB
_SHORTEST = 8  # characters; a shorter value is a word of a sentence
_HEADER = r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"  # RFC 7468 section 10, OpenSSH, OpenPGP
_IS_KEY = re.compile(rf"[\s\ufeff]*{_HEADER}")
# One that stands in JSON, YAML or a source: with its content, because tests and documentation have the header alone.
_HOLDS_KEY = re.compile(rf"{_HEADER}(?:\s|\\[nr])+(?:[\w-]+: .*\s+)*[A-Za-z0-9+/=]{{32}}")
# In a shell's form, in JSON or in YAML; `--reload` is for a developer.
_UVICORN = re.compile(
    r"""(?m)^(?!.*--reload)[^#\n]*(?:\buvicorn["',\s]+[\w.]+:\w|\bUvicornWorker\b|\bfastapi["',\s]+run\b)"""
)
# What names of secrets end in, in a file of variables, whosever they are.
_ENDINGS = r"\w*(?:SECRET|TOKEN|PASSWORD|PASSWD|(?:ACCESS|API|PRIVATE|SECRET|SIGNING)_KEY)"
_REMEDY = "Change the secret, for git keeps it; take the file out (git rm --cached) and add it to .gitignore."


@rule("files-secret", "error", "A secret is under git")
def secret(facts: Facts) -> Iterator[Fault]:
    """Tell which tracked files hold a private key, or give a secret variable a value."""
    if not facts.tracked:
        return
    secrets, others = _own_variables(facts.settings)
    names = "|".join(map(re.escape, secrets))
    configuration, dotenv = _assignment(names), _assignment(f"{names}|{_ENDINGS}")
    for name in facts.tracked:
        text = _read(facts, name)
        if _IS_KEY.match(text):
            yield Fault(f"{name} is a private key.", _REMEDY)
        elif _HOLDS_KEY.search(text):
            yield Fault(f"{name} holds a private key.", _REMEDY)
        if _is_configuration(name):
            assignment = dotenv if _is_dotenv(name) else configuration
            given = {match[1].upper() for match in assignment.finditer(text) if _is_secret(match[2])}
            for variable in sorted(given - others):
                yield Fault(f"{name} has a value of {variable}.", _REMEDY)


@rule("files-uvicorn", "warning", "A head of any size is read")
def uvicorn(facts: Facts) -> Iterator[Fault]:
    """Tell which tracked files start a server that does not limit the head of a request."""
    for name in facts.tracked:
        if _is_command(name) and _UVICORN.search(text := _read(facts, name)) and "h11" not in text.lower():
            yield Fault(
                f"{name} starts uvicorn, which reads a head of any size: one endless header line stops it for seconds.",
                "Start fastapi-prodkit serve, or uvicorn --http h11; a load balancer that limits heads does as well.",
            )


def _own_variables(settings: Any) -> tuple[list[str], set[str]]:
    """Return the secret variables of the settings, and those of ours that are none, whatever their names end in."""
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - `--help` does not need it

    model = Settings if settings is None else type(settings)
    prefix = model.model_config.get("env_prefix", "")
    fields = variables.variables(model, prefix)
    secrets = [name for name, field in fields.items() if field is not None and _holds_secret(field.annotation)]
    return secrets, set(variables.variables(Settings, prefix)).difference(secrets)


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or SecretStr in get_args(annotation)


def _assignment(names: str) -> re.Pattern[str]:
    """Match NAME=value, NAME: value and "NAME": "value", as dotenv, YAML, JSON, TOML and shells write them."""
    return re.compile(rf"""(?im)^[^#\n]*?\b({names})["']?[ \t]*[=:][ \t]*["']?([^\s"',]+)""")


def _is_dotenv(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(".env") or path.suffix == ".env"


def _is_configuration(name: str) -> bool:
    path = PurePosixPath(name)
    return _is_dotenv(name) or path.suffix in _CONFIGURATION or "Dockerfile" in path.name


def _is_command(name: str) -> bool:
    """Say whether a file may start the service where it runs."""
    path = PurePosixPath(name)
    return _is_configuration(name) or path.name == "Procfile" or path.suffix == ".service"


def _read(facts: Facts, name: str) -> str:
    file = facts.directory / name
    largest = _LARGEST if _is_configuration(name) else _LARGEST_KEY
    try:
        return file.read_text(errors="replace") if file.stat().st_size <= largest else ""
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


RULES = (secret, uvicorn)
