"""What the API itself removes, noted among the runs of retention."""

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import retention_runs
from megido_shared.retention import Report
from megido_shared.retention.report import to_json


async def begin(connection: AsyncConnection, report: Report, *, dry_run: bool, by: str) -> int:
    """Notes a run that is about to remove something; answers its id. Told as failed until `ended` says otherwise: a
    kill in between leaves who asked for what."""
    report.bytes_before = report.bytes_after = int(
        await connection.scalar(select(func.pg_database_size(func.current_database()))) or 0
    )
    values = {
        "state": "failed",
        "dry_run": dry_run,
        "requested_by": by,
        "requested_at": func.now(),
        "report": to_json(report),
        "error": "did not end; some of what it was to remove may be gone",
    }
    return int(await connection.scalar(insert(retention_runs).values(values).returning(retention_runs.c.id)) or 0)


async def ended(connection: AsyncConnection, number: int, report: Report) -> None:
    values = {
        "state": "failed" if report.errors else "done",
        "finished_at": func.now(),
        "report": to_json(report),
        "error": "; ".join(report.errors),
    }
    await connection.execute(update(retention_runs).where(retention_runs.c.id == number).values(values))
