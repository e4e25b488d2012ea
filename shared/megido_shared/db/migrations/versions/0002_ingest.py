"""The ingest transaction: argument types and functions, and what chunked bodies and node starts need."""

from megido_shared.db.migrate import run_sql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql("0002_ingest.sql")
