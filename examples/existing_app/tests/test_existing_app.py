"""Existing apps keep their behaviour, and gain the installed pieces."""

import runpy
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

FOLDER = Path(__file__).parents[1]


@pytest.fixture
def pieces():
    with TestClient(runpy.run_path(str(FOLDER / "pieces.py"))["app"]) as client:
        yield client


@pytest.fixture
def installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setenv("RATE_LIMIT_DEFAULT", "100/minute")  # the profile of tests has none
    monkeypatch.setenv("LOG_ENABLED", "false")  # this process's logging is pytest's
    with TestClient(runpy.run_path(str(FOLDER / "installed.py"))["app"]) as client:
        yield client


def test_three_pieces_add_id_headers_and_probes(pieces):
    """A health router and two middlewares give an existing app probes, request ids and security headers."""
    response = pieces.get("/orders/7", headers={"X-Request-ID": "order-desk-0001"})

    assert response.json() == {"order_id": 7, "request_id": "order-desk-0001"}
    assert response.headers["x-request-id"] == "order-desk-0001"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert pieces.get("/health").json() == {"status": "pass"}
    assert pieces.get("/ready").json()["status"] == "pass"


def test_three_pieces_change_nothing_else(pieces):
    """No problems, limits, metrics or docs page."""
    response = pieces.get("/orders/seven")

    assert response.json()["detail"][0]["loc"] == ["path", "order_id"]
    assert "ratelimit" not in response.headers
    assert pieces.get("/metrics").status_code == 404
    assert pieces.get("/docs").status_code == 404


def test_installed_app_keeps_lifespan_middleware_and_handlers(installed):
    """After `install`, the app's lifespan runs, its middleware adds its header, and its handler answers 409."""
    left = [installed.post("/orders/apples").json() for _ in range(3)]
    refused = installed.post("/orders/apples")

    assert left == [{"left": 2}, {"left": 1}, {"left": 0}]
    assert refused.status_code == 409
    assert refused.json() == {"error": "out of stock"}
    assert refused.headers["x-region"] == "eu"


def test_installed_app_gains_every_piece(installed):
    """Problems for errors that it does not handle itself."""
    missing = installed.get("/nowhere")

    assert missing.headers["content-type"] == "application/problem+json"
    for name in ("x-request-id", "x-content-type-options", "ratelimit", "x-region"):
        assert missing.headers[name], name
    for path in ("/health", "/ready", "/metrics", "/docs"):
        assert installed.get(path).status_code == 200, path
