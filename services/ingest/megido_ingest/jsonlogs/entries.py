"""Stored rows as log entries: what a file holds and what it is called. Pure.

Every entry has `timestamp` (UTC), `type` and the fields of the founding document's example and models. A name
is made from our own times and identities; of the traffic it holds a method, a status and enumerated words only,
each reduced to a safe alphabet.
"""

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

from megido_ingest.jsonlogs.text import body_fields, header_fields
from megido_shared import events, ids
from megido_shared.db import codecs
from megido_shared.db.read import StoredBody, StoredFlow

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_STATES = {
    events.Rank.STARTED: "started",
    events.Rank.INTERRUPTED: "interrupted",
    events.Rank.FAILED: "failed",
    events.Rank.COMPLETED: "completed",
}

type Ids = Mapping[uuid.UUID, int]
"""Integer ids of flows that entries refer to. One that is not stored is left out."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: below the log root in `folder`, named `stem`.json. `owner_field` of `fields` holds the identity
    (hex) that owns the name; `superseded` is a name that an earlier state of the same flow may have had."""

    folder: str
    stem: str
    owner_field: str
    owner: str
    fields: dict[str, Any]
    superseded: str = ""


def flow_entries(flow: StoredFlow, originals: Ids) -> list[Entry]:
    """The request's entry and, once the flow has ended with a response head, the response's."""
    entries = [_request(flow, originals)]
    if flow.row.status is not None and flow.row.rank > events.Rank.STARTED:
        entries.append(_response(flow))
    return entries


def _request(flow: StoredFlow, originals: Ids) -> Entry:
    row = flow.row
    fields: dict[str, Any] = {
        "timestamp": stamp(row.started_at),
        "type": "request",
        "id": row.id,
        "flow_id": row.flow_id.hex,
        "url": row.url,
        "method": row.method,
        "protocol": row.protocol,
        "host": row.host,
        "port": row.port,
        "http_version": row.http_version,
        "source_ip": row.source_ip,
        "source_app": row.source_app,
        "user_agent": row.user_agent,
        **header_fields(flow.request_headers),
        **_body(flow.request_body, flow.request_headers),
        "request_size": row.request_size,
        "is_replay": row.is_replay,
        "original_request_id": originals.get(row.original_flow_id) if row.original_flow_id else None,
        "node": row.node,
        "state": _STATES.get(row.rank, str(row.rank)),
    }
    return Entry(
        "requests/" + _day(row.started_at), _name(row.started_at, row.method), "flow_id", row.flow_id.hex, fields
    )


def _response(flow: StoredFlow) -> Entry:
    row = flow.row
    ended = row.started_at + timedelta(microseconds=max(row.response_time_us or 0, 0))
    fields: dict[str, Any] = {
        "timestamp": stamp(ended),
        "type": "response",
        "id": row.id,
        "request_id": row.id,
        "flow_id": row.flow_id.hex,
        "url": row.url,
        "method": row.method,
        "status_code": row.status,
        "reason": (row.reason or b"").decode("latin-1"),
        "http_version": row.response_http_version,
        **header_fields(flow.response_headers),
        **_body(flow.response_body, flow.response_headers),
        "response_time": None if row.response_time_us is None else row.response_time_us / 1000,
        "response_size": row.response_size,
        "cached": row.cached,
        "error_message": row.error_message or flow.detail.error_message or None,
    }
    folder, stem = "responses/" + _day(ended), _name(ended, str(row.status))
    # An interrupted flow that completes after all gets another time: its first file gives way.
    first = ("responses/" + _day(row.started_at), _name(row.started_at, str(row.status)))
    raised = row.prev_rank > events.Rank.STARTED and first != (folder, stem)
    return Entry(folder, stem, "flow_id", row.flow_id.hex, fields, superseded="/".join(first) if raised else "")


def _body(body: StoredBody, headers: list[tuple[bytes, bytes]]) -> dict[str, object]:
    return body_fields(body.data, headers, size=body.size, sha256=body.sha256, truncated=body.truncated)


def websocket_folder(connection_id: str, flow_id: uuid.UUID) -> tuple[str, int | None]:
    """The connection's part of its folder's name and its start in epoch seconds; None for a posted connection,
    whose id is not made from a flow of ours, so that nothing but its first message tells when it started."""
    if connection_id == ids.connection_id(flow_id.bytes):
        return connection_id, ids.time_ms(flow_id.bytes) // 1000
    safe = _UNSAFE.sub("_", connection_id)[:64]
    if safe != connection_id:
        safe += "-" + hashlib.sha256(connection_id.encode()).hexdigest()[:8]
    return safe, None


def websocket_entry(row: Row[Any], folder: str) -> Entry:
    payload = codecs.unpack(bytes(row.payload))
    text = _payload_text(payload, row.message_type)
    fields: dict[str, Any] = {
        "timestamp": stamp(row.occurred_at),
        "type": "websocket",
        "id": row.id,
        "message_id": row.message_id.hex,
        "flow_id": row.flow_id.hex,
        "connection_id": row.connection_id,
        "url": row.url,
        "direction": row.direction,
        "message_type": row.message_type,
        "payload": payload.hex() if text is None else text,
        "payload_encoding": "hex" if text is None else "text",
        "payload_size": row.payload_size,
        "truncated": row.truncated,
        "sequence": row.sequence,
        "close_code": row.close_code,
        "close_reason": row.close_reason,
        "source_ip": row.source_ip,
        "source_app": row.source_app,
    }
    stem = _name(row.occurred_at, f"{_word(row.direction)}_{_word(row.message_type)}")
    return Entry("websockets/" + folder, stem, "message_id", row.message_id.hex, fields)


def _payload_text(payload: bytes, message_type: str) -> str | None:
    if message_type == "BINARY":
        return None
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def error_entry(row: Row[Any], flows: Ids) -> Entry:
    fields: dict[str, Any] = {
        "timestamp": stamp(row.occurred_at),
        "type": "error",
        "id": row.id,
        "error_id": row.error_id.hex,
        "error_type": row.error_type,
        "error_message": row.error_message,
        "stack_trace": row.stack_trace,
        "url": row.url,
        "source_ip": row.source_ip,
        "request_id": flows.get(row.flow_id) if row.flow_id else None,
        "flow_id": row.flow_id.hex if row.flow_id else None,
    }
    stem = _name(row.occurred_at, _word(row.error_type))
    return Entry("errors/" + _day(row.occurred_at), stem, "error_id", row.error_id.hex, fields)


def auth_entry(row: Row[Any]) -> Entry:
    fields: dict[str, Any] = {
        "timestamp": stamp(row.occurred_at),
        "type": "auth",
        "id": row.id,
        "auth_id": row.auth_id.hex,
        "username": row.username,
        "success": row.success,
        "failure_reason": row.failure_reason,
        "source_ip": row.source_ip,
    }
    stem = _name(row.occurred_at, "SUCCESS" if row.success else "FAILED")
    return Entry("auth/" + _day(row.occurred_at), stem, "auth_id", row.auth_id.hex, fields)


def stamp(moment: datetime) -> str:
    """The founding document's form: ISO 8601 with microseconds, UTC, without an offset."""
    return moment.isoformat(timespec="microseconds")[:26]


# Formatted by hand: strftime takes 9 µs a call, and a flow needs five.


def _day(moment: datetime) -> str:
    return f"{moment.year:04d}{moment.month:02d}{moment.day:02d}"


def _name(moment: datetime, word: str) -> str:
    return f"{moment.hour:02d}{moment.minute:02d}{moment.second:02d}_{moment.microsecond:06d}_{_word(word)}"


def _word(text: str) -> str:
    return _UNSAFE.sub("_", text)[:24] or "UNKNOWN"
