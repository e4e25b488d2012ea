"""A dead letter on its way through ingest again: the key of its record says which one it is.

The record's value is the dead letter's, byte for byte, so nothing in it can say so, and the local bus keeps no headers.
The key names the place where the record was found first, not a row of a table: it means the same to a database that was
made anew. A flow's states may then arrive on another partition; they merge by rank in any order.
"""

from typing import NamedTuple

from megido_shared.bus.base import Stream

PREFIX = b"megido.redrive/"
"""No other key begins so: the rest are 16 bytes, `ws_…` and names of nodes."""


class Redrive(NamedTuple):
    """`attempt` counts from 1; `stream` and `offset` are the dead letter's."""

    attempt: int
    stream: Stream
    offset: int


def key(redrive: Redrive) -> bytes:
    stream = redrive.stream
    return PREFIX + (
        f"{redrive.attempt}/{redrive.offset}/{stream.partition}/{stream.topic}/{stream.source_id}".encode()
    )


def parse(raw: bytes) -> Redrive | None:
    """None for any key that `key` did not make."""
    if not raw.startswith(PREFIX) or b"\0" in raw:
        return None
    try:
        attempt, offset, partition, topic, source_id = raw[len(PREFIX) :].decode().split("/", 4)
        found = Redrive(int(attempt), Stream(source_id, topic, int(partition)), int(offset))
    except ValueError:
        return None
    fits = 0 < found.attempt < 1 << 31 and 0 <= found.offset < 1 << 63 and 0 <= found.stream.partition < 1 << 31
    return found if fits and key(found) == raw else None
