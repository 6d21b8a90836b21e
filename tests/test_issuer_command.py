"""`fastapi-prodkit issuer`: the variables that it prints are all that a service and the command `token` need."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("jwt", reason="the extra auth is not installed")

from fastapi_prodkit import Settings
from fastapi_prodkit.auth import Auth, User
from fastapi_prodkit.cli import issuer, main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command; call a function with the lines of standard output while it serves, then press Ctrl-C."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, meanwhile=lambda lines: None):
        def wait():
            meanwhile(capsys.readouterr().out.splitlines())
            raise KeyboardInterrupt

        monkeypatch.setattr(issuer, "Event", lambda: SimpleNamespace(wait=wait))
        code = main(["issuer", *arguments])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("preset", ["standard", "auth0", "cognito"])
def test_service_accepts_the_tokens_that_the_command_makes(run, capsys, monkeypatch, preset):
    """With the variables of standard output; Auth0's issuer ends with a slash, and Cognito's tokens have no `aud`."""
    callers = []

    def meanwhile(lines):
        for line in lines:
            monkeypatch.setenv(*line.split("=", 1))
        assert main(["token", "alice", "--role", "admin"]) == 0
        token = capsys.readouterr().out.strip()
        auth = Auth(Settings().auth)
        app = FastAPI(lifespan=auth.lifespan)

        @app.get("/")
        async def read(user: User = Depends(auth.current_user)) -> list[str]:
            return [user.id, *user.roles]

        with TestClient(app) as client:
            callers.append(client.get("/", headers={"Authorization": f"Bearer {token}"}).json())

    code, _ = run("--port", "0", "--preset", preset, "--audience", "orders", meanwhile=meanwhile)

    assert code == 0
    assert callers == [["alice", "admin"]]


def test_port_in_use_is_one_line(run):
    """It names the option."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, err = run("--port", str(server.getsockname()[1]))

    assert (code, err.count("\n")) == (1, 1)
    assert "--port" in err


@pytest.mark.system
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=str)
def test_signal_ends_the_issuer(number, code):
    """And frees the port."""
    command = [sys.executable, "-m", "fastapi_prodkit", "issuer", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().strip().removeprefix("AUTH_ISSUER=")
        process.stderr.readline()

        process.send_signal(number)

        assert process.wait(10) == code
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
