"""Bearer tokens of operators: wrong tokens are logged without their value, counted and limited."""

import logging

import pytest
from clock import Clock
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from starlette.requests import Request

from fastapi_prodkit import Settings, _bearer, create_app
from fastapi_prodkit._bearer import BearerToken
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.metrics import metrics_router
from fastapi_prodkit.sections import MetricsSettings

TOKEN = "t0p-s3cret-pässword"
REFUSED = "http_server_refused_tokens_total"


def bearer(token):
    return {"Authorization": f"Bearer {token}".encode()}


@pytest.fixture
def registry():
    return CollectorRegistry()


def refusals(registry):
    """Return how many requests were refused for each reason."""
    return {
        sample.labels["reason"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "http_server_refusals_total"
    }


@pytest.fixture
def client(registry):
    """A client of an app in production; all tokens of the app are equal."""
    tokens = {"metrics": {"token": TOKEN}, "health": {"token": TOKEN}, "log": {"level_token": TOKEN}}
    settings = Settings(environment="prod", hosts={"allowed": ["testserver"]}, **tokens)
    with TestClient(create_app(settings, registry=registry)) as client:
        yield client


@pytest.fixture
def lines(caplog):
    """The log lines about tokens."""
    return lambda: [
        each.getMessage()
        for each in caplog.records
        if (each.name, each.levelno) == ("fastapi_prodkit.tokens", logging.WARNING)
    ]


@pytest.mark.parametrize("path", ["/metrics", "/log-level"])
def test_wrong_token_is_logged_and_counted(client, registry, lines, capsys, path):
    """The line names route and client, not the token; a right or missing token is not counted."""
    client.get(path)
    client.get(path, headers=bearer(TOKEN))

    response = client.get(path, headers=bearer("a-guess-that-nobody-reads"))

    assert response.status_code == 401
    assert lines() == [f"{path}: a request of testclient had a wrong token"]
    assert "a-guess-that-nobody-reads" not in capsys.readouterr().out
    assert registry.get_sample_value(REFUSED, {"http_route": path}) == 1
    assert refusals(registry) == {"unauthenticated": 1}


@pytest.mark.parametrize("path", ["/metrics", "/log-level"])
def test_eleventh_wrong_token_in_a_minute_is_not_checked(client, registry, lines, path):
    """It is not logged, either."""
    statuses = [client.get(path, headers=bearer(f"guess-{number}")).status_code for number in range(12)]

    response = client.get(path, headers=bearer(TOKEN))

    assert statuses == [401] * 10 + [429] * 2
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["content-type"] == "application/problem+json"
    assert len(lines()) == 10
    assert registry.get_sample_value(REFUSED, {"http_route": path}) == 13
    assert refusals(registry) == {"unauthenticated": 10, "rate_limited": 3}


@pytest.mark.parametrize("path", ["/ready", "/startup"])
def test_probe_answers_without_details_after_too_many_wrong_tokens(client, registry, lines, path):
    """Even with the right token."""
    told = client.get(path, headers=bearer(TOKEN)).json()
    statuses = [client.get(path, headers=bearer("wrong")).status_code for _ in range(12)]

    response = client.get(path, headers=bearer(TOKEN))

    assert "checks" in told
    assert statuses == [200] * 12
    assert response.json() == {"status": "pass"}
    assert len(lines()) == 10
    assert registry.get_sample_value(REFUSED, {"http_route": path}) == 13
    assert refusals(registry) == {}


def test_failing_probe_is_not_a_refusal(registry):
    """Its 503 is the answer of the probe, with any token."""
    app = create_app(
        Settings(environment="test", health={"token": TOKEN}), checks={"no": lambda: 1 / 0}, registry=registry
    )
    client = TestClient(app)

    statuses = [client.get("/ready", headers=headers).status_code for headers in ({}, bearer("wrong"), bearer(TOKEN))]

    assert statuses == [503] * 3
    assert refusals(registry) == {}


def test_wrong_tokens_are_counted_per_client_and_minute(registry):
    """After ten wrong tokens, a client is refused for a minute, while other clients are not."""
    clock = Clock()
    token = BearerToken(SecretStr(TOKEN), registry=registry, clock=clock)

    def send(value, host):
        headers = [(b"authorization", f"Bearer {value}".encode())]
        return token.is_sent(Request({"type": "http", "headers": headers, "client": (host, 1)}))

    guesses = [send("wrong", "203.0.113.1") for _ in range(10)]
    during = send(TOKEN, "203.0.113.1"), send(TOKEN, "203.0.113.2")
    clock.now += 60

    assert guesses == [False] * 10
    assert during == (False, True)
    assert send(TOKEN, "203.0.113.1")


def test_number_of_counted_clients_is_bounded(registry, monkeypatch):
    """Counts of wrong tokens are discarded beyond a maximum number of clients, which bounds the memory."""
    monkeypatch.setattr(_bearer, "_MAX_CLIENTS", 2)
    token = BearerToken(SecretStr(TOKEN), registry=registry, clock=Clock())

    def send(host):
        headers = [(b"authorization", b"Bearer wrong")]
        return token.is_sent(Request({"type": "http", "headers": headers, "client": (host, 1)}))

    for number in range(10):
        send(f"203.0.113.{number}")

    assert len(token._wrong_tokens._counts) <= 3


def test_wrong_token_without_a_route_is_unmatched():
    """For example in a user's middleware."""
    registry = CollectorRegistry()
    token = BearerToken(SecretStr(TOKEN), registry=registry)
    request = Request({"type": "http", "headers": [(b"authorization", b"Basic abc")], "client": ("203.0.113.1", 1)})

    with pytest.raises(ProblemError) as refused:
        token.authorize(request)

    assert refused.value.status_code == 401
    assert registry.get_sample_value(REFUSED, {"http_route": "_unmatched"}) == 1


def test_routers_without_an_edge_limit_wrong_tokens(registry, lines):
    """The metrics router answers 429 after ten wrong tokens, even without our middleware."""
    app = FastAPI()
    add_problem_handlers(app)
    app.include_router(metrics_router(MetricsSettings(token=TOKEN), registry=registry))
    client = TestClient(app)

    statuses = [client.get("/metrics", headers=bearer("wrong")).status_code for _ in range(11)]

    assert statuses == [401] * 10 + [429]
    assert len(lines()) == 10
