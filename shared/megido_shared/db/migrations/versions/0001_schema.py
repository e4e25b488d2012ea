"""The tables, their indexes, and the function that makes partitions."""

from megido_shared.db.migrate import run_sql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql("0001_schema.sql")
