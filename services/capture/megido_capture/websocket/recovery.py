"""Connections that an earlier life of this node left open get the CLOSE that it could not write."""

from collections.abc import Iterator

import msgspec

from megido_capture.recording.emitter import Emitter
from megido_capture.recording.recovery import ReadBack, decode, earlier
from megido_shared import ids
from megido_shared.bus.topics import WEBSOCKET
from megido_shared.events import WebSocketMessage

KILLED = "the proxy was killed"
ABNORMAL = 1006

_SMALL = 64 * 1024
"""Bytes up to which a connection's last record is kept as it is."""

_TYPE = b"\xacmessage_type"
_CLOSE = b"\xa5CLOSE"


def left_open(journal: ReadBack) -> Iterator[WebSocketMessage]:
    """The last message of each connection that has messages in the journal and no CLOSE. A connection of which nothing
    but the handshake was recorded is not found, nor one whose last record cannot be read. Reads the journal once and
    keeps of a connection that is open its last record without a large payload, so a full journal costs time, not
    memory; meant for a thread."""
    last: dict[bytes, bytes | WebSocketMessage | None] = {}
    for record in earlier(journal, WEBSOCKET):
        if _is_close(record.value):
            last.pop(record.key, None)
        else:
            last[record.key] = record.value if len(record.value) <= _SMALL else _message(record.value)
    for kept in last.values():
        message = _message(kept) if isinstance(kept, bytes) else kept
        if message is not None:
            yield message


def _message(value: bytes) -> WebSocketMessage | None:
    """Without its payload."""
    found = decode(value)
    return msgspec.structs.replace(found, payload=b"") if isinstance(found, WebSocketMessage) else None


def write_close(emitter: Emitter, last: WebSocketMessage) -> None:
    """Appends the CLOSE that follows `last`."""
    stamp = emitter.terminal(last.time_us) | {"source_app": last.source_app}
    ended = msgspec.structs.replace(
        last,
        **stamp,
        message_id=ids.new_id(),
        direction="RECEIVE",
        message_type="CLOSE",
        payload=b"",
        size=0,
        truncated=False,
        sequence=last.sequence + 1,
        close_code=ABNORMAL,
        close_reason=KILLED,
    )
    emitter.write(ended)


def _is_close(value: bytes) -> bool:
    """Without decoding it: the name stands before the payload, which might hold it too, and no text holds its mark."""
    at = value.find(_TYPE) + len(_TYPE)
    return value[at : at + len(_CLOSE)] == _CLOSE
