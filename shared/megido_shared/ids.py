"""Identity: UUIDv7 (RFC 9562) as 16 bytes, never going backwards within a process.

Bytes, not `uuid.UUID`: ids are made on the proxy's hot path (0.2 µs instead of 1.5) and are keys on the bus.
"""

import uuid
from datetime import UTC, datetime, timedelta

import uuid_utils

_last = b""


def new_id() -> bytes:
    """A new UUIDv7. Later calls return greater bytes, also when the wall clock jumps back."""
    global _last  # noqa: PLW0603 - one sequence a process is the point
    made = uuid_utils.uuid7().bytes
    if made <= _last:
        made = (int.from_bytes(_last) + 1).to_bytes(16)
    _last = made
    return made


def to_uuid(raw: bytes) -> uuid.UUID:
    return uuid.UUID(bytes=raw)


def to_text(raw: bytes) -> str:
    """The canonical form with dashes."""
    return str(uuid.UUID(bytes=raw))


def parse(text: str) -> bytes:
    """Bytes of a UUID written with or without dashes. ValueError when it is none."""
    return uuid.UUID(text).bytes


def time_ms(raw: bytes) -> int:
    """Milliseconds since the epoch that a UUIDv7 carries."""
    return int.from_bytes(raw[:6])


def day_of(raw: bytes) -> datetime:
    """Midnight UTC of the day that the id was minted on: the partition that its row lives in."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms(raw))
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def floor_id(moment: datetime) -> uuid.UUID:
    """The smallest UUID of its millisecond: a lower bound (inclusive) for ids minted from then on."""
    ms = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    return uuid.UUID(int=ms << 80)


def connection_id(flow_id: bytes) -> str:
    """The name of a WebSocket connection: `ws_` and the hex of the flow that opened it."""
    return "ws_" + flow_id.hex()
