"""elastic-apm: `app.add_middleware(ElasticAPM, client=...)`."""

import json

import pytest

LOADED = ("elasticapm.contrib.starlette",)


def attach(app, sink):
    from elasticapm.contrib.starlette import ElasticAPM, make_apm_client

    config = {"SERVER_URL": sink.url, "CLOUD_PROVIDER": "none", "CENTRAL_CONFIG": False, "METRICS_INTERVAL": "0s"}
    sink.client = make_apm_client({"SERVICE_NAME": "service", **config})
    app.add_middleware(ElasticAPM, client=sink.client)


def effects(sink):
    sink.client.close()
    sent = [json.loads(line) for body in sink.bodies("/intake/") for line in body.splitlines()]
    transactions = [each["transaction"] for each in sent if "transaction" in each]
    errors = [each["error"] for each in sent if "error" in each]
    return {
        "transactions": [[each["name"], each["result"], each["outcome"]] for each in transactions],
        "errors": [[each["transaction"]["name"], each["exception"]["type"]] for each in errors],
    }


@pytest.mark.parametrize("moment", ["new", "complete"])
def test_elastic_apm_has_one_transaction_per_request(effects, way, moment):
    """Under its route, with one error for an exception."""
    assert effects(way, moment) == {
        "transactions": [
            ["GET /items/{number}", "HTTP 2xx", "success"],
            ["GET /items/{number}", "HTTP 4xx", "success"],
            ["GET /gone", "HTTP 4xx", "success"],
            ["GET /nowhere", "HTTP 4xx", "success"],
            ["GET /stream", "HTTP 2xx", "success"],
            ["GET /broken", "HTTP 5xx", "failure"],
            ["GET /broken-too", "HTTP 5xx", "failure"],
        ],
        "errors": [["GET /broken", "RuntimeError"], ["GET /broken-too", "ValueError"]],
    }
