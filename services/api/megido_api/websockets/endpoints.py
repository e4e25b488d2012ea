"""`/proxy/api/websocket-messages/`."""

import uuid
from typing import Any

from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.answers import Created
from megido_api.fields import Cursor, Filter, Limit
from megido_api.paging import Page, Total
from megido_api.parameters import ONLY_KNOWN
from megido_api.publishing import next_number, publish
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_api.websockets import queries
from megido_api.websockets.schemas import MessageList, PostedMessage
from megido_shared import events, ids
from megido_shared.db import tables

router = APIRouter(prefix="/proxy/api/websocket-messages", tags=["websocket messages"])

_STORED_LIMIT = 700_000
"""Bytes of a posted payload that are kept: a message is one record on the bus."""


@router.get(
    "/list/", summary="List WebSocket messages, newest first", response_model=MessageList, dependencies=ONLY_KNOWN
)
async def list_websocket_messages(  # noqa: PLR0917 - query parameters, by name
    state: StateDep,
    connection_id: Filter = None,
    direction: Filter = None,
    message_type: Filter = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Any:
    filters = queries.Filters(connection_id, direction, message_type)

    async def work(connection: AsyncConnection) -> tuple[Page, Total, dict[uuid.UUID, str]]:
        page = await queries.page(connection, filters, cursor=cursor, limit=limit)
        shown = await queries.previews(connection, page.rows)
        if cursor is None and not page.more:
            return page, Total(len(page.rows), exact=True), shown
        return page, await queries.total(connection, filters), shown

    page, total, shown = await state.database.read(work)
    return {
        "messages": [_listed(row, shown.get(row.message_id, "")) for row in page.rows],
        "total": total.count,
        "limit": limit,
        "total_is_exact": total.exact,
        "next_cursor": page.rows[-1].message_id if page.more else None,
    }


def _listed(row: Any, payload: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "connection_id": row.connection_id,
        "url": row.url,
        "direction": row.direction,
        "message_type": row.message_type,
        "payload": payload,
        "payload_size": row.payload_size,
        "timestamp": iso(row.occurred_at),
        "source_ip": row.source_ip,
        "message_id": row.message_id,
        "flow_id": row.flow_id,
        "sequence": row.sequence,
        "truncated": row.truncated,
        "close_code": row.close_code,
        "close_reason": row.close_reason,
    }


@router.post("/", summary="Post a WebSocket message", status_code=201, response_model=Created)
async def post_websocket_message(state: StateDep, posted: PostedMessage) -> Any:
    """For capture tools other than our own."""
    now_us = state.clock.time_us()
    identity = state.origin.identity(now_us if posted.timestamp is None else posted.timestamp)
    payload = posted.payload_bytes()
    size = max(posted.payload_size or 0, len(payload))
    stored = payload[:_STORED_LIMIT]

    async def work(connection: AsyncConnection) -> int:
        number = await next_number(connection, tables.message_ids)
        event = events.WebSocketMessage(
            **identity,
            message_id=ids.new_id(),
            flow_id=await _flow_id(state, connection, posted.connection_id),
            connection_id=posted.connection_id,
            url=posted.url,
            direction=posted.direction,
            message_type=posted.message_type,
            payload=stored,
            size=size,
            truncated=size > len(stored),
            sequence=number,  # rises along a connection, which is all that a reader of it needs
            client=events.Peer(ip=posted.source_ip or ""),
            posted_id=number,
        )
        await publish(connection, [event])
        return number

    return {"id": await state.publish(work)}


async def _flow_id(state: State, connection: AsyncConnection, connection_id: str) -> bytes:
    """The flow that the connection's name tells; otherwise the one that its first message was given."""
    name = connection_id.replace("\0", "")  # as it is stored
    found = _named(name) or state.origin.connection(name)
    if found is None:
        found = await queries.flow_of(connection, name)
        found = state.origin.remember_connection(name, found or ids.new_id())
    return found


def _named(connection_id: str) -> bytes | None:
    try:
        found = ids.parse(connection_id.removeprefix("ws_"))
    except ValueError:
        return None
    return found if ids.to_uuid(found).version == 7 else None
