"""SQL of nodes."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, case, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import config_snapshots, nodes

MAX_NODES = 1000


async def listed(connection: AsyncConnection, service: str | None) -> Sequence[Row[Any]]:
    """The last heard of first, each with the version that it should apply: the highest of its scopes."""
    c = nodes.c
    of_node = (literal("global"), literal("app:") + c.source_app, literal("node:") + c.node)
    expected = (
        select(func.max(config_snapshots.c.version)).where(config_snapshots.c.scope.in_(of_node)).scalar_subquery()
    )
    query = select(nodes, case((c.service == "capture", func.coalesce(expected, 0))).label("config_expected"))
    if service:
        query = query.where(c.service == service)
    return (await connection.execute(query.order_by(c.seen_at.desc(), c.node).limit(MAX_NODES))).all()
