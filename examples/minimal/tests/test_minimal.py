"""The smallest app has what the README promises."""

import runpy
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

MAIN = Path(__file__).parents[1] / "main.py"


@pytest.fixture
def client(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setenv("LOG_ENABLED", "false")  # this process's logging is pytest's
    with TestClient(runpy.run_path(str(MAIN))["app"]) as client:
        yield client


def test_app_has_ten_lines():
    """The file of the minimal example has at most ten lines, not counting blank ones."""
    lines = [line for line in MAIN.read_text().splitlines() if line]

    assert len(lines) <= 10


def test_app_answers_with_the_request_id(client):
    """The route returns its greeting, and the response carries a request id and security headers."""
    response = client.get("/hello/Ada")

    assert response.json() == {"message": "Hello, Ada"}
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_app_has_probes_metrics_and_docs(client, path):
    """The minimal app serves probes, metrics and docs, though its code declares none of these routes."""
    assert client.get(path).status_code == 200


def test_errors_are_problems(client):
    """An unknown path gets an RFC 9457 problem, whose request_id equals the response header."""
    response = client.get("/nowhere")

    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]
