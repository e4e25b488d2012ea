"""Connections that an earlier life of this node left open get the CLOSE that it could not write."""

from collections.abc import Iterator
from itertools import takewhile

import msgspec

from megido_capture.emitter import Emitter
from megido_capture.recovery import ReadBack
from megido_shared import events, ids
from megido_shared.bus.base import Record
from megido_shared.bus.topics import WEBSOCKET
from megido_shared.events import WebSocketMessage

KILLED = "the proxy was killed"
ABNORMAL = 1006

_TYPE = b"\xacmessage_type"
_CLOSE = b"\xa5CLOSE"


def left_open(journal: ReadBack) -> Iterator[WebSocketMessage]:
    """The last message of each connection that has messages in the journal and no CLOSE. A connection of which nothing
    but the handshake was recorded is not found. Reads the journal twice and keeps an offset a connection that is
    open, so a full journal costs time, not memory; meant for a thread."""
    last: dict[bytes, int] = {}
    for record in _earlier(journal):
        if _is_close(record.value):
            last.pop(record.key, None)
        else:
            last[record.key] = record.offset
    wanted = set(last.values())
    for record in _earlier(journal) if wanted else ():
        if record.offset in wanted:
            message = events.decode(record.value)
            if isinstance(message, WebSocketMessage):
                yield message


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


def _earlier(journal: ReadBack) -> Iterator[Record]:
    end = journal.began_at(WEBSOCKET.name)
    return takewhile(lambda record: record.offset < end, journal.read_back(WEBSOCKET.name))


def _is_close(value: bytes) -> bool:
    """Without decoding it: the name stands before the payload, which might hold it too, and no text holds its mark."""
    at = value.find(_TYPE) + len(_TYPE)
    return value[at : at + len(_CLOSE)] == _CLOSE
