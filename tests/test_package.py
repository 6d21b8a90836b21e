"""The front door: what `import fastapi_prodkit` offers."""

from importlib.resources import files

import pytest

import fastapi_prodkit


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
