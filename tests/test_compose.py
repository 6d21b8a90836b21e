"""The example's compose.yaml: valid, small by default, and configured with settings that exist.

It is not started: its images come from a registry. What it says of the service's own image, test_image.py runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML")

from programs import program_or_skip

SERVICE = Path(__file__).parent.parent / "examples" / "service"
COMPOSE = yaml.safe_load((SERVICE / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def run(*command: str | Path, **environment: str) -> str:
    """Run a command in the example's folder and return what it wrote; it has to succeed."""
    done = subprocess.run(
        command,
        cwd=SERVICE,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_file_is_what_compose_reads():
    """It holds the schema of the Compose Specification."""
    said = run(program_or_skip("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")

    assert "ok" in said


def test_the_small_set_starts_by_default():
    """The service with its database, store and migrations; the rest is asked for by profile."""
    small = {name for name, service in SERVICES.items() if "profiles" not in service}

    assert small == {"service", "migrate", "postgres", "redis"}
    assert {"prometheus", "load"} == set(SERVICES) - small


def test_the_service_starts_after_its_migrations():
    """They are a step of their own, from the same image, once PostgreSQL answers."""
    migrate, service = SERVICES["migrate"], SERVICES["service"]

    assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert migrate["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert migrate["command"] == ["fastapi-prodkit", "db", "upgrade"]
    assert {name: each["image"] for name, each in OURS.items()} == dict.fromkeys(
        ("service", "migrate", "load"), "airports-service"
    )


@pytest.mark.parametrize("name", OURS)
def test_the_image_runs_as_in_production(name):
    """Read-only and without powers, as test_image.py runs it."""
    service = OURS[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_what_is_waited_for_says_when_it_is_ready():
    """Whatever is waited for until it is healthy has a health check."""
    waited = {
        name
        for service in SERVICES.values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }

    assert waited == {"postgres", "redis"}
    assert all("test" in SERVICES[name]["healthcheck"] for name in waited)


def test_only_this_machine_can_connect():
    """Every port is published on loopback, so that passwords may stand in the file."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_variable_is_a_setting():
    """The service starts with what it is given: nothing is misspelt, refused or missing."""
    pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
    read = "from service.config import ServiceSettings; print(ServiceSettings().database.migrations_config)"

    said = run(sys.executable, "-W", "error", "-c", read, **SERVICES["service"]["environment"])

    assert said == "alembic.ini\n"


def test_prometheus_asks_the_service():
    """Its configuration is mounted, and names service and port as compose.yaml does."""
    source = SERVICES["prometheus"]["volumes"][0].split(":")[0]

    configuration = yaml.safe_load((SERVICE / source).read_text())

    (job,) = configuration["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:8000"]}]
    assert SERVICES["service"]["ports"][0].endswith(":8000")


def test_prometheus_can_read_its_configuration():
    """promtool finds nothing wrong with it."""
    said = run(program_or_skip("promtool"), "check", "config", "prometheus.yml")

    assert "SUCCESS" in said
