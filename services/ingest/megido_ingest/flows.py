"""A flow event as a packed row, and its bodies. Pure; the hot part of preparation, so written out."""

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec import Raw

from megido_ingest import rows, views
from megido_ingest.packing import EPOCH_2000_DAYS, EPOCH_2000_US, bytea_header, header, null, text_header
from megido_shared import events
from megido_shared.db import codecs, tables
from megido_shared.db.detail import detail_of
from megido_shared.events import NO_HEADERS, AnyFlow, Body

type Side = tuple[bytes, int]
"""(flow_id, side): 0 request, 1 response."""

REQUEST = 0
RESPONSE = 1
_DAY_MS = 86_400_000


def day_number(event_id: bytes) -> int:
    """Days since 2000-01-01 (Postgres' date) of the day that an id was minted on."""
    return int.from_bytes(event_id[:6]) // _DAY_MS - EPOCH_2000_DAYS


class BodySink(Protocol):
    """Where the bodies of a batch go."""

    def __call__(self, day: int, data: bytes) -> bytes:
        """Takes the stored part of a body once a day and content; returns its key (sha256)."""


@dataclass(frozen=True, slots=True)
class SideColumns:
    """What a row says of one body."""

    size: int
    state: int
    key: bytes | None = None
    sha256: bytes | None = None
    chunks: int | None = None


_NONE = SideColumns(0, tables.BODY_NONE)


def stored_body(day: int, body: Body, data: bytes, sink: BodySink) -> SideColumns:
    """Columns of a body whose stored part is `data`, all of what will ever come."""
    whole_hash = body.sha256 or None
    if not data:
        return SideColumns(body.size, tables.BODY_NOT_STORED, None, whole_hash) if body.size else _NONE
    key = sink(day, data)
    if body.truncated or body.size > len(data):
        return SideColumns(max(body.size, len(data)), tables.BODY_TRUNCATED, key, whole_hash)
    return SideColumns(len(data), tables.BODY_STORED, key, key)


class Chunks:
    """The chunks of a batch, by flow and side."""

    def __init__(self) -> None:
        self.pieces: dict[Side, dict[int, bytes]] = {}

    def add(self, chunk: events.BodyChunk) -> None:
        side = RESPONSE if chunk.side == "response" else REQUEST
        self.pieces.setdefault((chunk.flow_id, side), {}).setdefault(chunk.index, chunk.data)

    def whole(self, side: Side, count: int) -> bytes | None:
        """The body, if all of its chunks are in this batch."""
        if not self.complete(side, count):
            return None
        found = self.pieces[side]
        return b"".join(found[index] for index in range(count))

    def complete(self, side: Side, count: int) -> bool:
        found = self.pieces.get(side, {})
        return len(found) >= count and all(index in found for index in range(count))


def _side(flow: AnyFlow, side: int, body: Body, chunks: Chunks, sink: BodySink) -> SideColumns:
    day = day_number(flow.flow_id)
    if not body.chunks:
        return stored_body(day, body, body.data, sink)
    # Nothing can follow a completed flow, so its chunks need not be parked. (A lower rank may still be raised.)
    data = chunks.whole((flow.flow_id, side), body.chunks) if isinstance(flow, events.FlowCompleted) else None
    if data is None:
        return SideColumns(body.size, tables.BODY_INCOMPLETE, None, body.sha256 or None, body.chunks)
    return stored_body(day, body, data, sink)


def awaited(flow: AnyFlow) -> Mapping[int, int]:
    """How many chunks each side of a flow has, sides without any left out."""
    counts = {REQUEST: flow.request.body.chunks}
    if flow.response is not None:
        counts[RESPONSE] = flow.response.body.chunks
    return {side: count for side, count in counts.items() if count}


# The fields of rows.FLOW up to `is_replay`: each 8 bytes of header, then the value.
_FIXED = rows.FLOW.fields[:14]
_HEADERS = tuple(
    header(kind, {"uuid": 16, "bigint": 8, "timestamptz": 8, "integer": 4, "smallint": 2, "boolean": 1}[kind])
    for _, kind in _FIXED
)
_FORMATS = {"uuid": "16s", "bigint": "q", "timestamptz": "q", "integer": "i", "smallint": "h", "boolean": "?"}
_fixed = struct.Struct(">4s" + "".join("8s" + _FORMATS[kind] for _, kind in _FIXED)).pack
_COUNT = rows.FLOW.count
_HF, _HE, _HV, _HID, _HR, _HSEQ, _HAT, _HSP, _HP, _HRS, _HS1, _HS2, _HC, _HIR = _HEADERS

_NULL_TEXT = null("text")
_NULL_BYTES = null("bytea")
_NULL_INT = null("integer")
_NULL_BIG = null("bigint")
_NULL_SMALL = null("smallint")
_NULL_UUID = null("uuid")
_UUID = header("uuid", 16)
_KEY = header("bytea", 32)
_small = struct.Struct(">8sh").pack
_int = struct.Struct(">8si").pack
_big = struct.Struct(">8sq").pack
_SMALL = header("smallint", 2)
_INT = header("integer", 4)
_BIG = header("bigint", 8)
_EMPTY_TEXT = header("text", 0)
_NO_RESPONSE = (
    _NULL_SMALL + _NULL_BYTES + _NULL_TEXT + _NULL_BYTES + _NULL_BYTES + _NULL_BIG + _NULL_BYTES + _NULL_BYTES
    + _NULL_INT + _NULL_TEXT
)  # fmt: skip


def _text(value: str) -> bytes:
    raw = value.encode()
    return text_header(len(raw)) + raw


def _bytes(value: bytes) -> bytes:
    return bytea_header(len(value)) + value


def _slice(value: Raw) -> bytes:
    """A header slice as stored, null when there is nothing in it."""
    return _NULL_BYTES if value == NO_HEADERS else _bytes(codecs.pack(bytes(value)))


def _hash(value: bytes | None) -> bytes:
    return _NULL_BYTES if value is None else _bytes(value)


def _uuid(value: bytes) -> bytes:
    if not value:
        return _NULL_UUID
    if len(value) != 16:
        raise ValueError("an id is not 16 bytes long")
    return _UUID + value


class Remembered:
    """Values that repeat from flow to flow (hosts, addresses, methods), made once."""

    def __init__(self, make: Callable[[str], bytes], limit: int = 10_000) -> None:
        self._make = make
        self._limit = limit
        self._made: dict[str, bytes] = {}

    def __call__(self, value: str) -> bytes:
        found = self._made.get(value)
        if found is None:
            if len(self._made) >= self._limit:
                self._made.clear()
            found = self._made[value] = self._make(value)
        return found


_key_text = Remembered(lambda value: _text(views.key(value)))
_PROTOCOLS = {scheme: _text(scheme.upper()) for scheme in ("http", "https", "ws", "wss")}


def pack_flow(flow: AnyFlow, chunks: Chunks, sink: BodySink) -> bytes:
    """One row of rows.FLOW. Raises ValueError, struct.error or msgspec's errors on what no row can hold."""
    request, response = flow.request, flow.response
    req = _side(flow, REQUEST, request.body, chunks, sink)
    res = _side(flow, RESPONSE, response.body, chunks, sink) if response is not None else _NONE
    failure = flow.failure if isinstance(flow, events.FlowFailed) else None
    cached = isinstance(flow, events.FlowCompleted) and flow.cached
    timing = flow.timing.response_us
    return b"".join((
        _fixed(
            _COUNT, _HF, flow.flow_id, _HE, flow.epoch, _HV, flow.event_id, _HID, flow.posted_id,
            _HR, events.RANK[type(flow)], _HSEQ, flow.seq, _HAT, flow.time_us - EPOCH_2000_US,
            _HSP, flow.client.port, _HP, request.port, _HRS, req.size, _HS1, req.state, _HS2, res.state,
            _HC, cached, _HIR, flow.is_replay,
        ),
        _key_text(flow.node), _key_text(flow.source_app), _key_text(flow.client.ip),
        *_request(flow, req),
        *(_response(response, res) if response is not None else (_NO_RESPONSE,)),
        _NULL_BIG if timing < 0 else _big(_BIG, timing),
        _NULL_TEXT if failure is None else _text(failure.error_type),
        _error_message(flow, failure),
        _NULL_TEXT if failure is None else _text(views.plain(failure.stack_trace)),
        _uuid(flow.original_flow_id), _uuid(flow.replay_job_id),
        _NULL_INT if flow.replay_position < 0 else _int(_INT, flow.replay_position),
        _bytes(detail_of(flow, *lossy_texts(flow))),
    ))  # fmt: skip


def _error_message(flow: AnyFlow, failure: events.Failure | None) -> bytes:
    if failure is not None:
        return _text(views.plain(failure.message))
    said = flow.error_message if isinstance(flow, events.FlowCompleted) else ""
    return _text(views.plain(said)) if said else _NULL_TEXT


def _request(flow: AnyFlow, body: SideColumns) -> tuple[bytes, ...]:
    request = flow.request
    agent = views.header(views.headers_of(request.headers), b"user-agent")
    return (
        _key_text(views.percent(request.method)),
        _key_text(request.scheme),
        _PROTOCOLS.get(request.scheme) or _key_text(request.scheme.upper()),
        _key_text(request.host),
        _text(views.url_of(request)),
        _bytes(request.target),
        _bytes(request.authority),
        _key_text(request.http_version),
        _key_text(agent),
        _bytes(codecs.pack(bytes(request.headers))),
        _slice(request.trailers),
        _hash(body.key),
        _hash(body.sha256),
        _NULL_INT if body.chunks is None else _int(_INT, body.chunks),
    )


def _response(response: events.Response, body: SideColumns) -> tuple[bytes, ...]:
    kind = views.content_type(views.headers_of(response.headers))
    return (
        _small(_SMALL, response.status),
        _bytes(response.reason),
        _key_text(response.http_version),
        _bytes(codecs.pack(bytes(response.headers))),
        _slice(response.trailers),
        _big(_BIG, body.size),
        _hash(body.key),
        _hash(body.sha256),
        _NULL_INT if body.chunks is None else _int(_INT, body.chunks),
        _NULL_TEXT if kind is None else _key_text(kind),
    )


def lossy_texts(flow: AnyFlow) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The originals that no other column has, and the names of all text columns that are not exact."""
    request = flow.request
    lossy: list[str] = []
    original: dict[str, bytes] = {}
    if (b"\0" in request.target or not request.target.isascii()) and (
        views.percent(request.target).encode() != request.target
    ):
        lossy.append("url")
    for name, raw in (("method", request.method), ("host", request.host.encode())):
        if (len(raw) > views.KEY_BYTES or b"\0" in raw or not raw.isascii()) and (
            views.key(views.percent(raw)).encode() != raw
        ):
            lossy.append(name)
            original[name] = raw
    return original, tuple(lossy)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
