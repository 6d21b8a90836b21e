"""The ten lines have what the README promises."""

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


def test_it_is_ten_lines():
    """The example stays what it is called."""
    lines = [line for line in MAIN.read_text().splitlines() if line]

    assert len(lines) <= 10


def test_it_answers(client):
    """The one route works, and says who asked with which id."""
    response = client.get("/hello/Ada")

    assert response.json() == {"message": "Hello, Ada"}
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_it_has_the_pages_that_operations_need(client, path):
    """Probes, metrics and docs are there without a line of code."""
    assert client.get(path).status_code == 200


def test_its_errors_are_problems(client):
    """A path that does not exist is an RFC 9457 problem with the request's id."""
    response = client.get("/nowhere")

    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]
