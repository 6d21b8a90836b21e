"""The keywords that `create_app` passes to FastAPI, and their types."""

import inspect
import typing

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit._assembly.fastapi_keywords import FastAPIKeywords

OWN = {"lifespan", "middleware"}  # parameters of create_app
SINCE_0_165 = {"form_limits"}
FASTAPIS = inspect.signature(FastAPI).parameters.keys() - OWN


def test_keywords_are_all_that_fastapi_takes():
    """The typed keywords of `create_app` include every parameter of FastAPI's constructor."""
    ours = FastAPIKeywords.__optional_keys__

    assert ours - SINCE_0_165 == FASTAPIS - SINCE_0_165


def test_keywords_have_the_types_of_fastapi():
    """Type hints of the keywords of `create_app` equal those of FastAPI's constructor."""
    theirs = typing.get_type_hints(FastAPI.__init__)
    ours = typing.get_type_hints(FastAPIKeywords)

    assert {name: ours[name] for name in FASTAPIS - SINCE_0_165} == {
        name: theirs[name] for name in FASTAPIS - SINCE_0_165
    }


def test_keywords_reach_fastapi():
    """They win over values from the settings; FastAPI raises its own error for an unknown keyword."""

    async def gone(request, error):
        return PlainTextResponse("gone", status_code=410)

    app = create_app(Settings(), title="Orders", summary="What was ordered.", exception_handlers={404: gone})

    assert app.title == "Orders"
    assert app.summary == "What was ordered."
    assert TestClient(app).get("/nowhere").status_code == 410
    with pytest.raises(TypeError, match="titel"):
        create_app(Settings(), titel="Orders")
