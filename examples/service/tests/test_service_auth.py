"""Who may do what: everyone reads, reporters write, authors and editors delete."""

import time
from datetime import date
from pathlib import Path

import jwt
import pytest
from fastapi_prodkit.database import Database
from fastapi_prodkit.exceptions import SettingsError
from fastapi_prodkit.testing import assert_routes_locked

from service.application import build
from service.models import Report
from service.services import reports

REPORTS = "/v1/reports"
VISIT = {"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "Long walks, short queues."}


def token(settings, **claims):
    """Return a token that is signed with the secret of the settings."""
    secret = settings.auth.secret.get_secret_value()
    return {
        "Authorization": f"Bearer {jwt.encode({'exp': int(time.time()) + 60, **claims}, secret, algorithm='HS256')}"
    }


async def test_everyone_reads_and_reporters_write(client_as):
    """The author of a report is the user who wrote it, whatever the body says."""
    async with client_as() as nobody, client_as("bob") as bob, client_as("alice", roles=["reporter"]) as alice:
        refused = [(await client.post(REPORTS, json=VISIT)).status_code for client in (nobody, bob)]
        forged = await alice.post(REPORTS, json=VISIT | {"author": "bob"})
        written = await alice.post(REPORTS, json=VISIT)
        read = [await nobody.get(path) for path in (REPORTS, written.headers["location"], "/v1/airports/FRA")]

    assert refused == [401, 403]
    assert (forged.status_code, written.status_code) == (422, 201)
    assert [each.status_code for each in read] == [200] * 3
    assert [report["author"] for report in read[0].json()["items"]] == ["alice"]


@pytest.mark.parametrize(
    ("user", "roles", "status"),
    [
        (None, [], 401),
        ("bob", [], 403),
        ("bob", ["reporter"], 403),
        ("bob", ["Editor"], 403),
        ("bob", ["editor"], 204),
        ("alice", [], 204),
    ],
)
async def test_report_is_deleted_by_its_author_and_by_editors(client_as, user, roles, status):
    """For others it stays. The author needs no role."""
    async with client_as("alice", roles=["reporter"]) as alice, client_as(user, roles=roles) as other:
        path = (await alice.post(REPORTS, json=VISIT)).headers["location"]

        deleted = await other.delete(path)

        assert deleted.status_code == status
        assert (await alice.get(path)).status_code == (404 if status == 204 else 200)


async def test_report_without_an_author_is_deleted_by_editors(client_as, settings):
    """Such as one from before there were users."""
    database = Database(settings.database)
    async with database.lifespan(None), database.session() as session:
        report = Report(airport="EDDF", visited_on=date(2025, 5, 4), rating=4, comment="Good.")
        path = f"{REPORTS}/{(await reports.create(session, report)).id}"

    async with client_as("alice", roles=["reporter"]) as alice, client_as("bob", roles=["editor"]) as bob:
        statuses = [(await client.delete(path)).status_code for client in (alice, bob)]

    assert statuses == [403, 204]


def test_tokens_are_verified(client, settings):
    """With the secret of the settings; one of another secret is refused."""
    sound = token(settings, sub="carol", roles=["reporter"])
    other = settings.model_copy(update={"auth": settings.auth.model_validate({"secret": "another-secret" * 3})})
    forged = token(other, sub="carol", roles=["reporter"])

    written = client.post(REPORTS, json=VISIT, headers=sound)
    refused = client.post(REPORTS, json=VISIT, headers=forged)

    assert (written.status_code, written.json()["author"]) == (201, "carol")
    assert refused.status_code == 401


def test_routes_are_those_of_the_file(sqlite):
    """What opens a route is a line in a review: `make routes` writes the file. Each route says who may call it."""
    assert_routes_locked(build(sqlite), Path(__file__).parents[1] / "routes.lock", strict=True)


def test_service_needs_authentication(sqlite):
    """It does not start without, so that a variable that is missing opens nothing."""
    with pytest.raises(SettingsError, match="AUTH_ISSUER: is required, or AUTH_SECRET"):
        build(sqlite.model_copy(update={"auth": None}))
