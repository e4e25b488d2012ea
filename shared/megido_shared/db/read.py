"""Loading stored flows whole: one flow for the API and the replayer, many for the JSON logs.

Lists and filters have their own narrow queries where they are asked; nothing here scans.
"""

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from sqlalchemy import ARRAY, BindParameter, LargeBinary, Row, Select, and_, any_, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared import events, ids
from megido_shared.db import codecs, tables
from megido_shared.db.detail import Detail, decode_detail

type BodyKey = tuple[date, bytes]
"""(day, sha256 of the stored part)."""


@dataclass(frozen=True, slots=True)
class StoredBody:
    """`data` is the stored part; `size` and `sha256` (None when unknown) are of the body as it crossed the wire.
    `state` is one of `tables.BODY_*`."""

    state: int
    data: bytes
    size: int
    sha256: bytes | None

    @property
    def whole(self) -> bool:
        return self.state in (tables.BODY_NONE, tables.BODY_STORED)

    @property
    def truncated(self) -> bool:
        return not self.whole


@dataclass(frozen=True, slots=True)
class StoredFlow:
    """A row of `flows` with its headers decoded and its bodies loaded. `row` has every column by name."""

    row: Row[Any]
    detail: Detail
    request_headers: list[tuple[bytes, bytes]]
    request_body: StoredBody
    response_headers: list[tuple[bytes, bytes]]
    response_body: StoredBody

    @property
    def id(self) -> int:
        return int(self.row.id)

    @property
    def flow_id(self) -> uuid.UUID:
        found: uuid.UUID = self.row.flow_id
        return found


def parse_reference(text: str) -> int | uuid.UUID | None:
    """An integer id or a flow_id as a person writes it; None when it is neither."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def flow_query(reference: int | uuid.UUID) -> Select[Any]:
    """All columns of one flow, by integer id or by flow_id."""
    column = tables.flows.c.id if isinstance(reference, int) else tables.flows.c.flow_id
    return select(tables.flows).where(column == reference).limit(1)


async def load_flow(connection: AsyncConnection, reference: int | uuid.UUID) -> StoredFlow | None:
    """The flow with both bodies, of an open flow as far as they have come; None when it is not stored (yet)."""
    row = (await connection.execute(flow_query(reference))).first()
    if row is None:
        return None
    [flow] = await complete(connection, [row])
    return await _with_what_came(connection, flow) if row.rank == events.Rank.STARTED else flow


async def _with_what_came(connection: AsyncConnection, flow: StoredFlow) -> StoredFlow:
    """An open flow with the pieces of its bodies that are parked until it ends, up to the first that is missing."""
    table = tables.body_chunks
    query = select(table.c.side, table.c.index, table.c.data).where(table.c.flow_id == flow.flow_id)
    pieces: tuple[list[bytes], list[bytes]] = ([], [])
    for side, index, data in await connection.execute(query.order_by(table.c.side, table.c.index)):
        if index == len(pieces[side]):
            pieces[side].append(codecs.unpack(bytes(data)))
    sides = (flow.request_body, flow.response_body)
    request, response = (_so_far(body, b"".join(came)) for body, came in zip(sides, pieces, strict=True))
    return replace(flow, request_body=request, response_body=response)


def _so_far(body: StoredBody, data: bytes) -> StoredBody:
    if len(data) <= len(body.data):
        return body
    return StoredBody(tables.BODY_TRUNCATED, data, max(body.size, len(data)), None)


async def complete(connection: AsyncConnection, rows: Collection[Row[Any]]) -> list[StoredFlow]:
    """Rows of all columns of `flows`, in their order, with headers decoded and bodies fetched in one query."""
    bodies = await load_bodies(connection, (key for row in rows for key in _body_keys(row)))
    return [_stored(row, bodies) for row in rows]


async def load_bodies(connection: AsyncConnection, keys: Iterable[BodyKey]) -> dict[BodyKey, bytes]:
    """Stored parts by key. A key that is gone (retention) is left out."""
    wanted: dict[date, list[bytes]] = {}
    for day, key in sorted(set(keys)):
        wanted.setdefault(day, []).append(key)
    if not wanted:
        return {}
    table = tables.bodies
    # Days as constants, so that the planner prunes partitions; keys as arrays: a parameter each costs more to send than
    # the bodies to fetch.
    of_days = (and_(table.c.day == day, table.c.sha256 == any_(_array(one))) for day, one in wanted.items())
    query = select(table.c.day, table.c.sha256, table.c.data).where(or_(*of_days))
    rows = await connection.execute(query)
    return {(row.day, bytes(row.sha256)): codecs.unpack(bytes(row.data)) for row in rows}


def _array(keys: list[bytes]) -> BindParameter[list[bytes]]:
    return literal(keys, ARRAY(LargeBinary))


def _body_keys(row: Row[Any]) -> list[BodyKey]:
    day = ids.day_of(row.flow_id.bytes).date()
    keys = (row.request_body_key, row.response_body_key)
    return [(day, bytes(key)) for key in keys if key is not None]


def _stored(row: Row[Any], bodies: Mapping[BodyKey, bytes]) -> StoredFlow:
    return StoredFlow(
        row=row,
        detail=decode_detail(bytes(row.detail)),
        request_headers=_headers(row.request_headers),
        request_body=_body(row, "request", bodies),
        response_headers=_headers(row.response_headers),
        response_body=_body(row, "response", bodies),
    )


def _headers(stored: bytes | None) -> list[tuple[bytes, bytes]]:
    return [] if stored is None else events.unpack_headers(codecs.unpack(bytes(stored)))


def _body(row: Row[Any], side: str, bodies: Mapping[BodyKey, bytes]) -> StoredBody:
    columns = row._mapping
    key, state = columns[f"{side}_body_key"], columns[f"{side}_body_state"]
    data = b""
    if key is not None:
        found = bodies.get((ids.day_of(row.flow_id.bytes).date(), bytes(key)))
        if found is None:
            state = tables.BODY_INCOMPLETE
        else:
            data = found
    sha256 = columns[f"{side}_sha256"]
    return StoredBody(state, data, columns[f"{side}_size"] or 0, None if sha256 is None else bytes(sha256))
