"""Airports, as clients see them."""

from functools import partial
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.config import JsonDict

from service import models
from service.pagination import decode_cursor
from service.schemas.text import Words

AirportCode = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{3,4}$", to_upper=True)]
Country = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2}$", to_upper=True)]
Cursor = Annotated[str, AfterValidator(partial(decode_cursor, pattern=r"[A-Z0-9_]{4}"))]
Limit = Annotated[int, Field(ge=1, le=100)]

NEW_YORK: JsonDict = {
    "icao": "KJFK",
    "iata": "JFK",
    "lid": "JFK",
    "name": "John F Kennedy International Airport",
    "city": "New York",
    "region": "New York",
    "country": "US",
    "elevation_ft": 13.0,
    "lat": 40.639928,
    "lon": -73.778692,
    "timezone": "America/New_York",
}


class Airport(BaseModel):
    """An airport or landing strip."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [NEW_YORK]})

    icao: str = Field(description="ICAO location indicator, or a local code of four characters; unique.")
    iata: str | None = Field(description="IATA location code.")
    lid: str | None = Field(description="FAA location identifier, of airports in the United States.")
    name: str = Field(description="Official name, in Latin script.")
    city: str | None = Field(description="City that the airport is in or near.")
    region: str | None = Field(description="State, province or the like.")
    country: str = Field(description="ISO 3166-1 alpha-2 code; XK is Kosovo.")
    elevation_ft: float = Field(description="Highest point of the landing area above mean sea level, feet.")
    lat: float = Field(description="Latitude, degrees.")
    lon: float = Field(description="Longitude, degrees.")
    timezone: str | None = Field(description="Name in the tz database; none in Antarctica.")


class AirportPage(BaseModel):
    """Airports by ICAO code."""

    items: list[Airport]
    next_cursor: str | None = Field(description="Cursor of the next page; null on the last page.", examples=["RURERg"])


class NearbyAirport(Airport):
    """An airport and its distance."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**NEW_YORK, "distance_km": 20.746}]})

    distance_km: float = Field(description="Great-circle distance, kilometres, to the metre.")

    @classmethod
    def at(cls, airport: models.Airport, distance_km: float) -> Self:
        """Return an airport with its distance from a position."""
        return cls(**Airport.model_validate(airport).model_dump(), distance_km=round(distance_km, 3))


class NearbyAirports(BaseModel):
    """Airports by distance, nearest first."""

    items: list[NearbyAirport]


class AirportQuery(BaseModel):
    """Filters, of which all must match, and the page. Misspelt parameters are errors: they would filter nothing."""

    model_config = ConfigDict(extra="forbid")

    country: Country | None = Field(None, description="ISO 3166-1 alpha-2 code.", examples=["DE"])
    region: Words | None = Field(
        None, description="State, province or the like, spelt as in the data.", examples=["Hesse"]
    )
    q: Words | None = Field(
        None, description="Words that name or city contain; case and accents do not matter.", examples=["sao paulo"]
    )
    has_iata: bool | None = Field(None, description="Whether the airport has an IATA code.")
    limit: Limit | None = Field(None, description="Maximum size of the page; AIRPORTS_PAGE_SIZE if left out.")
    cursor: Cursor | None = Field(None, description="`next_cursor` of the previous page.")


class NearbyQuery(BaseModel):
    """A position, and how many airports to return."""

    model_config = ConfigDict(extra="forbid")

    lat: float = Field(ge=-90, le=90, allow_inf_nan=False, description="Latitude, degrees.", examples=[50.11])
    lon: float = Field(ge=-180, le=180, allow_inf_nan=False, description="Longitude, degrees.", examples=[8.68])
    limit: int = Field(5, ge=1, le=50, description="How many airports.")
