"""Text search, filled by a background indexer, and indexes of what few flows have."""

from megido_shared.db.migrate import run_sql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql("0006_search.sql")
