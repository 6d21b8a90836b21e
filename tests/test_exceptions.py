"""The exceptions of the library, and their base classes."""

import copy
import pickle
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
def test_exceptions_have_our_root_and_a_standard_base(ours, theirs):
    """Every exception of the package derives from ProdkitError and from a fitting standard class."""
    assert issubclass(ours, ProdkitError)
    assert issubclass(ours, theirs)


class _OutOfStockError(ProblemError):
    def __init__(self, article: int) -> None:
        super().__init__(status=409, detail="Sold.", article=article)


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("wrong"),
        SettingsError({"LOG_LEVEL": "unknown"}),
        MissingExtraError("not installed"),
        MigrationError("pending"),
        CheckWarning("slow"),
        ProblemError(status=409, detail="Sold.", title="Sold out", headers={"Retry-After": "5"}, article=7),
        _OutOfStockError(article=7),
    ],
)
@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_exception_can_be_pickled_and_copied(error, copied):
    """A process pool sends it back to the caller, whatever arguments its class takes."""
    other = copied(error)

    assert type(other) is type(error)
    assert (str(other), vars(other)) == (str(error), vars(error))


def test_settings_warning_is_a_user_warning():
    """SettingsWarning derives from UserWarning, so that warning filters for UserWarning apply."""
    assert issubclass(SettingsWarning, UserWarning)


def test_settings_error_lists_every_setting():
    """One on a line, under a count."""
    one = SettingsError({"LOG_LEVEL": "unknown"})
    two = SettingsError({"LOG_LEVEL": "unknown", "DATABASE_URL": "is missing"})

    assert str(one) == "1 setting cannot be used:\n  LOG_LEVEL: unknown"
    assert str(two) == "2 settings cannot be used:\n  LOG_LEVEL: unknown\n  DATABASE_URL: is missing"
    assert two.problems == {"LOG_LEVEL": "unknown", "DATABASE_URL": "is missing"}


def test_settings_error_copies_its_problems():
    """A later change to the mapping of the caller does not change the problems of a SettingsError."""
    problems = {"LOG_LEVEL": "unknown"}
    error = SettingsError(problems)

    problems.clear()

    assert error.problems == {"LOG_LEVEL": "unknown"}


def test_problem_of_a_status_alone_is_about_blank():
    """With the status phrase, as RFC 9457 section 4.2.1 asks for."""
    problem = ProblemError(404)

    assert (problem.status_code, problem.type) == (404, "about:blank")
    assert (problem.title, problem.detail) == ("Not Found", "Not Found")
    assert (problem.headers, problem.extensions) == (None, {})
    assert str(problem) == "404: Not Found"


def test_problem_takes_all_members():
    """ProblemError stores type, title, detail, headers and extra members as the caller passes them."""
    problem = ProblemError(409, "Sold.", type="/sold", title="Sold out", headers={"Retry-After": "5"}, article=7)

    assert (problem.type, problem.title, problem.detail) == ("/sold", "Sold out", "Sold.")
    assert problem.headers == {"Retry-After": "5"}
    assert problem.extensions == {"article": 7}


def test_problem_of_an_unknown_status_has_a_title():
    """A ProblemError whose status has no standard phrase gets the title Unknown Error instead of failing."""
    assert ProblemError(499).title == "Unknown Error"


def test_problem_without_handlers_has_status_and_headers():
    """An app without problem handlers answers a ProblemError with the status and headers of the error."""

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


def test_require_returns_an_installed_module():
    """require imports an installed module and returns the module object."""
    assert require("json.decoder", extra="database") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["not_installed_anywhere", "not_installed_anywhere.part"])
def test_require_names_the_extra_of_a_missing_module(module):
    """require raises MissingExtraError with the package name and the pip command for the extra."""
    with pytest.raises(MissingExtraError) as caught:
        require(module, extra="database")

    assert str(caught.value) == "not_installed_anywhere is not installed: pip install 'fastapi-prodkit[database]'"


def test_require_raises_the_error_of_a_broken_module(tmp_path, monkeypatch):
    """A dependency of the module is missing."""
    (tmp_path / "broken_package.py").write_text("import a_dependency_of_it")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_it") as caught:
        require("broken_package", extra="database")

    assert not isinstance(caught.value, MissingExtraError)
