"""A service without findings, and helpers to run the doctor on it, for tests that add one problem."""

import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from fastapi_prodkit.cli import terminal
from fastapi_prodkit.cli.doctor.examination import examine, gather

SECRET = "b7Rk-29xLm_4fQz"
REMOTE = f"postgresql://orders:{SECRET}@db.example.com/orders"

SOUND = {
    "HOSTS_ALLOWED": "api.example.com",
    "PROXY_TRUSTED": "10.0.0.0/8",
    "LIMITS_REQUEST_TIMEOUT": "20",
    "METRICS_TOKEN": "iK3v_8sPq-2mZx7Lw9",
}
_OTHERS = ("ALEMBIC_", "AUTH_", "DATABASE_", "GIT_", "HOSTS_", "LOG_", "FASTAPI_PRODKIT_TRACEBACK")


@pytest.fixture
def in_order(tmp_path, monkeypatch):
    """Use an empty directory, and only the variables of a service without findings."""
    for name in list(os.environ):
        if name.startswith(_OTHERS) or name in {"ENVIRONMENT", "WEB_CONCURRENCY"}:
            monkeypatch.delenv(name)
    for name, value in SOUND.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "_SHOW_AFTER", 60.0)  # no line about progress on a slow machine


def gathered(target=None):
    """Return the facts about the current directory, without those of this machine."""
    facts = gather(target, environment="prod", factory=False, timeout=None)
    return replace(facts, container=None, installed=frozenset(), tracked=())


def ids(facts):
    """Return the ids of the findings."""
    return {finding.id for finding in examine(facts).findings}


def module(source):
    """Write the module of a service and return its name, which is unique among all tests."""
    name = f"service_{uuid.uuid4().hex}"
    Path(f"{name}.py").write_text(source)
    return name
