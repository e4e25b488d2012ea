"""Bodies that travelled as chunks: put together inside the transaction that brought the last piece.

Also right when a chunk comes late: the flow is then in the database as incomplete, and is completed.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from megido_ingest.flows import sha256
from megido_ingest.session import fetch_one
from megido_shared import ids
from megido_shared.db import codecs, tables

_FLOW = {
    0: "SELECT request_chunks, request_size, request_sha256, request_body_key, request_body_state"
    " FROM flows WHERE flow_id = %s",
    1: "SELECT response_chunks, response_size, response_sha256, response_body_key, response_body_state"
    " FROM flows WHERE flow_id = %s",
}
_PIECES = "SELECT index, data FROM body_chunks WHERE flow_id = %s AND side = %s ORDER BY index"
_STORE = "SELECT store_assembled(%s, %s, %s::smallint, %s::smallint, %s, %s, %s, %s, %s, %s)"

type _Connection = psycopg.AsyncConnection[TupleRow]


@dataclass(frozen=True, slots=True)
class _Assembled:
    state: int
    key: bytes | None
    sha256: bytes | None
    size: int
    data: bytes
    done: bool


async def assemble(connection: _Connection, batch: int, flow_ids: Iterable[UUID]) -> int:
    """Assembles what the flows await; returns how many sides changed. One body in memory at a time."""
    changed = 0
    for flow_id in flow_ids:
        for side, query in _FLOW.items():
            awaited, size, whole_hash, key, state = await fetch_one(await connection.execute(query, [flow_id]))
            if not awaited:
                continue
            pieces = await _contiguous(connection, flow_id, side, awaited)
            made = await asyncio.to_thread(_join, pieces, awaited, size or 0, whole_hash)
            if not made.done and (made.key, made.state) == (key, state):
                continue
            await _store(connection, batch, flow_id, side, made)
            changed += 1
    return changed


async def assemble_interrupted(connection: _Connection, batch: int, flow_ids: Iterable[UUID]) -> None:
    """What was parked of flows that nobody will finish: the first part, as far as it is without a gap."""
    for flow_id in flow_ids:
        for side in _FLOW:
            pieces = await _contiguous(connection, flow_id, side, None)
            if pieces:
                data = await asyncio.to_thread(_unpacked, pieces)
                made = _Assembled(
                    tables.BODY_TRUNCATED, sha256(data), None, len(data), codecs.pack(data), done=False
                )  # fmt: skip
                await _store(connection, batch, flow_id, side, made)


async def _contiguous(connection: _Connection, flow_id: UUID, side: int, awaited: int | None) -> list[bytes]:
    pieces: list[bytes] = []
    async with connection.cursor() as cursor:
        await cursor.execute(_PIECES, [flow_id, side], binary=True)
        async for index, data in cursor:
            if index != len(pieces) or index == awaited:
                break
            pieces.append(bytes(data))
    return pieces


def _unpacked(pieces: list[bytes]) -> bytes:
    return b"".join(codecs.unpack(piece) for piece in pieces)


def _join(pieces: list[bytes], awaited: int, size: int, whole_hash: bytes | None) -> _Assembled:
    data = _unpacked(pieces)
    done = len(pieces) == awaited
    key = sha256(data) if data else None
    if not done:
        state = tables.BODY_INCOMPLETE
    elif size > len(data):
        state = tables.BODY_TRUNCATED
    elif whole_hash is not None and key is not None and whole_hash != key:
        state = tables.BODY_INCOMPLETE
    else:
        state = tables.BODY_STORED
    whole = key if state == tables.BODY_STORED else None
    return _Assembled(state, key, whole, len(data), codecs.pack(data) if data else b"", done)


async def _store(connection: _Connection, batch: int, flow_id: UUID, side: int, made: _Assembled) -> None:
    values: list[Any] = [
        batch, flow_id, side, made.state, ids.day_of(flow_id.bytes).date(), made.key, made.sha256, made.size,
        made.data, made.done,
    ]  # fmt: skip
    await connection.execute(_STORE, values)
