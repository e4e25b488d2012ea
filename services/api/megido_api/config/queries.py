"""SQL around the configuration: what nodes override, and the history of changes."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import config_changes, config_snapshots, nodes

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


async def apps_of_nodes(connection: AsyncConnection) -> dict[str, str]:
    """The application of each capture node that was ever heard of."""
    rows = await connection.execute(select(nodes.c.node, nodes.c.source_app).where(nodes.c.service == "capture"))
    return {row.node: row.source_app for row in rows}


async def tag(connection: AsyncConnection, scopes: Sequence[str]) -> str:
    """An entity tag of what these scopes say, rules included: versions, with the times that tell databases apart."""
    c = config_snapshots.c
    query = select(c.scope, c.version, c.updated_at).where(c.scope.in_(scopes)).order_by(c.scope)
    said = [f"{row.scope}\n{row.version}\n{row.updated_at.timestamp()}\n" for row in await connection.execute(query)]
    return f'"{hashlib.sha256("".join(said).encode()).hexdigest()[:32]}"'


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
