"""The service as a whole: readiness, the OpenAPI document, the docs page, and the edge."""

# fastapi-prodkit new: redis
import os
import uuid

# fastapi-prodkit new: end
import pytest
from fastapi.testclient import TestClient  # fastapi-prodkit new: redis
from fastapi_prodkit.exceptions import SettingsError
from openapi_spec_validator import validate

from service.application import build  # fastapi-prodkit new: redis
from service.config import ServiceSettings


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def operations(document):
    return {
        operation["operationId"]: (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_service_is_ready(client):
    """Readiness passes, with a check of each thing that the service needs, when the airports are loaded."""
    checks = ["airports", "database"]
    checks += ["auth"]  # fastapi-prodkit new: auth

    response = client.get("/ready")

    assert response.status_code == 200
    assert response.json()["status"] == "pass"
    assert set(response.json()["checks"]) == set(checks)


def test_operations_have_stable_names(document):
    """Generated clients use them."""
    assert {name: where for name, (where, _) in operations(document).items()} == {
        "airports_search": "GET /v1/airports",
        "airports_nearest": "GET /v1/airports/nearest",
        "airports_get": "GET /v1/airports/{code}",
        "reports_create": "POST /v1/reports",
        "reports_latest": "GET /v1/reports",
        "reports_read": "GET /v1/reports/{report_id}",
        "reports_delete": "DELETE /v1/reports/{report_id}",
    }


def test_every_operation_is_described(document):
    """With summary, description, a known tag, and a description of each parameter."""
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}

    for where, operation in operations(document).values():
        assert operation["summary"], where
        assert operation["description"], where
        assert set(operation["tags"]) <= tags, where
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (where, parameter["name"])


def test_every_error_is_a_problem_in_the_schema(document):
    """The OpenAPI schema declares application/problem+json as the only media type of error responses."""
    for where, operation in operations(document).values():
        errors = {status: response for status, response in operation["responses"].items() if status >= "4"}
        assert "422" in errors, where
        for response in errors.values():
            assert list(response["content"]) == ["application/problem+json"], where
    assert "404" in document["paths"]["/v1/airports/{code}"]["get"]["responses"]
    assert "429" in document["paths"]["/v1/reports"]["post"]["responses"]
    assert "403" in document["paths"]["/v1/reports/{report_id}"]["delete"]["responses"]  # fastapi-prodkit new: auth


def test_examples_of_the_schema_are_real(client, document):
    """The service returns the schema's example of an airport, and accepts its example of a report."""
    schemas = document["components"]["schemas"]

    assert client.get("/v1/airports/KJFK").json() == schemas["Airport"]["examples"][0]
    assert client.post("/v1/reports", json=schemas["ReportCreate"]["examples"][0]).status_code == 201


def test_document_is_valid_openapi(document):
    """The OpenAPI document of the service passes a validator of the specification."""
    validate(document)


def test_docs_page_loads_nothing_from_other_hosts(client):
    """The docs page contains no absolute URL, so it also works without access to the internet."""
    page = client.get("/docs")

    assert page.status_code == 200
    assert "https://" not in page.text
    assert "http://" not in page.text
    assert "'self'" in page.headers["content-security-policy"]


def test_every_response_has_id_security_headers_and_quota(client):
    """Successes and errors alike carry a request id, security headers and the rate-limit quota."""
    for path in ("/v1/airports/FRA", "/v1/airports/ZZZZ", "/nowhere"):
        headers = client.get(path).headers
        assert headers["x-request-id"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["ratelimit"]


def test_metrics_have_one_series_per_route(client):
    """Requests for different airports are counted under the route's template, not under their paths."""
    client.get("/v1/airports/FRA")
    client.get("/v1/airports/HAM")

    samples = client.get("/metrics").text

    assert 'http_route="/v1/airports/{code}"' in samples
    assert "FRA" not in samples


# fastapi-prodkit new: redis
def test_replicas_count_requests_together(sqlite, monkeypatch):
    """With RATE_LIMIT_STORAGE_URL."""
    if not (url := os.environ.get("FASTAPI_PRODKIT_TEST_REDIS_URL")):
        pytest.skip("FASTAPI_PRODKIT_TEST_REDIS_URL names no Redis")
    monkeypatch.setenv("RATE_LIMIT_STORAGE_URL", url)
    monkeypatch.setenv("RATE_LIMIT_DEFAULT", "4/hour")
    monkeypatch.setenv("SERVICE_NAME", f"test-{uuid.uuid4().hex}")  # the prefix of its keys: a new one for each test
    settings = ServiceSettings(
        environment="test",
        database=sqlite.database,
        auth=sqlite.auth,  # fastapi-prodkit new: auth
        log=None,
    )

    with TestClient(build(settings)) as first, TestClient(build(settings)) as second:
        statuses = [client.get("/v1/airports/FRA").status_code for client in (first, second) * 3]

    assert statuses == [200, 200, 200, 200, 429, 429]


# fastapi-prodkit new: end
def test_missing_database_is_an_error_with_the_variable(monkeypatch, tmp_path):
    """Building the settings without DATABASE_URL raises a SettingsError that names the variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)

    with pytest.raises(SettingsError, match="DATABASE_URL"):
        ServiceSettings(environment="test")
