"""What clients send and receive: the names here are the names in the OpenAPI document and in generated clients."""

from service.schemas.airport import (
    Airport,
    AirportCode,
    AirportPage,
    AirportQuery,
    NearbyAirport,
    NearbyAirports,
    NearbyQuery,
)
from service.schemas.report import Report, ReportCreate, ReportPage, ReportQuery

__all__ = [
    "Airport",
    "AirportCode",
    "AirportPage",
    "AirportQuery",
    "NearbyAirport",
    "NearbyAirports",
    "NearbyQuery",
    "Report",
    "ReportCreate",
    "ReportPage",
    "ReportQuery",
]
