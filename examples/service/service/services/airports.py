"""Finding airports."""

import unicodedata
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.models import Airport
from service.services.geography import chord, distance_km, unit_vector

REACHES = (chord(100), chord(1000), 3.0)  # 100 km, 1000 km, and more than the whole sphere


def fold(text: str) -> str:
    """Return the text without accents and case, so that "sao paulo" finds São Paulo on every database."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


async def search(  # noqa: PLR0913 - each one is a filter
    session: AsyncSession,
    *,
    country: str | None = None,
    region: str | None = None,
    q: str | None = None,
    has_iata: bool | None = None,
    after: str | None = None,
    limit: int,
) -> Sequence[Airport]:
    """Return the first `limit` airports that pass every filter, by ICAO code, from after the code `after`."""
    query = select(Airport).order_by(Airport.icao).limit(limit)
    if country is not None:
        query = query.where(Airport.country == country)
    if region is not None:
        query = query.where(Airport.region == region)
    if q is not None:
        query = query.where(*(Airport.search_text.contains(word, autoescape=True) for word in fold(q).split()))
    if has_iata is not None:
        query = query.where(Airport.iata.is_not(None) if has_iata else Airport.iata.is_(None))
    if after is not None:
        query = query.where(Airport.icao > after)
    return (await session.scalars(query)).all()


async def by_code(session: AsyncSession, code: str) -> Airport | None:
    """Return the airport with this ICAO (four characters) or IATA code (three)."""
    column = Airport.iata if len(code) == 3 else Airport.icao  # noqa: PLR2004 - the length of an IATA code
    return await session.scalar(select(Airport).where(column == code).order_by(Airport.icao).limit(1))


async def any_loaded(session: AsyncSession) -> bool:
    """Return whether the table has airports: `service.load` has run."""
    return await session.scalar(select(Airport.icao).limit(1)) is not None


async def nearest(session: AsyncSession, lat: float, lon: float, *, limit: int) -> list[tuple[Airport, float]]:
    """Return the `limit` airports that are nearest to a position, with their distances in kilometres.

    The first query covers a small cube, for which the database uses an index. A larger cube follows only if there are
    too few airports in it.
    """
    here = unit_vector(lat, lon)
    airports: Sequence[Airport] = ()
    for reach in REACHES:
        airports = (await session.scalars(_nearest_within(reach, here, limit))).all()
        if len(airports) == limit:
            break
    return [(airport, distance_km(lat, lon, airport.lat, airport.lon)) for airport in airports]


def _nearest_within(reach: float, here: tuple[float, float, float], limit: int) -> Select[Airport]:
    x, y, z = here
    squared_distance = _squared(Airport.x - x) + _squared(Airport.y - y) + _squared(Airport.z - z)
    return (
        select(Airport)
        .where(
            Airport.x.between(x - reach, x + reach),
            Airport.y.between(y - reach, y + reach),
            Airport.z.between(z - reach, z + reach),
            squared_distance <= reach * reach,
        )
        .order_by(squared_distance, Airport.icao)
        .limit(limit)
    )


def _squared(difference: ColumnElement[float]) -> ColumnElement[float]:
    return difference * difference
