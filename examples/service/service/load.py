"""Load the airports: `python -m service.load`, after the migrations and whenever `airportsdata` has a new release.

Running it again updates what changed. Airports that a release no longer has stay, because reports may refer to them.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import airportsdata
from fastapi_prodkit.database import Database
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from service.config import ServiceSettings
from service.models import Airport
from service.services.airports import fold
from service.services.geography import unit_vector

BATCH = 5000
Upsert = postgresql.Insert | sqlite.Insert
INSERTS: dict[str, Callable[[type[Airport]], Upsert]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


async def load(session: AsyncSession) -> None:
    """Write every airport, in the session's one transaction: readers see all of them or none."""
    airports = list(airportsdata.load().values())
    upsert = _upsert(session)
    for start in range(0, len(airports), BATCH):
        batch = airports[start : start + BATCH]
        # Without the option a new statement begins at each row whose nulls differ from the row before: 7600 in all.
        await session.execute(upsert, [row(airport) for airport in batch], execution_options={"render_nulls": True})
        print(f"Loaded {start + len(batch):,} of {len(airports):,} airports", flush=True)


def row(airport: airportsdata.Airport) -> dict[str, Any]:
    """Return an airport of the package as a row of the table; what the package leaves empty is null."""
    name, city = airport["name"].strip(), airport["city"].strip()
    x, y, z = unit_vector(airport["lat"], airport["lon"])
    return {
        "icao": airport["icao"],
        "iata": airport["iata"] or None,
        "lid": airport["lid"] or None,
        "name": name,
        "city": city or None,
        "region": airport["subd"].strip() or None,
        "country": airport["country"],
        "elevation_ft": airport["elevation"],
        "lat": airport["lat"],
        "lon": airport["lon"],
        "timezone": airport["tz"] or None,
        "search_text": fold(f"{name}\n{city}"),
        "x": x,
        "y": y,
        "z": z,
    }


def _upsert(session: AsyncSession) -> Upsert:
    insert = INSERTS[session.get_bind().dialect.name](Airport)
    columns = (column.name for column in Airport.__table__.columns if not column.primary_key)
    return insert.on_conflict_do_update(
        index_elements=[Airport.icao], set_={name: insert.excluded[name] for name in columns}
    )


async def main(settings: ServiceSettings) -> None:
    """Load into the database of the settings."""
    database = Database(settings.database)
    async with database.lifespan(None), database.session() as session:
        await load(session)


if __name__ == "__main__":
    asyncio.run(main(ServiceSettings()))
