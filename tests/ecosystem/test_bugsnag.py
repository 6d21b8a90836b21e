"""bugsnag: `BugsnagMiddleware`, added to the app or around it."""

import json
import os

import pytest

EVENTS = [["RuntimeError", True, "/broken"], ["ValueError", True, "/broken-too"]]


def attach(app, sink):
    import bugsnag
    from bugsnag.asgi import BugsnagMiddleware

    bugsnag.configure(api_key="0" * 32, endpoint=sink.url, asynchronous=False, auto_capture_sessions=False)
    if "AROUND" in os.environ:
        return BugsnagMiddleware(app)
    return app.add_middleware(BugsnagMiddleware)


def effects(sink):
    return [
        [event["exceptions"][0]["errorClass"], event["unhandled"], event["metaData"]["request"]["path"]]
        for body in sink.bodies("/")
        for event in json.loads(body)["events"]
    ]


@pytest.mark.parametrize("moment", ["new", "complete"])
def test_bugsnag_reports_each_exception_once(effects, way, moment):
    """As unhandled."""
    assert effects(way, moment) == EVENTS


def test_bugsnag_around_the_app_works_with_errors_raise(effects, way):
    """With ERRORS_RAISE, exceptions reach a BugsnagMiddleware that wraps the app object."""
    assert effects(way, "complete", AROUND="yes", ERRORS_RAISE="true") == EVENTS
