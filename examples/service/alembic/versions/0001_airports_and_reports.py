"""Airports and reports"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "airports",
        sa.Column("icao", sa.String(4), nullable=False),
        sa.Column("iata", sa.String(3)),
        sa.Column("lid", sa.String(8)),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("city", sa.String(100)),
        sa.Column("region", sa.String(100)),
        sa.Column("country", sa.String(2), nullable=False),
        sa.Column("elevation_ft", sa.Double(), nullable=False),
        sa.Column("lat", sa.Double(), nullable=False),
        sa.Column("lon", sa.Double(), nullable=False),
        sa.Column("timezone", sa.String(64)),
        sa.Column("search_text", sa.String(300), nullable=False),
        sa.Column("x", sa.Double(), nullable=False),
        sa.Column("y", sa.Double(), nullable=False),
        sa.Column("z", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("icao", name="pk_airports"),
    )
    op.create_index("ix_airports_iata", "airports", ["iata"])
    op.create_index("ix_airports_country", "airports", ["country"])
    op.create_index("ix_airports_position", "airports", ["z", "x", "y"])
    op.create_table(
        "reports",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("airport", sa.String(4), nullable=False),
        sa.Column("visited_on", sa.Date(), nullable=False),
        sa.Column("rating", sa.Integer(), nullable=False),
        sa.Column("comment", sa.String(2000), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("rating between 1 and 5", name="ck_reports_rating"),
        sa.ForeignKeyConstraint(["airport"], ["airports.icao"], name="fk_reports_airport_airports"),
        sa.PrimaryKeyConstraint("id", name="pk_reports"),
    )
    op.create_index("ix_reports_airport", "reports", ["airport"])


def downgrade() -> None:
    op.drop_table("reports")
    op.drop_table("airports")
