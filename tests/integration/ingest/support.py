"""Batches without a bus, and what the database holds in a form that can be compared."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from megido_ingest.prepare import prepare
from megido_ingest.store import Store, Stored
from megido_shared import events
from megido_shared.bus.base import Batch, Gap, Record, Stream
from megido_shared.db.connect import conninfo

SOURCE = "0f" * 16


def stream(topic: str = "megido.flows", partition: int = 0, source: str = SOURCE) -> Stream:
    return Stream(source, topic, partition)


class Log:
    """One stream as a list: gives records their offsets, hands them out again as often as asked."""

    def __init__(self, where: Stream | None = None) -> None:
        self.stream = where or stream()
        self.records: list[Record] = []

    def add(self, *items: events.AnyEvent | bytes) -> list[Record]:
        first = len(self.records)
        for item in items:
            value = item if isinstance(item, bytes) else events.encode(item)
            offset = len(self.records)
            self.records.append(Record(self.stream, offset, offset + 1, b"key", value))
        return self.records[first:]


async def store_records(store: Store, records: Sequence[Record], gaps: Sequence[Gap] = ()) -> Stored:
    return await store.store(prepare(Batch(records, gaps), dict(store.generations), store.cache))


async def ingest(url: str, batches: Iterable[Sequence[Record]], *, fresh_cache: bool = True) -> list[Stored]:
    """Stores the batches in order, as one worker that claims their streams."""
    store = Store(url)
    try:
        done = []
        for records in batches:
            await store.claim({record.stream for record in records if record.stream not in store.generations})
            done.append(await store_records(store, records))
            if fresh_cache:
                store.cache.clear()
        return done
    finally:
        await store.close()


def batches(records: Sequence[Record], size: int) -> Iterable[Sequence[Record]]:
    return itertools.batched(records, size, strict=False)


def rows(url: str, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        return connection.execute(query, values).fetchall()


_CONTENTS = {
    # Integer ids, batches and positions depend on the order of arrival and are not contents; prev_rank neither.
    "flows": "SELECT (to_jsonb(f) - 'id' - 'batch_id' - 'prev_rank')::text FROM flows f ORDER BY flow_id",
    "bodies": "SELECT b.day::text, encode(b.sha256, 'hex'), b.size, encode(b.data, 'hex') FROM bodies b"
    " WHERE EXISTS (SELECT FROM flows f WHERE b.sha256 IN (f.request_body_key, f.response_body_key)) ORDER BY 1, 2",
    "websocket_messages": "SELECT (to_jsonb(m) - 'id' - 'batch_id')::text FROM websocket_messages m"
    " ORDER BY message_id",
    "errors": "SELECT (to_jsonb(e) - 'id' - 'batch_id')::text FROM errors e ORDER BY error_id",
    "auth_attempts": "SELECT (to_jsonb(a) - 'id' - 'batch_id')::text FROM auth_attempts a ORDER BY auth_id",
    "nodes": "SELECT to_jsonb(n)::text FROM nodes n ORDER BY node, epoch",
    "counters": "SELECT name, label, sum(value)::bigint FROM counters GROUP BY 1, 2 HAVING sum(value) <> 0"
    " ORDER BY 1, 2",
    "accounting": "SELECT node, epoch::text, kind, sum(value)::bigint, max(max_seq) FROM accounting"
    " GROUP BY 1, 2, 3 HAVING sum(value) <> 0 ORDER BY 1, 2, 3",
    "dead_letters": "SELECT source_id, topic, partition, \"offset\", event_type, reason, encode(value, 'hex')"
    " FROM dead_letters ORDER BY 1, 2, 3, 4",
}


def contents(url: str, *, leave_out: Sequence[str] = ()) -> dict[str, list[tuple[Any, ...]]]:
    """All that is stored, without what an order of arrival may change."""
    return {name: rows(url, query) for name, query in _CONTENTS.items() if name not in leave_out}


def counters(url: str) -> dict[tuple[str, str], int]:
    return {(name, label): value for name, label, value in contents(url)["counters"]}


def empty(url: str) -> None:
    """Everything but the schema."""
    tables = [name for name in _CONTENTS if name != "flows"] + [
        "flows",
        "ingest_offsets",
        "feed",
        "outbox",
        "body_chunks",
    ]
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        for table in tables:
            connection.execute(f"DELETE FROM {table}")  # a hundred partitions: faster than TRUNCATE
