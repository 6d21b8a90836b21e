"""`/v1/airports`: filters, pages and codes."""

import base64

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

AIRPORTS = "/v1/airports"


@pytest.fixture
def client(reader: TestClient) -> TestClient:
    """One service for all tests of this module, which only read."""
    return reader


def codes(client: TestClient, **params: object) -> list[str]:
    response = client.get(AIRPORTS, params={"limit": 100, **params})
    assert response.status_code == 200, response.text
    return [airport["icao"] for airport in response.json()["items"]]


def walk(client: TestClient, **params: object) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        query = {"limit": 100, **params} | ({"cursor": cursor} if cursor else {})
        page = client.get(AIRPORTS, params=query).json()
        found += [airport["icao"] for airport in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def test_airport_has_every_field_of_the_data(client):
    """Empty fields are null."""
    airport = client.get(f"{AIRPORTS}/EDDF").json()

    assert airport == {
        "icao": "EDDF",
        "iata": "FRA",
        "lid": None,
        "name": "Frankfurt am Main International Airport",
        "city": "Frankfurt am Main",
        "region": "Hesse",
        "country": "DE",
        "elevation_ft": 364.0,
        "lat": 50.0264,
        "lon": 8.54313,
        "timezone": "Europe/Berlin",
    }


@pytest.mark.parametrize("code", ["EDDF", "eddf", "FRA", "fra", "Fra"])
def test_airport_is_found_by_icao_and_iata_code(client, code):
    """In any case."""
    response = client.get(f"{AIRPORTS}/{code}")

    assert response.json()["icao"] == "EDDF"


def test_every_airport_is_found_by_its_codes(client, world):
    """Local codes such as _AYM too."""
    for airport in list(world.values())[::200]:
        assert client.get(f"{AIRPORTS}/{airport['icao']}").json()["icao"] == airport["icao"]
        if airport["iata"]:
            assert client.get(f"{AIRPORTS}/{airport['iata']}").json()["icao"] == airport["icao"]
    assert client.get(f"{AIRPORTS}/_AYM").json()["name"] == "Yas Island Seaplane Base"


def test_unknown_code_is_a_404_problem(client):
    """It explains the form of codes, and where to search."""
    response = client.get(f"{AIRPORTS}/ZZZZ")

    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == "urn:problem:unknown-airport"
    assert "No airport has the code ZZZZ" in response.json()["detail"]
    assert "/v1/airports?q=" in response.json()["detail"]


@pytest.mark.parametrize("code", ["A", "TOOLONG", "É12", "a%00b", "%F0%9F%9B%AB" * 3, "' or", "F%2FA"])
def test_invalid_code_is_refused(client, code):
    """Before it reaches the database."""
    response = client.get(f"{AIRPORTS}/{code}")

    assert response.status_code in (404, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_pages_have_every_airport_once_in_order(client, world):
    """Following the cursors to the end lists all airports sorted by code, without gaps or duplicates."""
    found = walk(client)

    assert found == sorted(world)


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_pages_of_any_size_show_the_same(client, world, limit):
    """A client that follows the cursors gets identical airports with 1, 7 or 100 items per page."""
    found = walk(client, country="IS", limit=limit)

    assert found == sorted(code for code, airport in world.items() if airport["country"] == "IS")


def test_last_page_has_no_cursor_even_if_it_is_full(client):
    """A last page has no next_cursor and no Link header, so that clients do not request an empty page."""
    size = len(walk(client, country="LU"))

    page = client.get(AIRPORTS, params={"country": "LU", "limit": size})

    assert len(page.json()["items"]) == size
    assert page.json()["next_cursor"] is None
    assert "link" not in page.headers


def test_link_header_has_the_next_page_with_its_filters(client):
    """RFC 8288."""
    first = client.get(AIRPORTS, params={"country": "BR", "limit": 2, "q": "são"})

    second = client.get(first.url.join(first.links["next"]["url"]))

    assert second.json()["items"][0]["icao"] > first.json()["items"][-1]["icao"]
    assert {airport["country"] for airport in second.json()["items"]} == {"BR"}


def test_page_size_defaults_to_the_setting(settings):
    """Without a `limit` parameter, a page has as many airports as the setting AIRPORTS_PAGE_SIZE says."""
    from service.application import build

    app = build(settings.model_copy(update={"airports_page_size": 3}))

    with TestClient(app) as client:
        assert len(client.get(AIRPORTS).json()["items"]) == 3


@pytest.mark.parametrize("country", ["DE", "de", "dE"])
def test_country_filter_ignores_case(client, world, country):
    """The country filter accepts ISO codes in upper, lower and mixed case."""
    found = walk(client, country=country)

    assert len(found) == sum(airport["country"] == "DE" for airport in world.values())


def test_filters_are_combined(client, world):
    """With several filters, the list contains only the airports that match every filter."""
    found = walk(client, country="US", region="Hawaii", has_iata=True)

    expected = [c for c, a in world.items() if a["country"] == "US" and a["subd"] == "Hawaii" and a["iata"]]
    assert found == sorted(expected)
    assert found


def test_has_iata_false_is_a_filter(client, world):
    """The filter has_iata=false lists only airports without an IATA code, rather than all airports."""
    found = walk(client, country="FR", has_iata=False)

    assert found == sorted(c for c, a in world.items() if a["country"] == "FR" and not a["iata"])


@pytest.mark.parametrize("q", ["são paulo", "sao paulo", "SÃO PAULO", "  Paulo   sao ", "Sa\u0303o Paulo"])
def test_search_ignores_case_accents_and_order(client, q):
    """The search finds an airport whatever the case, accents and word order of the query."""
    found = codes(client, q=q, has_iata=True, country="BR")

    assert "SBGR" in found


@pytest.mark.parametrize("q", ["%", "_____", "a%a", "\\", "/", "' or 1=1 --", "(", "日本", "🛫"])
def test_search_escapes_wildcards_and_quotes(client, world, q):
    """The search takes SQL wildcards and quotes in the query as plain text."""
    found = walk(client, q=q)

    folded = q.casefold().split()
    expected = [c for c, a in world.items() if all(w in f"{a['name']}\n{a['city']}".casefold() for w in folded)]
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"country": "DEU"}, "country"),
        ({"country": "1"}, "country"),
        ({"country": ""}, "country"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"q": " "}, "q"),
        ({"q": "x" * 101}, "q"),
        ({"q": "a\x00b"}, "q"),
        ({"region": "\x1b[31m"}, "region"),
        ({"has_iata": "perhaps"}, "has_iata"),
        ({"contry": "DE"}, "contry"),
    ],
)
def test_invalid_parameter_is_an_error_with_its_name(client, params, field):
    """An ignored filter would show everything."""
    response = client.get(AIRPORTS, params=params)

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["loc"] for error in response.json()["errors"]] == [["query", field]]


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "garbage",
        "A",
        "====",
        "é",
        "\x00",
        "A" * 10_000,
        base64.urlsafe_b64encode(b"' or 1=1").decode(),
        base64.urlsafe_b64encode(b"\xff\xfe\xfd").decode(),
        base64.urlsafe_b64encode(b"17").decode(),
        base64.urlsafe_b64encode(b"EDDF\n").decode(),
    ],
)
def test_invalid_cursor_is_refused(client, cursor):
    """Garbage, a changed cursor, and the cursor of another list."""
    response = client.get(AIRPORTS, params={"cursor": cursor})

    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", "cursor"]
    assert response.json()["errors"][0]["msg"].endswith("not a cursor of this list; start again without one")


def test_two_services_have_separate_settings(settings, loaded_database, tmp_path):
    """Two services in one process each use the settings that they were built with."""
    from service.application import build

    one: FastAPI = build(settings.model_copy(update={"airports_page_size": 1}))
    two: FastAPI = build(settings.model_copy(update={"airports_page_size": 2}))

    with TestClient(one) as first, TestClient(two) as second:
        assert len(first.get(AIRPORTS).json()["items"]) == 1
        assert len(second.get(AIRPORTS).json()["items"]) == 2
