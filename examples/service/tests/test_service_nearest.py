"""`/v1/airports/nearest`, compared with a computation over all airports."""

import random
from math import acos, cos, degrees, radians, sin

import pytest
from fastapi.testclient import TestClient

from service.services.geography import chord, distance_km, unit_vector

NEAREST = "/v1/airports/nearest"
PLACES = {
    "Frankfurt": (50.11, 8.68),
    "North Pole": (90, 0),
    "North Pole, another meridian": (90, 137),
    "South Pole": (-90, -45),
    "near the South Pole": (-89.99, 179.9),
    "Fiji, west of the antimeridian": (-17.0, 179.999),
    "Fiji, east of the antimeridian": (-17.0, -179.999),
    "the antimeridian": (52.0, 180),
    "the antimeridian by its other name": (52.0, -180),
    "Point Nemo": (-48.8767, -123.3933),
    "Null Island": (0, 0),
}


def by_computation(world, lat, lon):
    """Distances to all airports by the spherical law of cosines, shortest first."""
    phi = radians(lat)

    def distance(airport):
        other = radians(airport["lat"])
        cosine = sin(phi) * sin(other) + cos(phi) * cos(other) * cos(radians(airport["lon"] - lon))
        return 6371.0088 * acos(max(-1.0, min(1.0, cosine)))

    return sorted(distance(airport) for airport in world.values())


def assert_nearest(client, world, lat, lon, limit):
    found = client.get(NEAREST, params={"lat": lat, "lon": lon, "limit": limit}).json()["items"]

    distances = [airport["distance_km"] for airport in found]
    assert distances == pytest.approx(by_computation(world, lat, lon)[:limit], abs=0.01)
    assert len({airport["icao"] for airport in found}) == limit


@pytest.fixture
def client(reader: TestClient) -> TestClient:
    """One service for all tests of this module, which only read."""
    return reader


@pytest.mark.parametrize("place", PLACES)
def test_nearest_airports_are_correct_everywhere(client, world, place):
    """At the poles, the antimeridian, and in the ocean."""
    lat, lon = PLACES[place]

    assert_nearest(client, world, lat, lon, limit=10)


def test_nearest_airports_are_correct_at_random_places(client, world):
    """At 25 random positions, the endpoint returns the airports that are really nearest."""
    place = random.Random(2026)
    for _ in range(25):
        lat = degrees(acos(place.uniform(-1, 1))) - 90
        lon = place.uniform(-180, 180)
        assert_nearest(client, world, lat, lon, limit=place.choice([1, 5, 50]))


def test_both_sides_of_the_antimeridian_have_the_same_airports(client):
    """Positions on both sides of the 180th meridian, 0.002 degrees apart, have identical nearest airports."""
    west = client.get(NEAREST, params={"lat": -17, "lon": 179.999}).json()["items"]
    east = client.get(NEAREST, params={"lat": -17, "lon": -179.999}).json()["items"]

    assert {airport["icao"] for airport in west} == {airport["icao"] for airport in east}


def test_distance_to_the_airport_itself_is_zero(client):
    """Exactly."""
    found = client.get(NEAREST, params={"lat": 50.0264, "lon": 8.54313, "limit": 1}).json()["items"]

    assert found[0]["icao"] == "EDDF"
    assert found[0]["distance_km"] == 0


def test_default_is_five_airports(client):
    """Without a `limit` parameter, the endpoint returns the five nearest airports."""
    assert len(client.get(NEAREST, params={"lat": 0, "lon": 0}).json()["items"]) == 5


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"lat": 91, "lon": 0}, "lat"),
        ({"lat": -90.001, "lon": 0}, "lat"),
        ({"lat": "nan", "lon": 0}, "lat"),
        ({"lat": 0, "lon": "inf"}, "lon"),
        ({"lat": 0, "lon": 180.001}, "lon"),
        ({"lat": 0, "lon": "east"}, "lon"),
        ({"lat": 0}, "lon"),
        ({"lat": 0, "lon": 0, "limit": 51}, "limit"),
        ({"lat": 0, "lon": 0, "limit": 0}, "limit"),
        ({"lat": 0, "lon": 0, "radius": 5}, "radius"),
    ],
)
def test_invalid_position_is_refused(client, params, field):
    """A missing or invalid coordinate, an invalid limit or an unknown parameter is a 422 that names the field."""
    response = client.get(NEAREST, params=params)

    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["errors"]] == [["query", field]]


def test_distance_follows_the_globe():
    """The distance from pole to pole is half the Earth's circumference, and a quarter turn is half of that."""
    assert distance_km(90, 0, -90, 0) == pytest.approx(20015.115, abs=0.001)
    assert distance_km(0, -180, 0, 90) == pytest.approx(10007.557, abs=0.001)
    assert distance_km(50, 8, 50, 8) == 0


def test_chord_orders_like_the_great_circle():
    """The chord between two unit vectors equals the chord computed from their great-circle distance."""
    here, there = unit_vector(50.11, 8.68), unit_vector(-33.9, 151.2)

    straight = sum((a - b) ** 2 for a, b in zip(here, there, strict=True)) ** 0.5

    assert straight == pytest.approx(chord(distance_km(50.11, 8.68, -33.9, 151.2)))
    assert chord(distance_km(90, 0, -90, 0)) == pytest.approx(2)
