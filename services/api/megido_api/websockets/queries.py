"""SQL of the WebSocket messages."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_api.websockets.preview import preview
from megido_shared.db.tables import websocket_messages

_c = websocket_messages.c
_PREFIX_BYTES = 160_000
"""Of a stored payload: more than one zstd block, so that its beginning can be decompressed from it."""
_AT_ONCE = 50
"""Payloads in memory: a page may list ten thousand messages."""


@dataclass(frozen=True, slots=True)
class Filters:
    connection_id: str | None = None
    direction: str | None = None
    message_type: str | None = None


def selection(filters: Filters) -> Select[Any]:
    query = select(
        _c.id,
        _c.message_id,
        _c.flow_id,
        _c.connection_id,
        _c.url,
        _c.direction,
        _c.message_type,
        _c.payload_size,
        _c.truncated,
        _c.sequence,
        _c.close_code,
        _c.close_reason,
        _c.source_ip,
        _c.occurred_at,
    )
    if filters.connection_id:
        query = query.where(_c.connection_id == filters.connection_id)
    if filters.direction:
        query = query.where(_c.direction == filters.direction.upper())
    if filters.message_type:
        query = query.where(_c.message_type == filters.message_type.upper())
    return query


async def page(connection: AsyncConnection, filters: Filters, *, cursor: uuid.UUID | None, limit: int) -> paging.Page:
    """Newest first; with a cursor, what is older than it."""
    query = selection(filters).order_by(_c.message_id.desc())
    if cursor is not None:
        query = query.where(_c.message_id < cursor)
    return await paging.fetch(connection, query, limit)


async def previews(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> dict[uuid.UUID, str]:
    """How the payloads of messages begin, by message."""
    found: dict[uuid.UUID, str] = {}
    prefix = func.substring(_c.payload, 1, _PREFIX_BYTES).label("payload")
    for start in range(0, len(rows), _AT_ONCE):
        piece = [row.message_id for row in rows[start : start + _AT_ONCE]]
        query = select(_c.message_id, _c.message_type, prefix).where(_c.message_id.in_(piece))
        found |= await asyncio.to_thread(_previews, (await connection.execute(query)).all())
    return found


def _previews(rows: Sequence[Any]) -> dict[uuid.UUID, str]:
    return {row.message_id: preview(bytes(row.payload), row.message_type) for row in rows}


async def flow_of(connection: AsyncConnection, connection_id: str) -> bytes | None:
    """The flow that stored messages of the connection belong to."""
    query = select(_c.flow_id).where(_c.connection_id == connection_id).order_by(_c.message_id.desc()).limit(1)
    found = await connection.scalar(query)
    return None if found is None else found.bytes


async def total(connection: AsyncConnection, filters: Filters) -> paging.Total:
    return await paging.count(connection, selection(filters))
