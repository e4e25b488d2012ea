"""From records to packed rows: decoding, hashing, compressing, packing. Runs in a thread, a batch ahead."""

import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, NamedTuple

import msgspec

from megido_ingest import errorrows, flows, rows, views
from megido_ingest.bodycache import BodyCache, CacheVersion
from megido_ingest.packing import EPOCH_2000_US
from megido_shared import events, ids, redrive
from megido_shared.bus.base import Batch, Gap, Record, Stream
from megido_shared.db import codecs
from megido_shared.db.tables import UNCOUNTED

type Place = tuple[Stream, int]
"""A record by stream and offset."""

_YEAR_1_US = -62_135_596_800_000_000
_YEAR_10000_US = 253_402_300_800_000_000
_YEAR_10000_ID = (_YEAR_10000_US // 1000).to_bytes(6)
"""How the first UUIDv7 of that year begins."""
_LONGEST_US = 366 * 86_400_000_000
"""Of a flow. Durations are summed in counters: a few of those that an integer may hold would overflow them, and
then no later batch could be stored."""
_NO_EPOCH = bytes(16)
_DAY_ZERO = date(2000, 1, 1)
_IDENTITY: dict[type, tuple[str, ...]] = {
    **dict.fromkeys(events.RANK, ("flow_id",)),
    events.BodyChunk: ("flow_id",),
    events.WebSocketMessage: ("message_id", "flow_id"),
    events.ErrorRaised: ("error_id",),
    events.AuthAttempted: ("auth_id",),
}
_BAD = (ValueError, struct.error, OverflowError, msgspec.DecodeError, msgspec.ValidationError, RecursionError)
"""What decoding and packing raise on bytes that no row can hold, or that are nested too deeply to be read."""
_LONGEST_TYPE = 100


@dataclass(slots=True)
class End:
    """Where a stream goes on after a batch."""

    next_offset: int
    last_event_id: bytes = b""
    rewound: bool = False


class RuleHits(NamedTuple):
    """The payload rules that were applied to a flow that has ended."""

    flow_id: bytes
    rules: frozenset[int]
    time_us: int


@dataclass(slots=True)
class Prepared:
    """A batch as the rows of `ingest`'s arguments, sorted by key."""

    batch: Batch
    cache_version: CacheVersion
    rejected: Mapping[Place, str] = field(default_factory=dict)
    generations: Mapping[Stream, int] = field(default_factory=dict)
    """The claims under which the records were read. A later claim of the same stream does not cover them."""
    ends: dict[Stream, End] = field(default_factory=dict)
    flows: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    auth: list[bytes] = field(default_factory=list)
    nodes: list[bytes] = field(default_factory=list)
    gaps: list[bytes] = field(default_factory=list)
    letters: list[bytes] = field(default_factory=list)
    redrives: list[bytes] = field(default_factory=list)
    """What becomes of dead letters that came again: none of them is a new one."""
    reasons: list[str] = field(default_factory=list)
    days: set[date] = field(default_factory=set)
    body_keys: list[tuple[int, bytes]] = field(default_factory=list)
    hits: list[RuleHits] = field(default_factory=list)
    newest_ms: int = 0
    """When the newest of the events was made, by its id."""


def prepare(
    batch: Batch, generations: Mapping[Stream, int], cache: BodyCache, rejected: Mapping[Place, str] | None = None
) -> Prepared:
    """Pure but for `cache`, which it only reads. `rejected` records become dead letters with the given reason,
    and so does each that cannot be decoded or packed; its neighbours are not affected."""
    out = Prepared(batch, cache.version, rejected or {}, generations)
    return _Preparation(out, cache).run()


class _Preparation:
    def __init__(self, out: Prepared, cache: BodyCache) -> None:
        self._cache = cache
        self._rejected = out.rejected
        self._out = out
        self._chunks = flows.Chunks()
        self._chunk_records: list[events.BodyChunk] = []
        self._flows: dict[bytes, tuple[tuple[int, bool], bytes, events.AnyFlow]] = {}
        self._bodies: dict[tuple[int, bytes], bytes] = {}
        self._seen_bodies: set[tuple[int, bytes]] = set()
        self._messages: dict[bytes, bytes] = {}
        self._errors: dict[bytes, bytes] = {}
        self._auth: dict[bytes, bytes] = {}
        self._nodes: dict[tuple[str, bytes], tuple[events.NodeStatus, int | None]] = {}
        self._days: set[int] = set()
        self._newest = b""
        self._last: tuple[Stream | None, End | None] = (None, None)
        self._handlers: dict[type, Callable[[Any], None]] = {
            **dict.fromkeys(events.RANK, self._flow),
            events.BodyChunk: self._chunk,
            events.WebSocketMessage: self._message,
            events.ErrorRaised: self._error,
            events.AuthAttempted: self._attempt,
            events.NodeStatus: self._status,
        }

    def run(self) -> Prepared:
        records = self._out.batch.records
        decoded = [(record, self._decode(record)) for record in records]
        for record, event in decoded:
            if event is not None:
                self._guarded(record, event)
        for gap in self._out.batch.gaps:
            self._gap(gap)
        return self._finish()

    def _decode(self, record: Record) -> events.AnyEvent | None:
        end = self._end(record.stream, record.next_offset)
        end.last_event_id = b""
        if self._rejected and (reason := self._rejected.get((record.stream, record.offset))):
            self._dead(record, reason)
            return None
        try:
            event = events.decode(record.value)
            _check(event)
        except _BAD as error:
            self._dead(record, _reason(error))
            return None
        end.last_event_id = event.event_id
        if isinstance(event, events.BodyChunk):
            self._chunks.add(event)
        return event

    def _guarded(self, record: Record, event: events.AnyEvent) -> None:
        try:
            self._take(event)
        except _BAD as error:
            self._dead(record, _reason(error))
            return
        self._newest = max(self._newest, event.event_id)
        if record.key.startswith(redrive.PREFIX) and (again := redrive.parse(record.key)):
            self._redriven(record, again, "")

    def _take(self, event: events.AnyEvent) -> None:
        handler = self._handlers.get(type(event))
        if handler is None:
            raise ValueError(f"{type(event).__name__} does not belong on a topic that is stored")
        handler(event)

    def _chunk(self, event: events.BodyChunk) -> None:
        if not 0 <= event.index < 1 << 31:
            raise ValueError(f"a chunk's index is {event.index}")
        self._chunk_records.append(event)

    def _flow(self, event: events.AnyFlow) -> None:
        # Equal rank: a node's own record (seq > 0) outranks one made in its place, as in the database.
        order = (events.RANK[type(event)], event.seq > 0)
        known = self._flows.get(event.flow_id)
        if known is not None and known[0] >= order:
            return
        _check_flow(event)
        packed = flows.pack_flow(event, self._chunks, self._body)
        self._flows[event.flow_id] = (order, packed, event)
        self._days.add(flows.day_number(event.flow_id))
        if isinstance(event, events.FlowFailed):
            self._errors[event.flow_id] = errorrows.flow_error(event)
        else:
            self._errors.pop(event.flow_id, None)

    def _body(self, day: int, data: bytes) -> bytes:
        key = flows.sha256(data)
        place = (day, key)
        if place not in self._seen_bodies:
            self._seen_bodies.add(place)
            if place not in self._cache:
                self._bodies[place] = flows.pack_body(day, key, data)
        return key

    def _message(self, event: events.WebSocketMessage) -> None:
        if event.message_id in self._messages:
            return
        closing = event.message_type == "CLOSE"
        self._messages[event.message_id] = rows.MESSAGE.pack(
            event.message_id, event.posted_id, views.key(event.node), event.epoch, event.seq, event.event_id,
            event.flow_id, views.key(event.connection_id), views.plain(event.url), event.direction, event.message_type,
            codecs.pack(event.payload), max(event.size, len(event.payload)), event.truncated, event.sequence,
            event.close_code if closing else None, views.plain(event.close_reason) if closing else None,
            views.key(event.client.ip), views.key(event.source_app), event.time_us - EPOCH_2000_US,
        )  # fmt: skip
        self._days.add(flows.day_number(event.message_id))

    def _error(self, event: events.ErrorRaised) -> None:
        if event.error_id not in self._errors:
            self._errors[event.error_id] = errorrows.own_error(event)
            self._days.add(flows.day_number(event.error_id))

    def _attempt(self, event: events.AuthAttempted) -> None:
        if event.auth_id in self._auth:
            return
        self._auth[event.auth_id] = rows.AUTH.pack(
            event.auth_id, event.posted_id, views.key(event.node), event.epoch, event.seq, event.event_id,
            views.plain(event.username), event.success, views.plain(errorrows.auth_reason(event)),
            views.key(event.client.ip), event.time_us - EPOCH_2000_US,
        )  # fmt: skip
        if not event.success:
            self._errors[event.auth_id] = errorrows.auth_error(event)
        self._days.add(flows.day_number(event.auth_id))

    def _status(self, event: events.NodeStatus) -> None:
        _pack_status(event, None)  # fails here, with its record at hand, or not at all
        started = event.time_us if event.state == "started" else None
        key = (event.node, event.epoch)
        if key in self._nodes:
            other, known = self._nodes[key]
            started = max((s for s in (started, known) if s is not None), default=None)
            event = max(other, event, key=lambda status: status.time_us)
        self._nodes[key] = (event, started)

    def _gap(self, gap: Gap) -> None:
        end = self._end(gap.stream, gap.next_offset)
        if gap.kind == "rewound":
            end.rewound = True
        stream = gap.stream
        kind: str = gap.kind
        count = gap.count
        if not count and kind != "rewound":
            kind, count = f"{kind}{UNCOUNTED}", 1  # a sum would not show that it holds one whose records nobody knows
        self._out.gaps.append(
            rows.GAP.pack(
                stream.source_id, stream.topic, stream.partition, gap.next_offset, kind, count, _epoch_of(stream)
            )
        )

    def _end(self, stream: Stream, next_offset: int) -> End:
        last, end = self._last
        if last is not stream:  # records of a stream come together, and hashing one is slow
            end = self._out.ends.get(stream)
        if end is None:
            end = self._out.ends[stream] = End(next_offset)
        elif next_offset > end.next_offset:
            end.next_offset = next_offset
            end.last_event_id = b""
        self._last = (stream, end)
        return end

    def _dead(self, record: Record, reason: str) -> None:
        if again := redrive.parse(record.key):
            self._redriven(record, again, reason)
            return
        stream = record.stream
        kind, node, epoch, seq, counted = _salvage(record.value)
        self._out.reasons.append(f"{stream.topic}/{stream.partition}/{record.offset}: {reason}")
        self._out.letters.append(
            rows.LETTER.pack(
                stream.source_id, stream.topic, stream.partition, record.offset, views.plain(kind), views.plain(reason),
                record.key, record.value, views.key(node), epoch or _epoch_of(stream), seq, counted,
            )
        )  # fmt: skip

    def _redriven(self, record: Record, again: redrive.Redrive, reason: str) -> None:
        """Under the place of the dead letter, which tells the same node and epoch as when it was counted."""
        attempt, stream, offset = again
        kind, node, epoch, seq, counted = _salvage(record.value)
        if reason:
            self._out.reasons.append(f"{stream.topic}/{stream.partition}/{offset}, attempt {attempt}: {reason}")
        self._out.redrives.append(
            rows.REDRIVE.pack(
                stream.source_id, stream.topic, stream.partition, offset, attempt, not reason, views.plain(kind),
                views.plain(reason), record.key, record.value, views.key(node), epoch or _epoch_of(stream), seq,
                counted,
            )
        )  # fmt: skip

    def _finish(self) -> Prepared:
        out = self._out
        whole = self._assembled_here()
        out.flows = [row for _, (_, row, _) in sorted(self._flows.items())]
        out.bodies = [row for _, row in sorted(self._bodies.items())]
        out.body_keys = list(self._bodies)
        parked = {
            (chunk.flow_id, int(chunk.side == "response"), chunk.index): chunk.data
            for chunk in reversed(self._chunk_records)
        }
        # Those of a whole body are sent too, in case an earlier delivery had left it incomplete; nearly always
        # the database drops them, so they are not compressed.
        out.chunks = [
            rows.CHUNK.pack(*place, codecs.plain(data) if place[:2] in whole else codecs.pack(data))
            for place, data in sorted(parked.items())
        ]
        self._days.update(flows.day_number(flow_id) for flow_id, _, _ in parked)
        out.messages = [row for _, row in sorted(self._messages.items())]
        out.errors = [row for _, row in sorted(self._errors.items())]
        out.auth = [row for _, row in sorted(self._auth.items())]
        out.nodes = [_pack_status(status, started) for _, (status, started) in sorted(self._nodes.items())]
        out.hits = [
            RuleHits(flow_id, frozenset(event.rules), event.time_us)
            for flow_id, (_, _, event) in sorted(self._flows.items())
            if event.rules and not isinstance(event, events.FlowStarted)
        ]
        out.newest_ms = ids.time_ms(self._newest)
        out.days = {_DAY_ZERO + timedelta(days=day) for day in self._days}
        return out

    def _assembled_here(self) -> set[flows.Side]:
        """Sides of completed flows whose chunks were all in this batch."""
        return {
            (flow_id, side)
            for flow_id, (_, _, event) in self._flows.items()
            if isinstance(event, events.FlowCompleted)
            for side, count in flows.awaited(event).items()
            if self._chunks.complete((flow_id, side), count)
        }


def _check(event: events.AnyEvent) -> None:
    """What the types do not say. Ids decide on the partition, so they must be what they claim to be."""
    if len(event.event_id) != 16 or len(event.epoch) != 16:
        raise ValueError("event_id and epoch must be 16 bytes")
    if not _YEAR_1_US <= event.time_us < _YEAR_10000_US:
        raise ValueError("time_us lies outside of the years 1 to 9999")  # Postgres could hold it, readers could not
    for name in _IDENTITY.get(type(event), ()):
        identity = getattr(event, name)
        if len(identity) != 16 or identity[6] >> 4 != 7:
            raise ValueError(f"{name} is not a UUIDv7 of 16 bytes")
        if identity >= _YEAR_10000_ID:
            raise ValueError(f"{name} lies beyond the year 9999, where no partition can be")


def _check_flow(event: events.AnyFlow) -> None:
    took = event.timing.response_us
    if took > _LONGEST_US:
        raise ValueError(f"a flow cannot take {took} µs")
    if event.time_us + max(0, took) >= _YEAR_10000_US:
        raise ValueError("the flow ends beyond the year 9999")
    for message in (event.request, event.response):
        if message is not None and (message.body.size < 0 or message.body.chunks < 0):
            raise ValueError("a body has a negative size or number of chunks")


def _pack_status(event: events.NodeStatus, started_us: int | None) -> bytes:
    return rows.NODE.pack(
        views.key(event.node), event.epoch, views.plain(event.service), event.state, views.plain(event.version),
        views.plain(event.listen), event.config_version, event.config_stale, _json(event.pinned),
        _json(event.counters), event.captured, event.time_us - EPOCH_2000_US,
        None if started_us is None else started_us - EPOCH_2000_US, views.key(event.source_app),
        views.plain(event.config_error),
    )  # fmt: skip


def _json(value: Mapping[str, str] | Mapping[str, int]) -> str:
    """Without NUL, which jsonb refuses."""
    cleaned = {views.plain(k): views.plain(v) if isinstance(v, str) else v for k, v in value.items()}
    return msgspec.json.encode(cleaned).decode()


def _epoch_of(stream: Stream) -> bytes:
    """The producer's epoch where the stream tells (the local bus), for records that say nothing themselves."""
    try:
        return uuid.UUID(hex=stream.source_id).bytes
    except ValueError:
        return _NO_EPOCH


def _salvage(raw: bytes) -> tuple[str, str, bytes, int, bool]:
    """(type, node, epoch, seq, counted) of a record that cannot be stored, as far as it can be read.

    `counted`: it ended something that accounting counts, or nobody can tell that it did not.
    """
    try:
        found = msgspec.msgpack.decode(raw)
    except _BAD:
        return "", "", b"", 0, True
    if not isinstance(found, dict):
        return "", "", b"", 0, True
    node, epoch, seq = found.get("node"), found.get("epoch"), found.get("seq", 0)
    known_seq = seq if isinstance(seq, int) and 0 <= seq < 1 << 63 else 0
    return (
        str(found.get("type", ""))[:_LONGEST_TYPE],
        node if isinstance(node, str) else "",
        epoch if isinstance(epoch, bytes) and len(epoch) == 16 else b"",
        known_seq,
        known_seq > 0 or "epoch" not in found,
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
