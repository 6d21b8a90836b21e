"""`/v1/reports`: what visitors say."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_prodkit.auth import CurrentUser, public, require_roles  # fastapi-prodkit new: auth
from fastapi_prodkit.database import SessionDep
from fastapi_prodkit.errors import ProblemError
from fastapi_prodkit.rate_limit import (
    RateLimit,
    by_user,  # fastapi-prodkit new: auth
)
from sqlalchemy.ext.asyncio import AsyncSession

from service import models, schemas
from service.config import SettingsDep
from service.pagination import cut, link_next
from service.services import airports, reports

router = APIRouter(prefix="/v1/reports", tags=["reports"])

ReportId = Annotated[int, Path(ge=1, lt=2**63, description="`id` of the report.")]
# fastapi-prodkit new: auth
REPORTER, EDITOR = "reporter", "editor"  # roles: who may write a report, and who may delete those of others
# fastapi-prodkit new: end
WRITES = RateLimit(
    "30/minute",
    name="reports",
    key=by_user,  # fastapi-prodkit new: auth
)
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": "No report has this id."}}


# fastapi-prodkit new: auth
async def _author_or_editor(report_id: ReportId, session: SessionDep, user: CurrentUser) -> None:
    """Refuse all other users with a 403. There is one issuer, so that the id alone identifies a user."""
    report = await reports.by_id(session, report_id)
    if report is not None and report.author != user.id and EDITOR not in user.roles:
        raise ProblemError(403, "Only the author of a report and editors may delete it.")


# fastapi-prodkit new: end
@router.post(
    "",
    status_code=201,
    summary="Write a report",
    dependencies=[
        Depends(require_roles(REPORTER)),  # fastapi-prodkit new: auth
        Depends(WRITES),
    ],
    responses={429: {"description": "More than 30 reports within a minute."}},
)
async def create(
    report: schemas.ReportCreate,
    session: SessionDep,
    user: CurrentUser,  # fastapi-prodkit new: auth
    request: Request,
    response: Response,
) -> schemas.Report:
    """Store a visit report. The `Location` header has its path."""
    airport = await _airport(session, report.airport, where="body")
    written = models.Report(
        airport=airport.icao,
        visited_on=report.visited_on,
        rating=report.rating,
        comment=report.comment,
        author=user.id,  # fastapi-prodkit new: auth
    )
    created = await reports.create(session, written)
    response.headers["Location"] = request.url_for("read", report_id=created.id).path
    return schemas.Report.model_validate(created)


@router.get("", summary="List reports")
@public  # fastapi-prodkit new: auth
async def latest(
    query: Annotated[schemas.ReportQuery, Query()],
    session: SessionDep,
    settings: SettingsDep,
    request: Request,
    response: Response,
) -> schemas.ReportPage:
    """Reports, newest first, page by page; on one airport or on all."""
    limit = query.limit or settings.airports_page_size
    airport = await _airport(session, query.airport, where="query") if query.airport else None
    before = int(query.cursor) if query.cursor else None
    found = await reports.latest(session, airport=airport, before=before, limit=limit + 1)
    page, cursor = cut(found, limit, lambda report: report.id)
    link_next(request, response, cursor)
    return schemas.ReportPage(items=[schemas.Report.model_validate(report) for report in page], next_cursor=cursor)


@router.get("/{report_id}", summary="Get a report", responses=UNKNOWN)
@public  # fastapi-prodkit new: auth
async def read(report_id: ReportId, session: SessionDep) -> schemas.Report:
    """One report."""
    report = await reports.by_id(session, report_id)
    if report is None:
        raise _unknown(report_id)
    return schemas.Report.model_validate(report)


@router.delete(
    "/{report_id}",
    status_code=204,
    summary="Delete a report",
    dependencies=[Depends(_author_or_editor)],  # fastapi-prodkit new: auth
    responses={
        **UNKNOWN,
        403: {"description": "Neither its author nor an editor has asked."},  # fastapi-prodkit new: auth
    },
)
async def delete(report_id: ReportId, session: SessionDep) -> None:
    """Delete a report for good."""
    if not await reports.remove(session, report_id):
        raise _unknown(report_id)


def _unknown(report_id: int) -> ProblemError:
    return ProblemError(404, f"No report has the id {report_id}.", type="urn:problem:unknown-report")


async def _airport(session: AsyncSession, code: str, *, where: str) -> models.Airport:
    """Return the airport whose code is in the body or the query; an unknown code is a validation error."""
    airport = await airports.by_code(session, code)
    if airport is None:
        message = "no airport has this ICAO or IATA code"
        raise RequestValidationError([{"loc": (where, "airport"), "msg": message, "type": "unknown_airport"}])
    return airport
