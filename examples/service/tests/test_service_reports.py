"""`/v1/reports`: writing, reading, deleting, and everything that is refused."""

import base64
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient

REPORTS = "/v1/reports"
VISIT = {"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "Long walks, short queues."}


def write(client: TestClient, **changes: object) -> dict:
    response = client.post(REPORTS, json=VISIT | changes)
    assert response.status_code == 201, response.text
    return response.json()


def test_report_is_stored_and_found_by_its_location(client):
    """With the ICAO code, and the time in UTC."""
    before = datetime.now(UTC)
    created = client.post(REPORTS, json=VISIT)

    found = client.get(created.headers["location"])

    assert created.status_code == 201
    assert created.headers["location"] == f"{REPORTS}/{created.json()['id']}"
    assert found.json() == created.json()
    assert found.json() == VISIT | {
        "airport": "EDDF",
        "id": created.json()["id"],
        "author": "alice",  # fastapi-prodkit new: auth
        "created_at": created.json()["created_at"],
    }
    assert before <= datetime.fromisoformat(found.json()["created_at"]) <= datetime.now(UTC)
    assert found.json()["created_at"].endswith("Z")


def test_location_has_the_prefix_of_the_proxy(app, client):
    """Behind a proxy that strips a path prefix, the Location header includes that prefix."""
    app.root_path = "/api"

    response = client.post(REPORTS, json=VISIT)

    assert response.headers["location"] == f"/api{REPORTS}/{response.json()['id']}"


def test_comment_keeps_any_text_without_surrounding_spaces(client):
    """A comment keeps any script, emoji and line breaks, and loses only spaces at its start and end."""
    comment = "  Très bien\n日本 👩‍✈️  "

    report = write(client, comment=comment)

    assert client.get(f"{REPORTS}/{report['id']}").json()["comment"] == comment.strip()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rating": 0}, "rating"),
        ({"rating": 6}, "rating"),
        ({"rating": 4.5}, "rating"),
        ({"rating": "4"}, "rating"),
        ({"rating": True}, "rating"),
        ({"rating": None}, "rating"),
        ({"comment": ""}, "comment"),
        ({"comment": " \n "}, "comment"),
        ({"comment": "x" * 2001}, "comment"),
        ({"comment": "a\x00b"}, "comment"),
        ({"comment": "\x1b[2J"}, "comment"),
        ({"comment": "a\x85b"}, "comment"),
        ({"comment": 7}, "comment"),
        ({"visited_on": "yesterday"}, "visited_on"),
        ({"visited_on": "2025-02-30"}, "visited_on"),
        ({"visited_on": 1746316800}, "visited_on"),
        ({"visited_on": "1746316800"}, "visited_on"),
        ({"visited_on": "2025-05-04T00:00:00Z"}, "visited_on"),
        ({"visited_on": str(datetime.now(UTC).date() + timedelta(days=2))}, "visited_on"),
        ({"airport": "ZZZZ"}, "airport"),
        ({"airport": "Frankfurt"}, "airport"),
        ({"airport": "F\x00A"}, "airport"),
        ({"stars": 5}, "stars"),
    ],
)
def test_invalid_report_is_a_422_problem_with_the_field(client, changes, field):
    """Nothing is stored."""
    response = client.post(REPORTS, json=VISIT | changes)

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["loc"] for error in response.json()["errors"]] == [["body", field]]
    assert client.get(REPORTS).json()["items"] == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"rating": NaN}', b'{"comment": "\\ud800"}', b"\xff", b'{"rating": 1e999}']
)
def test_invalid_body_is_never_a_500(client, body):
    """A malformed body of a report gets a problem with status 400 or 422."""
    response = client.post(REPORTS, content=body, headers={"content-type": "application/json"})

    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_lone_surrogate_in_a_comment_is_refused(client):
    """No database can store it."""
    body = b'{"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "a\\ud800b"}'

    response = client.post(REPORTS, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["errors"]] == [["body", "comment"]]


def test_visit_may_be_today(client):
    """A report may give today's date (UTC) as the date of the visit."""
    today = str(datetime.now(UTC).date())

    assert write(client, visited_on=today)["visited_on"] == today


def test_pages_have_every_report_once_newest_first(client):
    """Even if new ones arrive meanwhile."""
    written = [write(client)["id"] for _ in range(7)]

    first = client.get(REPORTS, params={"limit": 3})
    write(client)
    second = client.get(first.url.join(first.links["next"]["url"]))
    third = client.get(REPORTS, params={"limit": 3, "cursor": second.json()["next_cursor"]})

    pages = [[report["id"] for report in page.json()["items"]] for page in (first, second, third)]
    assert [*pages[0], *pages[1], *pages[2]] == sorted(written, reverse=True)
    assert third.json()["next_cursor"] is None


def test_reports_are_filtered_by_either_code(client):
    """The filter by airport accepts the IATA code and the ICAO code, in any case."""
    ours = write(client, airport="FRA")["id"]
    write(client, airport="HAM")

    for code in ("FRA", "eddf"):
        assert [report["id"] for report in client.get(REPORTS, params={"airport": code}).json()["items"]] == [ours]
    assert client.get(REPORTS, params={"airport": "MUC"}).json() == {"items": [], "next_cursor": None}


def test_reports_of_an_unknown_airport_are_refused(client):
    """Filtering reports by an unknown airport code is a 422, not an empty list."""
    response = client.get(REPORTS, params={"airport": "ZZZ"})

    assert response.status_code == 422
    assert response.json()["errors"][0] == {
        "loc": ["query", "airport"],
        "msg": "no airport has this ICAO or IATA code",
        "type": "unknown_airport",
    }


@pytest.mark.parametrize("key", [b"0", b"-1", b"EDDF", b"1" * 19, b"1.5", "\u0661".encode()])
def test_invalid_cursor_is_refused(client, key):
    """Before it reaches the database."""
    response = client.get(REPORTS, params={"cursor": base64.urlsafe_b64encode(key).decode()})

    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", "cursor"]


def test_second_delete_is_a_404(client):
    """Deleting a report answers 204 once, and 404 afterwards."""
    path = f"{REPORTS}/{write(client)['id']}"

    deleted = client.delete(path)

    assert (deleted.status_code, deleted.content) == (204, b"")
    assert client.get(path).status_code == 404
    assert client.delete(path).json()["type"] == "urn:problem:unknown-report"


@pytest.mark.parametrize("report_id", ["0", "-1", "x", "1.5", str(2**63), "9" * 400])
def test_id_out_of_range_is_refused(client, report_id):
    """A report id that is not an integer from 1 to 2**63 - 1 is a 422 that names the path parameter."""
    response = client.get(f"{REPORTS}/{report_id}")

    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["path", "report_id"]


def test_largest_id_is_a_404(client):
    """The id 2**63 - 1, the largest that the database can store, is a 404 rather than a 422."""
    assert client.get(f"{REPORTS}/{2**63 - 1}").status_code == 404


def test_concurrent_writers_all_succeed(client):
    """Eight threads write 24 reports at once, and every report is stored with a distinct id."""
    with ThreadPoolExecutor(8) as threads:
        reports = list(threads.map(lambda number: write(client, comment=f"visit {number}"), range(24)))

    assert len({report["id"] for report in reports}) == 24
    stored = {report["comment"] for report in client.get(REPORTS, params={"limit": 100}).json()["items"]}
    assert stored == {f"visit {number}" for number in range(24)}


def test_of_concurrent_deletions_one_succeeds(client):
    """The other is a 404."""
    path = f"{REPORTS}/{write(client)['id']}"

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(lambda _: client.delete(path).status_code, range(8)))

    assert sorted(statuses) == [204] + [404] * 7


def test_writing_has_a_stricter_limit_than_reading(client):
    """The 31st report within a minute is refused."""
    for _ in range(30):
        write(client)

    refused = client.post(REPORTS, json=VISIT)

    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert '"reports";q=30;w=60' in refused.headers["ratelimit-policy"]
    assert client.get(REPORTS).status_code == 200
