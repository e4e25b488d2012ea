"""SQL around the configuration: what nodes override, and the history of changes."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import config_changes, nodes

_RECENT = timedelta(minutes=1)
_c = config_changes.c


async def overridden(connection: AsyncConnection) -> dict[str, list[dict[str, str]]]:
    """By field the `node` and the `value` of each running capture node whose start decided it."""
    query = select(nodes.c.node, nodes.c.pinned).where(
        nodes.c.service == "capture", nodes.c.state != "stopping", nodes.c.seen_at > func.now() - _RECENT
    )
    found: dict[str, list[dict[str, str]]] = {}
    for row in await connection.execute(query.order_by(nodes.c.node)):
        for name, value in row.pinned.items():
            found.setdefault(name, []).append({"node": row.node, "value": value})
    return found


async def history(
    connection: AsyncConnection, scope: str | None, before: int | None, limit: int
) -> tuple[Sequence[Row[Any]], int]:
    """Changes, newest first, and how many there are of that scope."""
    query, count = select(config_changes), select(func.count()).select_from(config_changes)
    if scope:
        query, count = query.where(_c.scope == scope), count.where(_c.scope == scope)
    if before is not None:
        query = query.where(_c.version < before)
    rows = (await connection.execute(query.order_by(_c.version.desc()).limit(limit))).all()
    return rows, await connection.scalar(count) or 0
