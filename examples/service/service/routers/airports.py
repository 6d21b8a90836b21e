"""`/v1/airports`: read only."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi_prodkit.auth import public  # fastapi-prodkit new: auth
from fastapi_prodkit.database import SessionDep
from fastapi_prodkit.errors import ProblemError

from service import schemas
from service.config import SettingsDep
from service.pagination import cut, link_next
from service.services import airports

router = APIRouter(prefix="/v1/airports", tags=["airports"])
public(router)  # fastapi-prodkit new: auth


@router.get("", summary="List airports")
async def search(
    query: Annotated[schemas.AirportQuery, Query()],
    session: SessionDep,
    settings: SettingsDep,
    request: Request,
    response: Response,
) -> schemas.AirportPage:
    """Airports by ICAO code, page by page. The `Link` header leads to the next page, as `next_cursor` does."""
    limit = query.limit or settings.airports_page_size
    found = await airports.search(
        session,
        country=query.country,
        region=query.region,
        q=query.q,
        has_iata=query.has_iata,
        after=query.cursor,
        limit=limit + 1,
    )
    page, cursor = cut(found, limit, lambda airport: airport.icao)
    link_next(request, response, cursor)
    return schemas.AirportPage(items=[schemas.Airport.model_validate(airport) for airport in page], next_cursor=cursor)


# Declared before /{code}, which also matches /nearest.
@router.get("/nearest", summary="Find the nearest airports")
async def nearest(query: Annotated[schemas.NearbyQuery, Query()], session: SessionDep) -> schemas.NearbyAirports:
    """Airports around a position, nearest first, by great-circle distance."""
    found = await airports.nearest(session, query.lat, query.lon, limit=query.limit)
    return schemas.NearbyAirports(items=[schemas.NearbyAirport.at(*pair) for pair in found])


@router.get("/{code}", summary="Get an airport", responses={404: {"description": "No airport has this code."}})
async def get(
    code: Annotated[schemas.AirportCode, Path(description="ICAO or IATA code.", examples=["FRA"])],
    session: SessionDep,
) -> schemas.Airport:
    """One airport, by ICAO or IATA code, in upper or lower case."""
    airport = await airports.by_code(session, code)
    if airport is None:
        raise ProblemError(
            404,
            f"No airport has the code {code}. Codes are ICAO (four characters, such as EDDF) or IATA (three letters, "
            "such as FRA); /v1/airports?q= searches by name and city.",
            type="urn:problem:unknown-airport",
        )
    return schemas.Airport.model_validate(airport)
