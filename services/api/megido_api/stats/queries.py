"""SQL of the statistics: sums over counters, never a scan of flows."""

from collections import defaultdict
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared import ids
from megido_shared.db.tables import auth_attempts, counters


async def sums(connection: AsyncConnection) -> dict[str, dict[str, int]]:
    """Counters by name and label, summed over the shards of the workers that keep them."""
    query = select(counters.c.name, counters.c.label, func.sum(counters.c.value).label("total")).group_by(
        counters.c.name, counters.c.label
    )
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for row in await connection.execute(query):
        found[row.name][row.label] = int(row.total)
    return found


async def auth_failures_since(connection: AsyncConnection, since: datetime) -> int:
    """The id's bound prunes partitions; it has a margin, since a clock may have jumped."""
    c = auth_attempts.c
    oldest = ids.floor_id(since - timedelta(days=1))
    query = select(func.count()).where(c.auth_id >= oldest, c.occurred_at >= since, c.success.is_(False))
    return await connection.scalar(query) or 0
