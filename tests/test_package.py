"""What `import fastapi_prodkit` offers."""

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
def test_public_names_can_be_imported(name):
    """Each name in `__all__` can be imported from the package itself."""
    assert getattr(fastapi_prodkit, name) is not None


def test_unknown_name_is_an_attribute_error():
    """A misspelt attribute of the package raises an AttributeError with the misspelt name."""
    with pytest.raises(AttributeError, match="module 'fastapi_prodkit' has no attribute 'create_ap'"):
        fastapi_prodkit.create_ap  # noqa: B018 - the access is the act


def test_dir_lists_public_names():
    """Before any of them is loaded."""
    assert dir(fastapi_prodkit) == sorted(fastapi_prodkit.__all__)


def test_package_has_the_marker_of_pep_561():
    """The package contains `py.typed`, without which type checkers ignore its annotations."""
    assert files("fastapi_prodkit").joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_module_without_its_extra_names_it(module):
    """A module imports, or raises a MissingExtraError that names the missing extra and its pip command."""
    try:
        import_module(module)
        extra = None
    except MissingExtraError as error:
        extra = re.fullmatch(r"[\w.]+ is not installed: pip install 'fastapi-prodkit\[(\w+)\]'", str(error))[1]

    assert extra is None or missing(extra)


def missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    installed = {each.name for each in distributions()}
    ours = [line for line in requires("fastapi-prodkit") if line.endswith(f"extra == '{extra}'")]
    return [line for line in ours if re.match(r"[\w-]+", line)[0] not in installed]
