"""The author of a report

Reports from before have none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("reports", sa.Column("author", sa.String(255)))


def downgrade() -> None:
    op.drop_column("reports", "author")
