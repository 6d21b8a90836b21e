"""What the library raises: catchable by our root, and by what it is a case of."""

import sys

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_prodkit._extras import require
from fastapi_prodkit.exceptions import (
    CheckWarning,
    ConfigurationError,
    MigrationError,
    MissingExtraError,
    ProblemError,
    ProdkitError,
    SettingsError,
    SettingsWarning,
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ConfigurationError, ValueError),
        (SettingsError, ConfigurationError),
        (MissingExtraError, ImportError),
        (MigrationError, Exception),
        (CheckWarning, Exception),
        (ProblemError, HTTPException),
    ],
)
def test_tree(ours, theirs):
    """Each exception is ours, and also what it is a case of."""
    assert issubclass(ours, ProdkitError)
    assert issubclass(ours, theirs)


def test_settings_warning():
    """What we warn with can be filtered as the user's own warnings are."""
    assert issubclass(SettingsWarning, UserWarning)


def test_settings_error():
    """Every setting that cannot be used is listed, one on a line, under a count."""
    one = SettingsError({"LOG_LEVEL": "unknown"})
    two = SettingsError({"LOG_LEVEL": "unknown", "DATABASE_URL": "is missing"})

    assert str(one) == "1 setting cannot be used:\n  LOG_LEVEL: unknown"
    assert str(two) == "2 settings cannot be used:\n  LOG_LEVEL: unknown\n  DATABASE_URL: is missing"
    assert two.problems == {"LOG_LEVEL": "unknown", "DATABASE_URL": "is missing"}


def test_settings_error_keeps_its_own_problems():
    """What the caller does with the mapping afterwards does not change the error."""
    problems = {"LOG_LEVEL": "unknown"}
    error = SettingsError(problems)

    problems.clear()

    assert error.problems == {"LOG_LEVEL": "unknown"}


def test_problem_defaults():
    """A problem of a status alone is about:blank with the status phrase, as RFC 9457 section 4.2.1 asks for."""
    problem = ProblemError(404)

    assert (problem.status_code, problem.type) == (404, "about:blank")
    assert (problem.title, problem.detail) == ("Not Found", "Not Found")
    assert (problem.headers, problem.extensions) == (None, {})
    assert str(problem) == "404: Not Found"


def test_problem_with_everything():
    """Type, title, detail, headers and further members are what the caller says."""
    problem = ProblemError(409, "Sold.", type="/sold", title="Sold out", headers={"Retry-After": "5"}, article=7)

    assert (problem.type, problem.title, problem.detail) == ("/sold", "Sold out", "Sold.")
    assert problem.headers == {"Retry-After": "5"}
    assert problem.extensions == {"article": 7}


def test_problem_of_an_unknown_status():
    """A status that has no phrase is no reason to fail while failing."""
    assert ProblemError(499).title == "Unknown Error"


def test_problem_without_handlers():
    """In an app without our handlers a problem is still a correct response of its status, with its headers."""

    async def limited():
        raise ProblemError(429, "Later.", headers={"Retry-After": "5"})

    async def limited_in_starlette(request):
        raise ProblemError(429, "Later.", headers={"Retry-After": "5"})

    fastapi, starlette = FastAPI(), Starlette(routes=[Route("/", limited_in_starlette)])
    fastapi.get("/")(limited)

    responses = [TestClient(app).get("/") for app in (fastapi, starlette)]

    assert [response.status_code for response in responses] == [429, 429]
    assert [response.headers["retry-after"] for response in responses] == ["5", "5"]
    assert responses[0].json() == {"detail": "Later."}
    assert responses[1].text == "Later."


def test_require():
    """A module that is installed is imported and returned."""
    assert require("json.decoder", extra="database") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["not_installed_anywhere", "not_installed_anywhere.part"])
def test_require_what_is_missing(module):
    """A missing package is named together with the command that installs it."""
    with pytest.raises(MissingExtraError) as caught:
        require(module, extra="database")

    assert str(caught.value) == "not_installed_anywhere is not installed: pip install 'fastapi-prodkit[database]'"


def test_require_what_is_broken(tmp_path, monkeypatch):
    """A package that is installed but lacks a dependency of its own says so itself; our hint would be wrong."""
    (tmp_path / "broken_package.py").write_text("import a_dependency_of_it")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_it") as caught:
        require("broken_package", extra="database")

    assert not isinstance(caught.value, MissingExtraError)
