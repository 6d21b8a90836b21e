"""`fastapi-prodkit key`: keys that the service accepts, and entries that it reads."""

from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

pytest.importorskip("typer", reason="the extra cli is not installed")

from fastapi_prodkit.auth import Auth, CurrentUser, guard_routes
from fastapi_prodkit.cli import main
from fastapi_prodkit.sections import AuthSettings


def run(capsys, *arguments):
    """Return the exit code, and the lines of standard output and standard error."""
    code = main(["key", *arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_key_is_accepted_with_its_entry(capsys):
    """With the scopes and roles that were given."""
    options = ("--scope", "a:read", "--scope", "b", "--role", "auditor", "--days", "30")
    code, (key, entry), _ = run(capsys, "billing", *options)
    app = FastAPI()
    app.state.auth = Auth(AuthSettings(api_keys=(entry,)))
    guard_routes(app, app.state.auth)

    @app.get("/me")
    async def me(user: CurrentUser) -> list[str]:
        return [user.id, *sorted(user.scopes), *user.roles]

    client = TestClient(app)

    assert code == 0
    assert client.get("/me").status_code == 401
    assert client.get("/me", headers={"X-API-Key": key}).json() == ["billing", "a:read", "b", "auditor"]
    assert entry.endswith(f"expires={datetime.now(UTC).date() + timedelta(days=30)}")


def test_entries_are_read_from_the_environment(capsys, monkeypatch):
    """Several of them, with commas between, as the hint says."""
    entries = [run(capsys, name)[1][1] for name in ("billing", "billing", "reports")]
    monkeypatch.setenv("AUTH_API_KEYS", ",".join(entries))

    from fastapi_prodkit import Settings

    keys = Settings().auth.api_keys

    assert [each.name for each in keys] == ["billing", "billing", "reports"]
    assert len({each.hash for each in keys}) == 3


@pytest.mark.parametrize(
    "arguments",
    [("bill ing",), ("a/b",), ("x" * 65,), ("billing", "--scope", "a b"), ("billing", "--role", "a,b")],
)
def test_what_no_entry_can_hold_is_an_error(capsys, arguments):
    """Before a key is shown."""
    code, out, err = run(capsys, *arguments)

    assert (code, out) == (2, [])
    assert "no spaces and no commas" in err[0]
