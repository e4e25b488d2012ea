"""What the previous life of this node left open becomes `FlowInterrupted`, with all bytes that it had recorded."""

from collections.abc import Iterator
from hashlib import sha256
from itertools import takewhile
from typing import Any, Protocol

import msgspec

from megido_capture.recording.emitter import Emitter
from megido_shared import events
from megido_shared.bus.base import Record
from megido_shared.bus.topics import FLOWS, Topic
from megido_shared.events import Body, BodyChunk, FlowInterrupted, FlowStarted

_TERMINAL = (b"FlowCompleted", b"FlowFailed", b"FlowInterrupted")


class ReadBack(Protocol):
    def began_at(self, topic: str) -> int: ...
    def read_back(self, topic: str) -> Iterator[Record]: ...


def interrupted(journal: ReadBack, cap: int) -> Iterator[dict[str, Any]]:
    """The fields of a `FlowInterrupted` (all but the stamp) for each flow that was announced and never ended.

    Only what earlier lives wrote counts, by its place: ids would not tell after the clock was set back. Reads the
    journal once and keeps only what is open, so a full journal costs time, not memory; meant for a thread.
    """
    open_flows: dict[bytes, FlowStarted] = {}
    seen: dict[bytes, tuple[_Seen, _Seen]] = {}  # a body's first pieces come before its flow is announced
    for record in earlier(journal, FLOWS):
        kind = _kind(record.value)
        if kind == b"FlowStarted":
            started = decode(record.value)
            if isinstance(started, FlowStarted):
                open_flows[record.key] = started
        elif kind == b"BodyChunk":
            chunk = decode(record.value)
            if isinstance(chunk, BodyChunk):
                if record.key not in seen:
                    seen[record.key] = (_Seen(), _Seen())
                seen[record.key][chunk.side == "response"].add(chunk)
        elif kind in _TERMINAL:
            open_flows.pop(record.key, None)
            seen.pop(record.key, None)
    for key, started in open_flows.items():
        yield _fields(started, *(seen.get(key) or (_Seen(), _Seen())), cap)


def earlier(journal: ReadBack, topic: Topic) -> Iterator[Record]:
    """What earlier lives of this node wrote to a topic."""
    end = journal.began_at(topic.name)
    return takewhile(lambda record: record.offset < end, journal.read_back(topic.name))


def write(emitter: Emitter, fields: dict[str, Any]) -> None:
    emitter.write(FlowInterrupted(**emitter.terminal(fields["started_us"]), **_without(fields, "started_us")))


class _Seen:
    """The chunks of one side, in order."""

    def __init__(self) -> None:
        self.count = 0
        self.size = 0
        self.hash = sha256()

    def add(self, chunk: BodyChunk) -> None:
        if chunk.index == self.count:
            self.count += 1
            self.size += len(chunk.data)
            self.hash.update(chunk.data)


def _fields(started: FlowStarted, request: _Seen, response: _Seen, cap: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "started_us": started.time_us,
        "flow_id": started.flow_id,
        "request": _with_body(started.request, request, cap),
        "response": None if started.response is None else _with_body(started.response, response, cap),
        "client": started.client,
        "server": started.server,
        "timing": started.timing,
        "rules": started.rules,
    }
    return fields


def _with_body[M: (events.Request, events.Response)](message: M, seen: _Seen, cap: int) -> M:
    """At the cap nothing more was stored, and how much passed is not known any more."""
    if not seen.count:
        return message
    body = Body(size=seen.size, sha256=seen.hash.digest(), chunks=seen.count, truncated=seen.size >= cap)
    return msgspec.structs.replace(message, body=body)


def _kind(value: bytes) -> bytes:
    """The tag of an encoded event without decoding it: msgspec writes it first."""
    at = value.find(b"\xa4type", 0, 16)
    if at < 0:
        return b""
    length = value[at + 5] & 0x1F
    return value[at + 6 : at + 6 + length]


def decode(value: bytes) -> object:
    """The event, or None for one that cannot be read: it must not keep the others from their end."""
    try:
        return events.decode(value)
    except msgspec.DecodeError:
        return None


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}
