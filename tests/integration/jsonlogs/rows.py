"""Rows as ingest stores them, with sensible contents; each call is one batch with its place in the feed."""

import hashlib
import uuid
from datetime import UTC, datetime
from typing import Any

import psycopg
import sqlalchemy as sa

from megido_shared import events, ids
from megido_shared.db import codecs, tables
from megido_shared.db.connect import parse_url
from megido_shared.db.detail import Detail, _encoder

MOMENT = datetime(2026, 2, 13, 14, 30, 52, 123456, tzinfo=UTC)


class Store:
    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = sa.create_engine(parse_url(url), poolclass=sa.NullPool)
        self._partitions: set[str] = set()

    def flow(self, **changes: Any) -> uuid.UUID:
        """Stores one flow, or raises the one that has its `flow_id`, as a batch of its own."""
        return self.flows([changes])[0]

    def flows(self, many: list[dict[str, Any]]) -> list[uuid.UUID]:
        with self._engine.begin() as connection:
            batch = self._batch(connection)
            found = [self._put_flow(connection, batch, dict(changes)) for changes in many]
            self._feed(connection, batch)
        return found

    def row(self, table: sa.Table, **fields: Any) -> None:
        """Stores a row of another table with its `batch_id`."""
        with self._engine.begin() as connection:
            batch = self._batch(connection)
            connection.execute(table.insert().values(batch_id=batch, **fields))
            self._feed(connection, batch)

    def node(self, **fields: Any) -> None:
        known = {
            "node": "capture-0",
            "epoch": uuid.uuid4(),
            "service": "capture",
            "state": "running",
            "version": "0.1.0",
            "listen": "127.0.0.1:8080",
            "config_version": 0,
            "config_stale": False,
            "pinned": {},
            "counters": {},
            "captured": 0,
            "seen_at": datetime.now(UTC),
            "started_at": datetime.now(UTC),
        }
        with self._engine.begin() as connection:
            connection.execute(tables.nodes.insert().values(**(known | fields)))

    def cursors(self) -> dict[str, int]:
        with self._engine.begin() as connection:
            return {row.reader: row.seq for row in connection.execute(sa.select(tables.feed_cursors))}

    def last_seq(self) -> int:
        with self._engine.begin() as connection:
            return int(connection.scalar(sa.select(sa.func.max(tables.feed.c.seq))) or 0)

    def forget(self, reader: str, seq: int) -> None:
        """Sets a reader back, as a crash before its commit would."""
        with self._engine.begin() as connection:
            connection.execute(
                tables.feed_cursors.update().where(tables.feed_cursors.c.reader == reader).values(seq=seq)
            )

    def _batch(self, connection: sa.Connection) -> int:
        return int(connection.scalar(tables.batch_ids) or 0)

    def _feed(self, connection: sa.Connection, batch: int) -> None:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('megido.feed'))")
        seq = connection.scalar(
            tables.feed.insert().values(batch_id=batch, committed_at=sa.func.now()).returning(tables.feed.c.seq)
        )
        connection.exec_driver_sql(f"NOTIFY megido_feed, '{seq}'")

    def _put_flow(self, connection: sa.Connection, batch: int, changes: dict[str, Any]) -> uuid.UUID:
        flow_id = changes.pop("flow_id", None) or ids.to_uuid(ids.new_id())
        for side in ("request", "response"):
            if (body := changes.pop(f"{side}_body", None)) is not None:
                changes |= self._put_body(connection, flow_id, side, body)
            if (pairs := changes.pop(f"{side}_pairs", None)) is not None:
                changes[f"{side}_headers"] = codecs.pack(bytes(events.pack_headers(pairs)))
        existing = connection.execute(sa.select(tables.flows).where(tables.flows.c.flow_id == flow_id)).first()
        if existing is not None:
            connection.execute(
                tables.flows.update()
                .where(tables.flows.c.flow_id == flow_id)
                .values(batch_id=batch, prev_rank=existing.rank, **changes)
            )
            return flow_id
        fields = a_flow_row(flow_id) | {"id": connection.scalar(tables.flow_ids), "batch_id": batch} | changes
        connection.execute(tables.flows.insert().values(**fields))
        return flow_id

    def _put_body(self, connection: sa.Connection, flow_id: uuid.UUID, side: str, body: bytes) -> dict[str, Any]:
        key = hashlib.sha256(body).digest()
        connection.execute(
            sa.dialects.postgresql.insert(tables.bodies)
            .values(day=ids.day_of(flow_id.bytes).date(), sha256=key, size=len(body), data=codecs.pack(body))
            .on_conflict_do_nothing()
        )
        return {
            f"{side}_body_state": tables.BODY_STORED,
            f"{side}_body_key": key,
            f"{side}_sha256": key,
            f"{side}_size": len(body),
        }


def a_flow_row(flow_id: uuid.UUID) -> dict[str, Any]:
    """A completed GET; no bodies."""
    headers = codecs.pack(bytes(events.pack_headers([(b"Host", b"api.example.com"), (b"User-Agent", b"test/1.0")])))
    return {
        "flow_id": flow_id,
        "rank": events.Rank.COMPLETED,
        "prev_rank": 0,
        "node": "test-0",
        "epoch": uuid.UUID(int=1),
        "seq": 1,
        "event_id": ids.to_uuid(ids.new_id()),
        "started_at": MOMENT,
        "source_app": "browser",
        "source_ip": "192.168.1.100",
        "source_port": 50000,
        "method": "GET",
        "scheme": "https",
        "protocol": "HTTPS",
        "host": "api.example.com",
        "port": 443,
        "url": "https://api.example.com/users",
        "target": b"/users",
        "authority": b"",
        "http_version": "HTTP/1.1",
        "user_agent": "test/1.0",
        "request_headers": headers,
        "request_size": 0,
        "request_body_state": tables.BODY_NONE,
        "status": 200,
        "reason": b"OK",
        "response_http_version": "HTTP/1.1",
        "response_headers": codecs.pack(bytes(events.pack_headers([(b"Content-Type", b"application/json")]))),
        "response_size": 0,
        "response_body_state": tables.BODY_NONE,
        "response_time_us": 222_222,
        "cached": False,
        "is_replay": False,
        "detail": _encoder.encode(Detail()),
    }


def an_error(**changes: Any) -> dict[str, Any]:
    fields = {
        "error_id": ids.to_uuid(ids.new_id()),
        "id": 7,
        "node": "test-0",
        "epoch": uuid.UUID(int=1),
        "seq": 2,
        "event_id": ids.to_uuid(ids.new_id()),
        "flow_id": None,
        "error_type": "TIMEOUT",
        "error_message": "no answer within 30 s",
        "stack_trace": "",
        "url": "https://slow.example.com/",
        "source_ip": "192.168.1.100",
        "occurred_at": MOMENT,
    }
    return fields | changes


def an_attempt(**changes: Any) -> dict[str, Any]:
    fields = {
        "auth_id": ids.to_uuid(ids.new_id()),
        "id": 3,
        "node": "test-0",
        "epoch": uuid.UUID(int=1),
        "seq": 3,
        "event_id": ids.to_uuid(ids.new_id()),
        "username": "eve",
        "success": False,
        "failure_reason": "wrong password",
        "source_ip": "10.0.0.9",
        "occurred_at": MOMENT,
    }
    return fields | changes


def a_message(flow_id: uuid.UUID, **changes: Any) -> dict[str, Any]:
    payload = changes.pop("payload", b"hello")
    fields = {
        "message_id": ids.to_uuid(ids.new_id()),
        "id": 11,
        "node": "test-0",
        "epoch": uuid.UUID(int=1),
        "seq": 4,
        "event_id": ids.to_uuid(ids.new_id()),
        "flow_id": flow_id,
        "connection_id": ids.connection_id(flow_id.bytes),
        "url": "wss://chat.example.com/room",
        "direction": "SEND",
        "message_type": "TEXT",
        "payload": codecs.pack(payload),
        "payload_size": len(payload),
        "truncated": False,
        "sequence": 0,
        "source_ip": "192.168.1.100",
        "source_app": "browser",
        "occurred_at": MOMENT,
    }
    return fields | changes


def listeners(url: str) -> int:
    """Sessions of JSON log writers."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'megido json logs lock'"
        ).fetchone()
    return int(row[0]) if row else 0
