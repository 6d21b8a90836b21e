"""The front door: what `import fastapi_prodkit` offers."""

import re
from importlib import import_module
from importlib.metadata import distributions, requires
from importlib.resources import files
from pkgutil import walk_packages

import pytest

import fastapi_prodkit
from fastapi_prodkit.exceptions import MissingExtraError

MODULES = [each.name for each in walk_packages(fastapi_prodkit.__path__, "fastapi_prodkit.", onerror=str)]


@pytest.mark.parametrize("name", fastapi_prodkit.__all__)
def test_every_name_in_the_table_of_contents_resolves(name):
    """Each public name is importable from the package itself."""
    assert getattr(fastapi_prodkit, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    """A typo fails as it does in any module, naming what was looked for."""
    with pytest.raises(AttributeError, match="module 'fastapi_prodkit' has no attribute 'create_ap'"):
        fastapi_prodkit.create_ap  # noqa: B018 - the access is the act


def test_the_names_can_be_listed():
    """Completion in an editor or a shell shows the public names before any of them is loaded."""
    assert dir(fastapi_prodkit) == sorted(fastapi_prodkit.__all__)


def test_type_checkers_are_told_that_the_package_is_typed():
    """PEP 561: without the marker file, users' type checkers ignore our annotations."""
    assert files("fastapi_prodkit").joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_what_cannot_be_imported_names_an_extra_that_is_missing(module):
    """Whatever of the extras is installed, each module is there, or says in one line what to install."""
    try:
        import_module(module)
        extra = None
    except MissingExtraError as error:
        extra = re.fullmatch(r"[\w.]+ is not installed: pip install 'fastapi-prodkit\[(\w+)\]'", str(error))[1]

    assert extra is None or missing(extra)


def missing(extra: str) -> list[str]:
    """Return which packages of an extra are not installed."""
    installed = {each.name for each in distributions()}
    ours = [line for line in requires("fastapi-prodkit") if line.endswith(f"extra == '{extra}'")]
    return [line for line in ours if re.match(r"[\w-]+", line)[0] not in installed]
