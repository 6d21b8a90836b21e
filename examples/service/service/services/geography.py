"""Distances on a sphere of the Earth's mean radius: at most 0.5 % off the true ellipsoid."""

from math import asin, cos, radians, sin, sqrt

EARTH_RADIUS_KM = 6371.0088  # mean radius R1 of the GRS 80 ellipsoid


def unit_vector(lat: float, lon: float) -> tuple[float, float, float]:
    """Return the point on the unit sphere at a position in degrees."""
    phi, lam = radians(lat), radians(lon)
    return cos(phi) * cos(lam), cos(phi) * sin(lam), sin(phi)


def chord(distance_km: float) -> float:
    """Return the straight line, in Earth radii, that a great-circle distance spans."""
    return 2 * sin(distance_km / (2 * EARTH_RADIUS_KM))


def distance_km(lat: float, lon: float, to_lat: float, to_lon: float) -> float:
    """Return the great-circle distance between two positions in degrees, by the haversine formula."""
    phi, to_phi = radians(lat), radians(to_lat)
    half_phi, half_lam = (to_phi - phi) / 2, radians(to_lon - lon) / 2
    haversine = sin(half_phi) ** 2 + cos(phi) * cos(to_phi) * sin(half_lam) ** 2
    return 2 * EARTH_RADIUS_KM * asin(min(1.0, sqrt(haversine)))
