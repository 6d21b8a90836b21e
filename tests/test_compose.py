"""The example's compose.yaml: valid, small by default, and configured with settings that exist.

It is not started: its images come from a registry. test_image.py runs the service's own image.
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
    """Run a command in the example's folder and return its output; fail if it fails."""
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


def test_file_is_valid_by_the_compose_specification():
    """The file compose.yaml conforms to the schema of the Compose Specification."""
    said = run(program_or_skip("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")

    assert "ok" in said


def test_default_profile_starts_service_database_store_and_migrations():
    """Prometheus and the loading of airports have a profile, so a plain `docker compose up` omits them."""
    small = {name for name, service in SERVICES.items() if "profiles" not in service}

    assert small == {"service", "migrate", "postgres", "redis"}
    assert {"prometheus", "load"} == set(SERVICES) - small


def test_service_starts_after_its_migrations():
    """They run in the same image, once PostgreSQL responds."""
    migrate, service = SERVICES["migrate"], SERVICES["service"]

    assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert migrate["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert migrate["command"] == ["fastapi-prodkit", "db", "upgrade"]
    assert {name: each["image"] for name, each in OURS.items()} == dict.fromkeys(
        ("service", "migrate", "load"), "airports-service"
    )


@pytest.mark.parametrize("name", OURS)
def test_service_runs_read_only_and_without_capabilities(name):
    """Each container that we build has a read-only file system and cannot gain privileges."""
    service = OURS[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_dependencies_have_health_checks():
    """Each container that others wait for until it is healthy declares a health check."""
    waited = {
        name
        for service in SERVICES.values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }

    assert waited == {"postgres", "redis"}
    assert all("test" in SERVICES[name]["healthcheck"] for name in waited)


def test_ports_are_published_on_loopback():
    """So that the file may contain passwords."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_variables_are_valid_settings():
    """The service's settings accept the environment variables of compose.yaml without an error or warning."""
    pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
    read = "from service.config import ServiceSettings; print(ServiceSettings().database.migrations_config)"

    said = run(sys.executable, "-W", "error", "-c", read, **SERVICES["service"]["environment"])

    assert said == "alembic.ini\n"


def test_prometheus_scrapes_the_service():
    """The configuration of Prometheus has the host name and the port of the service in compose.yaml."""
    source = SERVICES["prometheus"]["volumes"][0].split(":")[0]

    configuration = yaml.safe_load((SERVICE / source).read_text())

    (job,) = configuration["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:8000"]}]
    assert SERVICES["service"]["ports"][0].endswith(":8000")


def test_promtool_accepts_the_configuration():
    """The program promtool accepts the configuration of Prometheus as valid."""
    said = run(program_or_skip("promtool"), "check", "config", "prometheus.yml")

    assert "SUCCESS" in said
