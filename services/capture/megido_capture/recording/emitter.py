"""Events into the journal: stamping, sequence numbers, and the size limit of a record."""

from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Literal, Protocol

import msgspec

from megido_shared import events, ids
from megido_shared.bus.topics import FLOWS
from megido_shared.events import AnyEvent, Body, BodyChunk, FlowCompleted

MAX_INLINE = 800_000
"""Bytes of bodies in one record. With its headers a record stays under 900 KB."""

SMALL_HEADS = 64 * 1024
"""What heads may take of a record without taking it from the bodies."""

CHUNK = 512 * 1024

type Side = Literal["request", "response"]


class JournalLike(Protocol):
    """What the emitter needs of `megido_shared.bus.local.Journal`."""

    @property
    def node(self) -> str: ...
    @property
    def epoch(self) -> bytes: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def drops(self) -> Counter[str]: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def cap_bytes(self) -> int: ...
    def figures(self) -> dict[str, int]: ...
    def next_seq(self) -> int: ...
    def append(self, topic: str, key: bytes, value: bytes, seq: int = 0) -> bool: ...


class Emitter:
    """Writes the events of one node. After a method returned, kill -9 loses nothing of what it wrote; an event
    that the journal could not take (full, disk error) is dropped and counted by the journal."""

    def __init__(self, journal: JournalLike, source_app: str) -> None:
        self.journal = journal
        self.source_app = source_app
        # Kept, because they never change and are read for each flow.
        self.node, self.epoch = journal.node, journal.epoch
        self.next_seq: Callable[[], int] = journal.next_seq
        """The number of an event that will be written."""

    def stamp(self, time_us: int) -> dict[str, Any]:
        """The fields of every event. For a record that is not terminal: `seq` is left at 0."""
        return {
            "event_id": ids.new_id(),
            "node": self.node,
            "epoch": self.epoch,
            "time_us": time_us,
            "source_app": self.source_app,
        }

    def terminal(self, time_us: int) -> dict[str, Any]:
        """The same with the node's next sequence number: the event must be written, or accounting has a hole."""
        stamp = self.stamp(time_us)
        stamp["seq"] = self.next_seq()
        return stamp

    def write(self, event: AnyEvent) -> bool:
        return self.append(event, events.encode(event))

    def append(self, event: AnyEvent, value: bytes) -> bool:
        """The same for an event that is encoded already."""
        if type(event) is FlowCompleted:  # nearly all are
            return self.journal.append(FLOWS.name, event.flow_id, value, event.seq)
        return self.journal.append(events.topic_of(event).name, events.key_of(event), value, event.seq)

    def chunk(self, flow_id: bytes, side: Side, index: int, data: bytes, time_us: int) -> bool:
        return self.write(BodyChunk(**self.stamp(time_us), flow_id=flow_id, side=side, index=index, data=data))

    def fit(
        self, flow_id: bytes, request: Body, response: Body, time_us: int, room: int = MAX_INLINE
    ) -> tuple[Body, Body]:
        """The bodies of one flow as they may travel in its record: large ones go ahead as `BodyChunk` records, so
        that at most `room` bytes stay in it."""
        if len(request.data) + len(response.data) <= room:
            return request, response
        larger_first = sorted((("request", request), ("response", response)), key=lambda item: -len(item[1].data))
        fitted = {"request": request, "response": response}
        inline = len(request.data) + len(response.data)
        for side, body in larger_first:
            if inline > room:
                inline -= len(body.data)
                fitted[side] = self._split(flow_id, "request" if side == "request" else "response", body, time_us)
        return fitted["request"], fitted["response"]

    def _split(self, flow_id: bytes, side: Side, body: Body, time_us: int) -> Body:
        data = memoryview(body.data)
        count = 0
        for start in range(0, len(data), CHUNK):
            self.chunk(flow_id, side, count, bytes(data[start : start + CHUNK]), time_us)
            count += 1
        digest = body.sha256 or sha256(data).digest()
        return msgspec.structs.replace(body, data=b"", sha256=digest, chunks=count)
