"""Visit reports, as clients see them."""

import re
from datetime import UTC, date, datetime
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from service.pagination import decode_cursor
from service.schemas.airport import AirportCode, Limit
from service.schemas.text import Comment


def _written_out(day: object) -> object:
    """Refuse other values that pydantic accepts as a date: seconds since 1970, and times at midnight."""
    if not (isinstance(day, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day)):
        raise ValueError("must be a date, such as 2025-05-04")
    return day


def _not_in_the_future(day: date) -> date:
    if day > datetime.now(UTC).date():
        raise ValueError("must not be in the future (UTC)")
    return day


Day = Annotated[date, BeforeValidator(_written_out), AfterValidator(_not_in_the_future)]
Cursor = Annotated[str, AfterValidator(partial(decode_cursor, pattern=r"[1-9][0-9]{0,17}"))]
Rating = Annotated[int, Field(strict=True, ge=1, le=5, description="1 (never again) to 5 (excellent).")]

VISIT: JsonDict = {"visited_on": "2025-05-04", "rating": 4, "comment": "Long walks, short queues."}


class ReportCreate(BaseModel):
    """A visit to an airport."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"airport": "FRA", **VISIT}]})

    airport: AirportCode = Field(description="ICAO or IATA code.")
    visited_on: Day = Field(description="Day of the visit.")
    rating: Rating
    comment: Comment = Field(description="Plain text.")


class Report(BaseModel):
    """A stored report."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [
                {
                    "id": 1,
                    "airport": "EDDF",
                    **VISIT,
                    "author": "alice",  # fastapi-prodkit new: auth
                    "created_at": "2025-05-05T06:07:08Z",
                }
            ]
        },
    )

    id: int
    airport: str = Field(description="ICAO code of the airport.")
    visited_on: date
    rating: Rating
    comment: Comment = Field(description="Plain text.")
    # fastapi-prodkit new: auth
    author: str | None = Field(description="Id of the user who wrote it; null if that was before there were users.")
    # fastapi-prodkit new: end
    created_at: AwareDatetime = Field(description="When the report was stored, UTC.")


class ReportPage(BaseModel):
    """Reports, newest first."""

    items: list[Report]
    next_cursor: str | None = Field(description="Cursor of the next page; null on the last page.", examples=["MTA"])


class ReportQuery(BaseModel):
    """Which reports to list, and which page of them."""

    model_config = ConfigDict(extra="forbid")

    airport: AirportCode | None = Field(None, description="ICAO or IATA code.", examples=["FRA"])
    limit: Limit | None = Field(None, description="Maximum size of the page; AIRPORTS_PAGE_SIZE if left out.")
    cursor: Cursor | None = Field(None, description="`next_cursor` of the previous page.")
