"""The airports table, which `service.load` fills."""

from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.models.base import Base


class Airport(Base):
    """An airport, as the `airportsdata` package describes it.

    Attributes:
        region: State, province or the like, spelt as in the data.
        lid: Identifier of the US Federal Aviation Administration.
        search_text: Name and city, folded for search; see `service.services.airports.fold`.
        x, y, z: The position as a point on the unit sphere. Straight lines between such points order distances as
            great circles do, and neither the poles nor the antimeridian is a special case.
    """

    __tablename__ = "airports"
    __table_args__ = (Index("ix_airports_position", "z", "x", "y"),)

    icao: Mapped[str] = mapped_column(String(4), primary_key=True)
    iata: Mapped[str | None] = mapped_column(String(3), index=True)
    lid: Mapped[str | None] = mapped_column(String(8))
    name: Mapped[str] = mapped_column(String(200))
    city: Mapped[str | None] = mapped_column(String(100))
    region: Mapped[str | None] = mapped_column(String(100))
    country: Mapped[str] = mapped_column(String(2), index=True)
    elevation_ft: Mapped[float]
    lat: Mapped[float]
    lon: Mapped[float]
    timezone: Mapped[str | None] = mapped_column(String(64))
    search_text: Mapped[str] = mapped_column(String(300))
    x: Mapped[float]
    y: Mapped[float]
    z: Mapped[float]
