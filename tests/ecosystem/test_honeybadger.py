"""honeybadger: `app.add_middleware(ASGIHoneybadger)`."""

import json
from urllib.parse import urlsplit

import pytest


def attach(app, sink):
    from honeybadger.contrib import ASGIHoneybadger

    app.add_middleware(ASGIHoneybadger, api_key="key", endpoint=sink.url, environment="production", force_sync=True)


def effects(sink):
    notices = [json.loads(body) for body in sink.bodies("/v1/notices")]
    return [[notice["error"]["class"], urlsplit(notice["request"]["context"]["url"]).path] for notice in notices]


@pytest.mark.parametrize("moment", ["new", "complete"])
def test_honeybadger_has_one_notice_per_exception(effects, way, moment):
    """Honeybadger receives exactly one notice for each exception of an endpoint."""
    assert effects(way, moment) == [["RuntimeError", "/broken"], ["ValueError", "/broken-too"]]
