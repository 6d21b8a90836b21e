"""Change log levels at runtime: authorization, time limit and revert."""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from processes import free_port, running

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.log_level import log_level_router
from fastapi_prodkit.sections import LogSettings

TOKEN = "a-token-of-operators"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LOGGER = "shop.orders"
PATIENCE = 20.0  # seconds


def client_for(settings):
    app = FastAPI()
    add_problem_handlers(app)
    app.include_router(log_level_router(settings))
    return TestClient(app, follow_redirects=False)


@pytest.fixture
def client(caplog):
    """A client of an app with /log-level; changes are reverted at the end of the test."""
    logging.getLogger(LOGGER).setLevel(logging.NOTSET)
    client = client_for(LogSettings(level_token=TOKEN))
    caplog.set_level(logging.INFO)  # of the root logger, which applies to all others
    yield client
    client.delete("/log-level", headers=BEARER)


def change(client, logger=LOGGER, level="DEBUG", seconds=600):
    return client.post("/log-level", headers=BEARER, json={"logger": logger, "level": level, "seconds": seconds})


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def audit(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fastapi_prodkit.log_level"]


# Authorization


def test_path_without_a_token_is_a_404():
    """Unless a token is configured, `/log-level` answers 404 to GET, POST and DELETE."""
    client = client_for(None)

    statuses = [client.request(method, "/log-level").status_code for method in ("GET", "POST", "DELETE")]

    assert statuses == [404, 404, 404]


@pytest.mark.parametrize(
    ("authorization", "challenge"),
    [
        (None, "Bearer"),
        ("Bearer wrong", 'Bearer error="invalid_token"'),
        (f"Basic {TOKEN}", 'Bearer error="invalid_token"'),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_request_without_the_token_is_refused(client, method, authorization, challenge):
    """A missing or wrong token gets a 401 problem with a challenge, and the level stays unchanged."""
    change(client)
    headers = {"Authorization": authorization} if authorization else {}

    response = client.request(method, "/log-level", headers=headers)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == challenge
    assert response.headers["content-type"] == "application/problem+json"
    assert logging.getLogger(LOGGER).level == logging.DEBUG


def test_short_token_is_refused():
    """The settings refuse a level token of fewer than sixteen characters."""
    with pytest.raises(ValueError, match="at least 16"):
        LogSettings(level_token="changeme")


# Changes


@pytest.mark.parametrize("path", ["/log-level", "/log-level/"])
def test_level_is_changed_and_reverted(client, path, caplog):
    """Both are logged."""
    logger = logging.getLogger(LOGGER)
    wanted = {"logger": LOGGER, "level": "debug", "seconds": 600}

    changed = client.post(path, headers=BEARER, json=wanted)
    during = logger.isEnabledFor(logging.DEBUG)
    reverted = client.delete(path, headers=BEARER)

    [state] = changed.json()["changes"]
    until = datetime.fromisoformat(state.pop("until"))
    assert changed.status_code == reverted.status_code == 200
    assert changed.headers["cache-control"] == "no-store"
    assert state == {"logger": LOGGER, "level": "DEBUG", "before": "NOTSET"}
    assert timedelta(seconds=590) < until - datetime.now(UTC) < timedelta(seconds=601)
    assert during
    assert reverted.json()["changes"] == []
    assert not logger.isEnabledFor(logging.DEBUG)
    assert audit(caplog) == [f"log level of {LOGGER}: DEBUG for 600 s", f"log level of {LOGGER}: NOTSET again"]


def test_level_is_reverted_after_its_time(client, caplog):
    """A timer restores the previous level of the logger, without another request, and logs the change."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.ERROR)

    change(client, seconds=0.2)
    during = logger.level
    wait_for(lambda: logger.level == logging.ERROR)

    assert during == logging.DEBUG
    assert client.get("/log-level", headers=BEARER).json()["changes"] == []
    wait_for(lambda: len(audit(caplog)) == 2)
    assert audit(caplog)[1] == f"log level of {LOGGER}: ERROR again"


def test_answer_names_the_process(client):
    """The response contains the process id and states that other workers keep their levels."""
    for response in (change(client), client.get("/log-level", headers=BEARER)):
        assert response.json()["process"] == os.getpid()
        assert response.json()["reach"] == "this process only; other workers and containers keep their levels"


def test_second_change_replaces_the_first(client):
    """The time starts again; the revert restores the level before the first."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.WARNING)
    change(client)
    [first] = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]

    state = change(client, level="INFO").json()["changes"]
    first.function()
    during = logger.level
    client.delete("/log-level", headers=BEARER)

    assert [(each["level"], each["before"]) for each in state] == [("INFO", "WARNING")]
    assert during == logging.INFO
    assert logger.level == logging.WARNING
    first.join(PATIENCE)
    assert not first.is_alive()


def test_delete_reverts_one_logger(client):
    """`DELETE` with a logger name reverts only that logger, and a name without a change has no effect."""
    logging.getLogger(f"{LOGGER}.prices")
    change(client)
    change(client, logger=f"{LOGGER}.prices", level="ERROR")

    left = client.delete("/log-level", headers=BEARER, params={"logger": LOGGER}).json()["changes"]
    nothing = client.delete("/log-level", headers=BEARER, params={"logger": "unheard.of"}).json()["changes"]

    assert [each["logger"] for each in left] == [each["logger"] for each in nothing] == [f"{LOGGER}.prices"]


def test_root_and_parent_loggers_can_be_changed(client):
    """The name `root` selects the root logger, and a name that exists only as a parent of loggers is accepted."""
    child = logging.getLogger("warehouse.stock.shelves")

    root = change(client, logger="root", level="ERROR")
    parent = change(client, logger="warehouse.stock")

    assert (root.status_code, parent.status_code) == (200, 200)
    assert logging.getLogger().level == logging.ERROR
    assert child.isEnabledFor(logging.DEBUG)


# Refusals


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"logger": LOGGER, "level": "LOUD", "seconds": 60}, ["body", "level"]),
        ({"logger": LOGGER, "level": 10, "seconds": 60}, ["body", "level"]),
        ({"logger": LOGGER, "level": "DEBUG", "seconds": 0}, ["body", "seconds"]),
        ({"logger": LOGGER, "level": "DEBUG", "seconds": 3601}, ["body", "seconds"]),
        ({"logger": LOGGER, "level": "DEBUG"}, ["body", "seconds"]),
        ({"level": "DEBUG", "seconds": 60}, ["body", "logger"]),
        ({"logger": LOGGER, "level": "DEBUG", "seconds": 60, "for": "ever"}, ["body", "for"]),
        ("not an object", ["body"]),
    ],
)
def test_invalid_change_is_a_422_problem(client, body, where):
    """The problem points to the invalid field, and the level of the logger stays unchanged."""
    response = client.post("/log-level", headers=BEARER, json=body)

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["loc"] for error in response.json()["errors"]] == [where]
    assert logging.getLogger(LOGGER).level == logging.NOTSET


def test_unknown_logger_is_a_422_problem(client):
    """A misspelt logger name is refused, and no logger is created under that name."""
    response = change(client, logger="sqlalchmy.engine")

    assert response.status_code == 422
    assert "no logger of that name" in response.json()["detail"]
    assert "sqlalchmy.engine" not in logging.root.manager.loggerDict


def test_other_methods_are_refused(client):
    """`/log-level` answers 405 to a method other than GET, POST or DELETE."""
    assert client.put("/log-level", headers=BEARER).status_code == 405


# In the whole app


def test_create_app_with_a_token_has_the_path(capsys):
    """In front of the app's routes and not in the schema; the line has the request id."""
    settings = Settings(_env_file=None, environment="test", log={"level_token": TOKEN})
    app = create_app(settings)

    @app.get("/{path:path}")
    def everything() -> str:
        return "everything"

    with TestClient(app) as client:
        response = change(client, logger="fastapi_prodkit")
        client.delete("/log-level", headers=BEARER)
        schema = client.get("/openapi.json").json()

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    [audited] = [line for line in lines if line["event"] == "log level of fastapi_prodkit: DEBUG for 600 s"]
    assert audited["level"] == "warning"
    assert audited["request_id"] == response.headers["x-request-id"]
    assert "/log-level" not in schema["paths"]


SERVICE = """
import logging
import os
from fastapi_prodkit import create_app

app = create_app()
logger = logging.getLogger("shop")

@app.get("/debug")
async def debug():
    logger.debug("at level DEBUG", extra={"worker": os.getpid()})
    return {"process": os.getpid(), "enabled": logger.isEnabledFor(logging.DEBUG)}
"""


@pytest.mark.system
def test_change_applies_to_one_of_two_workers(tmp_path):
    """Each names its process."""
    pytest.importorskip("uvicorn")
    (tmp_path / "service.py").write_text(SERVICE)
    port = free_port()
    environment = {"ENVIRONMENT": "test", "LOG_LEVEL_TOKEN": TOKEN, "RATE_LIMIT_ENABLED": "false"}
    command = ("uvicorn", "service:app", "--port", str(port), "--workers", "2")

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, BEARER)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def answers_of_both(path):
        answers = {}
        deadline = time.monotonic() + 2 * PATIENCE
        with ThreadPoolExecutor(8) as pool:  # at the same time, so that one worker alone is not enough
            while len(answers) < 2:
                assert time.monotonic() < deadline, "one of the workers does not answer"
                answers |= {answer["process"]: answer for answer in pool.map(ask, [path] * 16)}
        return answers

    with running(*command, directory=tmp_path, port=port, **environment) as server:
        answers_of_both("/debug")

        changed = ask("/log-level", {"logger": "shop", "level": "DEBUG", "seconds": 600})

        reached = changed["process"]
        states = answers_of_both("/log-level")
        enabled = {process: answer["enabled"] for process, answer in answers_of_both("/debug").items()}
        lines = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    [other] = states.keys() - {reached}
    assert changed["reach"].startswith("this process only")
    assert [each["logger"] for each in states[reached]["changes"]] == ["shop"]
    assert states[other]["changes"] == []
    assert enabled == {reached: True, other: False}
    assert {line["worker"] for line in lines if line["event"] == "at level DEBUG"} == {reached}
