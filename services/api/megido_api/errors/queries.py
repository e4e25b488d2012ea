"""SQL of the errors."""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_shared.db.tables import errors, flows

_c = errors.c


@dataclass(frozen=True, slots=True)
class Filters:
    error_type: str | None = None
    source_ip: str | None = None


def selection(filters: Filters) -> Select[Any]:
    query = select(
        _c.id,
        _c.error_id,
        _c.flow_id,
        _c.error_type,
        _c.error_message,
        _c.stack_trace,
        _c.url,
        _c.source_ip,
        _c.occurred_at,
    )
    if filters.error_type:
        query = query.where(_c.error_type == filters.error_type.upper())
    if filters.source_ip:
        query = query.where(_c.source_ip == filters.source_ip)
    return query


async def page(connection: AsyncConnection, filters: Filters, *, cursor: uuid.UUID | None, limit: int) -> paging.Page:
    """Newest first; with a cursor, what is older than it."""
    query = selection(filters).order_by(_c.error_id.desc())
    if cursor is not None:
        query = query.where(_c.error_id < cursor)
    return await paging.fetch(connection, query, limit)


async def total(connection: AsyncConnection, filters: Filters) -> paging.Total:
    return await paging.count(connection, selection(filters))


async def request_ids(connection: AsyncConnection, flow_ids: set[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Integer ids of flows. Asked apart from the page: a list of constants prunes partitions, a join does not."""
    if not flow_ids:
        return {}
    query = select(flows.c.flow_id, flows.c.id).where(flows.c.flow_id.in_(flow_ids))
    return {row.flow_id: row.id for row in await connection.execute(query)}
