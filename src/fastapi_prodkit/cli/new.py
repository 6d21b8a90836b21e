"""`fastapi-prodkit new NAME`: create a service from the example."""

import keyword
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from fastapi_prodkit.cli.repository import commit
from fastapi_prodkit.cli.template import Authentication, Database, Deploy, Service, render
from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["app"]


Answer = TypeVar("Answer")

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST: Final = 40  # characters; load balancers, roles and databases are named after the service
_ON_ECS: Final = range(3, 23)  # characters; the templates of deploy/ecs append words to the name

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def new(  # noqa: PLR0913 - an option each
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the service, such as my-shop.")],
    *,
    database: Annotated[Database | None, typer.Option(help="Database of the service.")] = None,
    redis: Annotated[
        bool | None, typer.Option("--redis/--no-redis", help="Count rate limits in Redis, shared by all processes.")
    ] = None,
    auth: Annotated[
        Authentication | None,
        typer.Option(help="What signs the tokens of users: an OpenID issuer (oidc), or a shared secret."),
    ] = None,
    deploy: Annotated[
        Deploy | None, typer.Option(help="docker: an image and a CI workflow; ecs: also a deployment to AWS.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Target directory; by default a new one named NAME.")
    ] = None,
    git: Annotated[bool, typer.Option("--git/--no-git", help="Create a repository with a first commit.")] = True,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not prompt: PostgreSQL, Redis, oidc and docker.")
    ] = False,
) -> None:
    """Create a service from the example, with tests, linting and type checks passing.

    Prompts for missing options.
    """
    folder = directory or Path(name)
    _check(name, folder)
    ask = _ask if sys.stdin.isatty() and not yes else _assume
    service = Service(
        name=name,
        database=database or ask("Database", Database.POSTGRESQL),
        redis=ask("Redis for rate limits", True) if redis is None else redis,
        auth=auth or ask("Authentication", Authentication.OIDC),
        deploy=deploy or ask("Deploy with", Deploy.DOCKER),
    )
    _check_deploy(service)
    files = render(service)
    _write(files, folder)
    typer.echo(f"{folder} has {len(files)} files. {commit(folder) if git else ''}".rstrip())
    typer.echo(f"Next:\n\n  cd {folder}\n  make test\n  make demo")


def _check(name: str, folder: Path) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        rule = f"lower-case letters, digits and single hyphens, at most {_LONGEST}"
        raise ConfigurationError(f"{name!r} cannot name a service ({rule}); try: fastapi-prodkit new {_nearest(name)}")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise ConfigurationError(f"{name!r} is a name that Python uses; try: fastapi-prodkit new {name}-service")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists already; try: fastapi-prodkit new {name} --directory {folder}-2")


def _nearest(name: str) -> str:
    """Return the valid name that is most similar to the given one."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:_LONGEST].strip("-")
    return words or "my-service"


def _check_deploy(service: Service) -> None:
    """Refuse SQLite and limits in memory on ECS, whose tasks share neither disk nor memory, and unsuitable names."""
    if service.deploy == Deploy.ECS and len(service.name) not in _ON_ECS:
        near = service.name[: _ON_ECS[-1]].strip("-") if len(service.name) > _ON_ECS[-1] else f"{service.name}-service"
        rule = f"{_ON_ECS[0]} to {_ON_ECS[-1]} characters"
        raise ConfigurationError(f"stacks on ECS have names of {rule}; try: fastapi-prodkit new {near} --deploy ecs")
    if service.deploy == Deploy.ECS and service.database == Database.SQLITE:
        raise ConfigurationError("tasks on ECS keep no files; try: --database postgresql, or --deploy docker")
    if service.deploy == Deploy.ECS and not service.redis:
        raise ConfigurationError("tasks on ECS need a shared store for rate limits; try: --redis, or --deploy docker")


def _ask(what: str, default: Answer) -> Answer:
    kind = type(default)
    prompt: Any = typer.confirm if kind is bool else partial(typer.prompt, type=kind)  # typed separately
    answer: Answer = prompt(what, default=default)
    return answer


def _assume(_what: str, default: Answer) -> Answer:
    return default


def _write(files: dict[str, str], folder: Path) -> None:
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
        if text.startswith("#!") and os.name != "nt":
            target.chmod(0o755)
