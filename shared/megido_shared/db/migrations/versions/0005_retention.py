"""Retention: its policy, pinned flows, the audit of its runs, and what removes a day."""

from megido_shared.db.migrate import run_sql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql("0005_retention.sql")
