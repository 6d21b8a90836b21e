"""Visit reports: written once, read newest first, deleted."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.models import Airport, Report


async def create(session: AsyncSession, report: Report) -> Report:
    """Store a report; its id is known on return."""
    session.add(report)
    await session.flush()
    return report


async def by_id(session: AsyncSession, report_id: int) -> Report | None:
    """Return the report with this id."""
    return await session.get(Report, report_id)


async def latest(
    session: AsyncSession, *, airport: Airport | None = None, before: int | None = None, limit: int
) -> Sequence[Report]:
    """Return the newest `limit` reports, on one airport or on all, from before the id `before`."""
    query = select(Report).order_by(Report.id.desc()).limit(limit)
    if airport is not None:
        query = query.where(Report.airport == airport.icao)
    if before is not None:
        query = query.where(Report.id < before)
    return (await session.scalars(query)).all()


async def remove(session: AsyncSession, report_id: int) -> bool:
    """Delete the report with this id; return whether there was one."""
    return await session.scalar(delete(Report).where(Report.id == report_id).returning(Report.id)) is not None
