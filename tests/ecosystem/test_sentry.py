"""sentry-sdk: `sentry_sdk.init(...)`, with and without records of the log as events, and around the app object."""

import json
import os
import re

import pytest

LOADED = ("sentry_sdk.integrations.fastapi",)

EVENTS = [["/broken", "RuntimeError", "starlette", False], ["/broken-too", "ValueError", "starlette", False]]
TRANSACTIONS = [
    ["/broken", "internal_error"],
    ["/broken-too", "internal_error"],
    ["/gone", "not_found"],
    ["/items/{number}", "invalid_argument"],
    ["/items/{number}", "ok"],
    ["/nowhere", "not_found"],
    ["/stream", "ok"],
]


def attach(app, sink):
    import sentry_sdk
    from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
    from sentry_sdk.integrations.fastapi import FastApiIntegration
    from sentry_sdk.integrations.logging import LoggingIntegration
    from sentry_sdk.integrations.starlette import StarletteIntegration

    around = "AROUND" in os.environ
    framework = [] if around else [StarletteIntegration(), FastApiIntegration()]
    log = [LoggingIntegration(event_level=None)] if "QUIET" in os.environ else []
    sentry_sdk.init(
        sink.url.replace("//", "//key@") + "/1",
        traces_sample_rate=1.0,
        integrations=[*framework, *log],
        auto_enabling_integrations=False,  # otherwise it imports every library that it integrates, which takes seconds
    )
    return SentryAsgiMiddleware(app) if around else None


def effects(sink):
    import sentry_sdk

    sentry_sdk.flush()
    items = [item for body in sink.bodies("/api/1/envelope") for item in _items(body)]
    events = [
        [event["transaction"], error["type"], error["mechanism"]["type"], error["mechanism"]["handled"]]
        for kind, event in items
        if kind == "event"
        for error in event["exception"]["values"]
    ]
    transactions = [
        [re.sub(r"^http://[^/]*", "", event["transaction"]), event["contexts"]["trace"]["status"]]
        for kind, event in items
        if kind == "transaction"
    ]
    return {"events": sorted(events), "transactions": sorted(transactions)}


def _items(envelope):
    """Yield type and content of each item: https://develop.sentry.dev/sdk/data-model/envelopes/."""
    _, _, rest = envelope.partition(b"\n")
    while rest:
        head, _, rest = rest.partition(b"\n")
        header = json.loads(head)
        yield header["type"], json.loads(rest[: header["length"]])
        rest = rest[header["length"] :].lstrip(b"\n")


@pytest.mark.parametrize("moment", ["before", "new", "complete"])
def test_sentry_has_one_event_per_exception(effects, way, moment):
    """Under its route, and one transaction per request."""
    assert effects(way, moment) == {"events": EVENTS, "transactions": TRANSACTIONS}


def test_sentry_works_without_its_logging_integration(effects, way):
    """Sentry receives all events and transactions even if log records do not become events."""
    assert effects(way, "before", QUIET="yes") == {"events": EVENTS, "transactions": TRANSACTIONS}


def test_sentry_around_the_app_works_with_errors_raise(effects, way):
    """The exceptions are logged by then."""
    found = effects(way, "complete", AROUND="yes", QUIET="yes", ERRORS_RAISE="true")

    assert [event[1:] for event in found["events"]] == [["RuntimeError", "asgi", False], ["ValueError", "asgi", False]]
