"""A flow event as a packed row, and its bodies. Pure; the hot part of preparation, so written out."""

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class SideColumns(NamedTuple):
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
_HASH = header("bytea", 32)
_small = struct.Struct(">8sh").pack
_int = struct.Struct(">8si").pack
_big = struct.Struct(">8sq").pack
_SMALL = header("smallint", 2)
_INT = header("integer", 4)
_BIG = header("bigint", 8)
_NO_RESPONSE = (
    _NULL_SMALL + _NULL_BYTES + _NULL_TEXT + _NULL_BYTES + _NULL_BYTES + _NULL_BIG + _NULL_BYTES + _NULL_BYTES
    + _NULL_INT + _NULL_TEXT
)  # fmt: skip
_NO_HASHES = _NULL_BYTES + _NULL_BYTES + _NULL_INT
_NO_ERROR = _NULL_TEXT * 3
_NO_REPLAY = _NULL_UUID + _NULL_UUID + _NULL_INT


def _text(value: str) -> bytes:
    raw = value.encode()
    return text_header[len(raw)] + raw


def _bytes(value: bytes) -> bytes:
    return bytea_header[len(value)] + value


def _slice(value: Raw) -> bytes:
    """A header slice as stored, null when there is nothing in it."""
    return _NULL_BYTES if value is NO_HEADERS or value == NO_HEADERS else _bytes(codecs.pack_headers(bytes(value)))


def _hashes(body: SideColumns) -> bytes:
    """The columns body_key, sha256 and chunks."""
    _, _, key, sha, chunks = body
    if key is sha and chunks is None:
        if key is None:
            return _NO_HASHES
        field = _HASH + key
        return field + field + _NULL_INT
    return (
        (_NULL_BYTES if key is None else _HASH + key)
        + (_NULL_BYTES if sha is None else _bytes(sha))
        + (_NULL_INT if chunks is None else _int(_INT, chunks))
    )


def _uuid(value: bytes) -> bytes:
    if not value:
        return _NULL_UUID
    if len(value) != 16:
        raise ValueError("an id is not 16 bytes long")
    return _UUID + value


class Remembered[Key, Value](dict[Key, Value]):
    """What repeats from flow to flow (hosts, addresses, agents), made once. (A dict, so that finding one is no
    call.)"""

    def __init__(self, make: Callable[[Key], Value], limit: int = 10_000) -> None:
        super().__init__()
        self._make = make
        self._limit = limit

    def __missing__(self, key: Key) -> Value:
        if len(self) >= self._limit:
            self.clear()
        made = self[key] = self._make(key)
        return made


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a method, scheme, host and port always look like."""

    fields: bytes  # method, scheme, protocol, host
    url: bytes
    lossy: tuple[str, ...]
    original: dict[str, bytes]


def _make_origin(key: tuple[bytes, str, str, int]) -> _Origin:
    method, scheme, host, port = key
    shown = {"method": views.key(views.percent(method)), "host": views.key(host)}
    original = {name: raw for name, raw in (("method", method), ("host", host.encode())) if shown[name].encode() != raw}
    fields = (shown["method"], views.key(scheme), views.key(scheme.upper()), shown["host"])
    return _Origin(
        b"".join(map(_text, fields)), views.origin_of(scheme, host, port).encode(), tuple(original), original
    )


_origin = Remembered(_make_origin)
_peer = Remembered[tuple[str, str, str], bytes](lambda key: b"".join(_text(views.key(part)) for part in key))
_key_text = Remembered[str, bytes](lambda value: _text(views.key(value)))
_agent = Remembered[bytes, bytes](lambda value: _text(views.key(views.percent(value))))
_content_type = Remembered[bytes, bytes](
    lambda value: _text(kind) if (kind := views.key(views.media_type(value))) else _NULL_TEXT
)
_status = Remembered[tuple[int, bytes, str], bytes](
    lambda key: _small(_SMALL, key[0]) + _bytes(key[1]) + _text(views.key(key[2]))
)


def pack_flow(flow: AnyFlow, chunks: Chunks, sink: BodySink) -> bytes:
    """One row of rows.FLOW. Raises ValueError, struct.error or msgspec's errors on what no row can hold."""
    request, response, client, timing = flow.request, flow.response, flow.client, flow.timing.response_us
    req = _side(flow, REQUEST, request.body, chunks, sink)
    res = _NONE if response is None else _side(flow, RESPONSE, response.body, chunks, sink)
    origin = _origin[request.method, request.scheme, request.host, request.port]
    target = request.target
    view = target if target.isascii() and b"\0" not in target else views.percent(target).encode()
    url = origin.url + view
    lossy = origin.lossy if view == target else ("url", *origin.lossy)
    detail = detail_of(flow, origin.original, lossy) if lossy else detail_of(flow)
    return b"".join((
        _fixed(
            _COUNT, _HF, flow.flow_id, _HE, flow.epoch, _HV, flow.event_id, _HID, flow.posted_id,
            _HR, events.RANK[type(flow)], _HSEQ, flow.seq, _HAT, flow.time_us - EPOCH_2000_US,
            _HSP, client.port, _HP, request.port, _HRS, req.size, _HS1, req.state, _HS2, res.state,
            _HC, isinstance(flow, events.FlowCompleted) and flow.cached, _HIR, flow.is_replay,
        ),
        _peer[flow.node, flow.source_app, client.ip],
        origin.fields,
        text_header[len(url)], url,
        bytea_header[len(target)], target,
        _bytes(request.authority),
        _key_text[request.http_version],
        _agent[views.header(request.headers, b"user-agent")],
        _bytes(codecs.pack_headers(bytes(request.headers))),
        _slice(request.trailers),
        _hashes(req),
        _NO_RESPONSE if response is None else _response(response, res),
        _NULL_BIG if timing < 0 else _big(_BIG, timing),
        _error(flow),
        _replay(flow),
        bytea_header[len(detail)], detail,
    ))  # fmt: skip


def _response(response: events.Response, body: SideColumns) -> bytes:
    return b"".join((
        _status[response.status, response.reason, response.http_version],
        _bytes(codecs.pack_headers(bytes(response.headers))),
        _slice(response.trailers),
        _big(_BIG, body.size),
        _hashes(body),
        _content_type[views.header(response.headers, b"content-type")],
    ))  # fmt: skip


def _error(flow: AnyFlow) -> bytes:
    """The columns error_type, error_message and error_stack."""
    if isinstance(flow, events.FlowFailed):
        failure = flow.failure
        return b"".join(
            map(_text, (failure.error_type, views.plain(failure.message), views.plain(failure.stack_trace)))
        )
    if isinstance(flow, events.FlowCompleted) and flow.error_message:
        return _NULL_TEXT + _text(views.plain(flow.error_message)) + _NULL_TEXT
    return _NO_ERROR


def _replay(flow: AnyFlow) -> bytes:
    """The columns original_flow_id, replay_job_id and replay_position."""
    if not flow.original_flow_id and not flow.replay_job_id and flow.replay_position < 0:
        return _NO_REPLAY
    position = _NULL_INT if flow.replay_position < 0 else _int(_INT, flow.replay_position)
    return _uuid(flow.original_flow_id) + _uuid(flow.replay_job_id) + position


_body_row = struct.Struct(">4s8si8s32s8sq").pack
_BODY_COUNT = rows.BODY.count
_DATE = header("date", 4)


def pack_body(day: int, key: bytes, data: bytes) -> bytes:
    """One row of rows.BODY; `data` as it came."""
    packed = codecs.pack(data)
    return _body_row(_BODY_COUNT, _DATE, day, _HASH, key, _BIG, len(data)) + bytea_header[len(packed)] + packed


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
