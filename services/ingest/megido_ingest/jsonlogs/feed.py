"""What the feed says is new, loaded from Postgres in pieces that fit into memory."""

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import ARRAY, BindParameter, Row, Uuid, any_, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import (
    auth_attempts,
    errors,
    feed,
    feed_cursors,
    flows,
    nodes,
    websocket_messages,
)

_PIECE_ROWS = 200
_PIECE_BYTES = 8 << 20


async def position(connection: AsyncConnection, reader: str) -> int:
    """How far the reader is; 0, the feed's beginning, for a new one."""
    found = await connection.scalar(select(feed_cursors.c.seq).where(feed_cursors.c.reader == reader))
    return int(found or 0)


async def advance(connection: AsyncConnection, reader: str, seq: int) -> None:
    statement = insert(feed_cursors).values(reader=reader, seq=seq)
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[feed_cursors.c.reader], set_={"seq": func.greatest(feed_cursors.c.seq, seq)}
        )
    )


async def batches_after(connection: AsyncConnection, seq: int, limit: int) -> list[tuple[int, int]]:
    """The next rows of the feed: (seq, batch_id), in order."""
    query = select(feed.c.seq, feed.c.batch_id).where(feed.c.seq > seq).order_by(feed.c.seq).limit(limit)
    return [(row.seq, row.batch_id) for row in await connection.execute(query)]


async def flow_rows(connection: AsyncConnection, batches: list[int]) -> AsyncIterator[Sequence[Row[Any]]]:
    """Flows that the batches changed last, in feed order, a piece at a time."""
    keys = select(flows.c.flow_id, flows.c.batch_id, flows.c.request_size, flows.c.response_size)
    place = {batch: index for index, batch in enumerate(batches)}
    found = [
        (place[row.batch_id], row.flow_id, (row.request_size or 0) + (row.response_size or 0))
        for row in await connection.execute(keys.where(flows.c.batch_id.in_(batches)))
    ]
    for piece in _pieces(sorted(found)):
        wanted = {flow_id: index for index, flow_id in enumerate(piece)}
        rows = (await connection.execute(select(flows).where(flows.c.flow_id == any_(_array(piece))))).all()
        yield sorted(rows, key=lambda row: wanted[row.flow_id])


def _pieces(found: list[tuple[int, uuid.UUID, int]]) -> list[list[uuid.UUID]]:
    pieces: list[list[uuid.UUID]] = []
    size = 0
    for _, flow_id, bodies in found:
        if not pieces or size + bodies > _PIECE_BYTES or len(pieces[-1]) >= _PIECE_ROWS:
            pieces.append([])
            size = 0
        pieces[-1].append(flow_id)
        size += bodies
    return pieces


async def message_rows(connection: AsyncConnection, batches: list[int]) -> AsyncIterator[Sequence[Row[Any]]]:
    """WebSocket messages of the batches, in the order of their ids, a piece at a time."""
    after: uuid.UUID | None = None
    while True:
        query = select(websocket_messages).where(websocket_messages.c.batch_id.in_(batches))
        if after is not None:
            query = query.where(websocket_messages.c.message_id > after)
        query = query.order_by(websocket_messages.c.message_id).limit(_PIECE_ROWS)
        rows = (await connection.execute(query)).all()
        if not rows:
            return
        yield rows
        after = rows[-1].message_id


async def error_rows(connection: AsyncConnection, batches: list[int]) -> Sequence[Row[Any]]:
    query = select(errors).where(errors.c.batch_id.in_(batches)).order_by(errors.c.error_id)
    return (await connection.execute(query)).all()


async def auth_rows(connection: AsyncConnection, batches: list[int]) -> Sequence[Row[Any]]:
    query = select(auth_attempts).where(auth_attempts.c.batch_id.in_(batches)).order_by(auth_attempts.c.auth_id)
    return (await connection.execute(query)).all()


async def node_rows(connection: AsyncConnection) -> Sequence[Row[Any]]:
    """Nodes heard of in the last hour."""
    recent = nodes.c.seen_at > func.now() - func.make_interval(0, 0, 0, 0, 1)
    return (await connection.execute(select(nodes).where(recent).order_by(nodes.c.seen_at))).all()


async def integer_ids(connection: AsyncConnection, flow_ids: set[uuid.UUID]) -> dict[uuid.UUID, int]:
    if not flow_ids:
        return {}
    query = select(flows.c.flow_id, flows.c.id).where(flows.c.flow_id == any_(_array(sorted(flow_ids))))
    return {row.flow_id: row.id for row in await connection.execute(query)}


def _array(flow_ids: list[uuid.UUID]) -> BindParameter[list[uuid.UUID]]:
    """As one parameter: one each costs more to send than the rows to fetch."""
    return literal(flow_ids, ARRAY(Uuid))
