"""Import the object that `module:app` names, in a given environment, or suggest another name."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastapi_prodkit.cli.program import UnknownCommandError

__all__ = ["Environment", "UnknownAppError", "as_in", "resolve"]

Environment: TypeAlias = Literal["dev", "test", "staging", "prod"]


class UnknownAppError(UnknownCommandError):
    """The module does not exist, or has no such app; the message suggests another name."""


@contextmanager
def as_in(environment: str | None) -> Iterator[None]:
    """Set ENVIRONMENT, and make modules of the current directory importable, within this context.

    Args:
        environment: Value of ENVIRONMENT; None to leave it unchanged.
    """
    before, path = os.environ.get("ENVIRONMENT"), list(sys.path)
    if environment is not None:
        os.environ["ENVIRONMENT"] = environment
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = path
        os.environ.pop("ENVIRONMENT", None)
        if before is not None:
            os.environ["ENVIRONMENT"] = before


def resolve(target: str, *, command: str, kind: type | None = None) -> Any:
    """Import and return what `target` names; modules of the current directory have to be on the path.

    Args:
        target: Such as service.main:app.
        command: The command that it is an argument of, for the suggestion.
        kind: Base class of the classes to suggest; None to suggest apps.

    Raises:
        UnknownAppError: The module does not exist, or does not have this name.
        Exception: Any exception of the module.
    """
    module, colon, path = target.partition(":")
    if not (module and colon and path):
        what, example = ("settings", "Settings") if kind else ("app", "app")
        raise UnknownAppError(
            f"{target!r} names no {what}; try: fastapi-prodkit {command} {module or 'main'}:{example}"
        )
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the app imports is missing
        modules = get_close_matches(module, _modules(Path.cwd()), n=1)
    else:
        try:
            return pkgutil.resolve_name(target)
        except AttributeError:
            names = _classes(imported, kind, path) if kind else _apps(imported, path)
        raise UnknownAppError(f"there is no {path!r} in {module}; {_instead(command, [module], names)}")
    raise UnknownAppError(f"there is no module {module!r} here; {_instead(command, modules, [path])}")


def _instead(command: str, modules: list[str], names: list[str]) -> str:
    target = f"{modules[0]}:{names[0]}" if modules and names else "--help"
    return f"try: fastapi-prodkit {command} {target}"


def _modules(directory: Path) -> list[str]:
    """Return the modules in the directory and in its packages."""
    files = [*directory.glob("[!.]*.py"), *directory.glob("[!.]*/*.py")]
    names = (".".join(path.relative_to(directory).with_suffix("").parts) for path in files)
    return sorted(name.removesuffix(".__init__") for name in names)


def _apps(module: Any, typed: str) -> list[str]:
    """Return the names of the module's apps, or else of callables with a name similar to the one typed."""
    from starlette.applications import Starlette  # noqa: PLC0415 - `--help` does not need it

    members = list(_members(module))
    apps = [name for name, value in members if isinstance(value, Starlette)]
    callables = [name for name, value in members if callable(value)]
    return get_close_matches(typed, apps, n=1) or apps or get_close_matches(typed, callables, n=1)


def _classes(module: Any, kind: type, typed: str) -> list[str]:
    """Return the names of subclasses of `kind`, those defined in the module first."""
    found = {name: value for name, value in _members(module) if isinstance(value, type) and issubclass(value, kind)}
    own = [name for name, value in found.items() if value is not kind]
    return get_close_matches(typed, own, n=1) or own or list(found)


def _members(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of the module, including those that `__getattr__` provides."""
    for name in dir(module):
        with suppress(Exception):  # for example, an extra is missing
            yield name, getattr(module, name)
