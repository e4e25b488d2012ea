"""Posted events on their way to the bus: their identity, and the split that keeps a record below its limit.

Posted events have `seq` 0: a gapless count that survives rolled-back transactions would need a lock around
every post, and nothing is dropped between the outbox and ingest that a count could show.
"""

import hashlib
from collections.abc import Iterable
from typing import Literal, TypedDict

import msgspec
from sqlalchemy import Sequence, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared import events, ids
from megido_shared.db import outbox

NODE = "api"

_INLINE_BYTES = 700_000
_CHUNK_BYTES = 512 << 10
_MAX_CONNECTIONS = 10_000

type Side = Literal["request", "response"]


class Identity(TypedDict):
    """The fields of `events.Event` that say where an event was made."""

    event_id: bytes
    node: str
    epoch: bytes
    time_us: int


async def next_number(connection: AsyncConnection, sequence: Sequence) -> int:
    """The next integer id. Taken in a transaction that fails, it leaves a gap."""
    found: int = (await connection.execute(select(sequence.next_value()))).scalar_one()
    return found


class Origin:
    """This process as the origin of posted events."""

    def __init__(self) -> None:
        self._epoch = ids.new_id()
        self._connections: dict[str, bytes] = {}

    def identity(self, time_us: int) -> Identity:
        return {"event_id": ids.new_id(), "node": NODE, "epoch": self._epoch, "time_us": time_us}

    def connection(self, name: str) -> bytes | None:
        """The flow that a posted WebSocket connection was given here."""
        return self._connections.get(name)

    def remember_connection(self, name: str, flow_id: bytes) -> bytes:
        """Gives it one, unless another post was quicker; returns the one that it has."""
        while len(self._connections) >= _MAX_CONNECTIONS:
            del self._connections[next(iter(self._connections))]
        return self._connections.setdefault(name, flow_id)


async def publish(connection: AsyncConnection, posted: Iterable[events.AnyEvent]) -> None:
    """Puts the events into the outbox, within the caller's transaction."""
    await outbox.add(connection, [outbox.outgoing(event) for event in posted])


def split[F: (events.FlowStarted, events.FlowCompleted)](flow: F) -> list[events.AnyEvent]:
    """The flow with bodies that would make its record too large taken out, after their chunks."""
    found: list[events.AnyEvent] = []
    request, response = flow.request, flow.response
    inline = len(request.body.data) + (len(response.body.data) if response else 0)
    if response is not None and inline > _INLINE_BYTES:
        body, chunks = _chunked(flow, "response", response.body)
        inline -= len(response.body.data)
        response = msgspec.structs.replace(response, body=body)
        found += chunks
    if inline > _INLINE_BYTES:
        body, chunks = _chunked(flow, "request", request.body)
        request = msgspec.structs.replace(request, body=body)
        found += chunks
    return [*found, msgspec.structs.replace(flow, request=request, response=response)]


def _chunked(
    flow: events.FlowStarted | events.FlowCompleted, side: Side, body: events.Body
) -> tuple[events.Body, list[events.BodyChunk]]:
    pieces = [body.data[start : start + _CHUNK_BYTES] for start in range(0, len(body.data), _CHUNK_BYTES)]
    chunks = [
        events.BodyChunk(
            event_id=ids.new_id(),
            node=flow.node,
            epoch=flow.epoch,
            time_us=flow.time_us,
            flow_id=flow.flow_id,
            side=side,
            index=index,
            data=piece,
        )
        for index, piece in enumerate(pieces)
    ]
    sha256 = b"" if body.truncated else hashlib.sha256(body.data).digest()
    return msgspec.structs.replace(body, data=b"", sha256=sha256, chunks=len(chunks)), chunks
