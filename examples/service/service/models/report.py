"""The reports table."""

from datetime import UTC, date, datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from service.models.base import Base, UTCDateTime


class Report(Base):
    """A visitor's report on an airport."""

    __tablename__ = "reports"
    __table_args__ = (CheckConstraint("rating between 1 and 5", name="rating"),)

    # SQLite numbers the rows of an INTEGER key only.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    airport: Mapped[str] = mapped_column(ForeignKey("airports.icao"), index=True)
    visited_on: Mapped[date]
    rating: Mapped[int]
    comment: Mapped[str] = mapped_column(String(2000))
    author: Mapped[str | None] = mapped_column(String(255))  # fastapi-prodkit new: auth
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=lambda: datetime.now(UTC))
