"""`fastapi-prodkit token`: tokens that the service accepts, where tokens may be made."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("jwt", reason="the extra auth is not installed")

from fastapi_prodkit import Settings
from fastapi_prodkit.auth import Auth, CurrentUser
from fastapi_prodkit.cli import main

SECRET = "a-secret-of-at-least-thirty-two-bytes"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command with these variables; return the exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code = main(["token", *arguments])
        return code, *capsys.readouterr()

    return run


def caller(token):
    """Return what the service knows of the caller, with the settings of the environment."""
    app = FastAPI()
    app.state.auth = Auth(Settings().auth)

    @app.get("/")
    async def read(user: CurrentUser) -> dict:
        return {"id": user.id, "roles": sorted(user.roles), "scopes": sorted(user.scopes), "claims": dict(user.claims)}

    response = TestClient(app).get("/", headers={"Authorization": f"Bearer {token}"})
    return response.json() if response.status_code == 200 else response.status_code


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AUTH_AUDIENCE": "orders,shop"},
        {"AUTH_ROLES_CLAIM": "realm_access.roles", "AUTH_SCOPES_CLAIM": "permissions"},
        {"AUTH_ROLES_CLAIM": "https://example.com/roles"},
        {"AUTH_ROLES_CLAIM": r"resource_access.my\.api.roles"},
    ],
)
@pytest.mark.parametrize("environment", ["dev", "test"])
def test_token_of_a_secret_is_accepted(run, environment, variables):
    """With the roles and scopes where the settings look for them, and for an hour."""
    options = ("--role", "admin", "--role", "auditor", "--scope", "a:read", "--scope", "b")

    code, out, _ = run("alice", *options, ENVIRONMENT=environment, AUTH_SECRET=SECRET, **variables)
    found = caller(out.strip())

    assert code == 0
    assert (found["id"], found["roles"], found["scopes"]) == ("alice", ["admin", "auditor"], ["a:read", "b"])
    assert found["claims"]["exp"] - found["claims"]["iat"] == 3600


def test_token_has_the_claims_that_are_given(run):
    """Text, or JSON after `:=`; and the time."""
    options = ("--claim", "email=a=b@example.com", "--claim", "zip=01234", "--claim", "teams:=[1, 2]", "--minutes", "5")

    _, out, _ = run("alice", *options, AUTH_SECRET=SECRET)
    claims = caller(out.strip())["claims"]

    assert claims["exp"] - claims["iat"] == 300
    assert {name: claims[name] for name in claims.keys() - {"exp", "iat"}} == {
        "sub": "alice",
        "email": "a=b@example.com",
        "zip": "01234",
        "teams": [1, 2],
    }


@pytest.mark.parametrize("claim", ["email", "=x", ":=1", "teams:=[1"])
def test_what_is_no_claim_is_an_error(run, claim):
    """Of usage, with the claim as it was typed."""
    code, out, err = run("alice", "--claim", claim, AUTH_SECRET=SECRET)

    assert (code, out) == (2, "")
    assert "claim" in err


@pytest.mark.parametrize("environment", ["staging", "prod"])
def test_no_token_is_made_elsewhere(run, environment):
    """One sentence says why."""
    valid = {"HOSTS_ALLOWED": "api.example.com", "RATE_LIMIT_ENABLED": "false"}

    code, out, err = run("alice", ENVIRONMENT=environment, AUTH_SECRET=SECRET, **valid)

    assert (code, out) == (1, "")
    assert "tokens are made in dev and test only" in err


def test_service_without_tokens_is_an_error(run):
    """It names the variables."""
    code, out, err = run("alice")

    assert (code, out) == (1, "")
    assert "AUTH_SECRET" in err


def test_issuer_elsewhere_is_an_error(run):
    """It says where its tokens come from."""
    code, out, err = run("alice", AUTH_ISSUER="https://login.example.com/", AUTH_AUDIENCE="orders")

    assert (code, out) == (1, "")
    assert "https://login.example.com/ makes its tokens itself" in err


@pytest.fixture
def issuer():
    """An issuer on this machine, with the answers that are set, by path; requests are in `forms`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer()

        def do_POST(self):
            server.forms.append(parse_qs(self.rfile.read(int(self.headers["content-length"])).decode()))
            self.answer()

        def answer(self):
            body = server.answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_): ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.forms = []
        server.answers = {
            "/.well-known/openid-configuration": {"token_endpoint": f"{server.url}/token"},
            "/token": {"access_token": "made"},
        }
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_issuer_on_this_machine_makes_the_token(run, issuer):
    """Its token endpoint gets the caller; of several issuers it is the one that is asked."""
    options = ("--role", "admin", "--role", "auditor", "--scope", "a:read")

    code, out, _ = run(
        "alice", *options, AUTH_ISSUER=f"https://login.example.com/,{issuer.url}", AUTH_AUDIENCE="orders"
    )

    assert (code, out) == (0, "made\n")
    assert issuer.forms == [
        {"grant_type": ["client_credentials"], "sub": ["alice"], "roles": ["admin auditor"], "scope": ["a:read"]}
    ]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/.well-known/openid-configuration", None),
        ("/.well-known/openid-configuration", {}),
        ("/.well-known/openid-configuration", {"token_endpoint": "https://login.example.com/token"}),
        ("/.well-known/openid-configuration", b"<html>"),
        ("/token", []),
        ("/token", {"error": "invalid_request"}),
    ],
)
def test_issuer_that_makes_no_token_is_one_line(run, issuer, path, answer):
    """Which names the URL."""
    issuer.answers[path] = answer

    code, out, err = run("alice", AUTH_ISSUER=issuer.url, AUTH_AUDIENCE="orders")

    assert (code, out, err.count("\n")) == (1, "", 1)
    assert issuer.url in err


@pytest.mark.parametrize("option", [("--claim", "a=b"), ("--minutes", "5")])
def test_option_that_the_issuer_would_ignore_is_an_error(run, issuer, option):
    """Before the issuer is asked."""
    code, _, err = run("alice", *option, AUTH_ISSUER=issuer.url, AUTH_AUDIENCE="orders")

    assert (code, issuer.forms) == (1, [])
    assert "AUTH_SECRET" in err
