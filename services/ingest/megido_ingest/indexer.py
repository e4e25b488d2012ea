"""The feed's readers that fill `flow_lines` and `flow_text`, in which URLs, headers and bodies are searched. Off the
insert path.

Exactly once: rows and cursor move in one transaction, under the cursor's lock. What is not indexed yet is known by the
feed, so searches in URLs look there themselves; searches in bodies say how far the index is.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy import Row, Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_ingest.background import pause, serve_again
from megido_ingest.jsonlogs import feed
from megido_ingest.session import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_MS
from megido_shared.bodytext import body_text
from megido_shared.db.connect import connect, create_engine
from megido_shared.db.read import StoredBody, StoredFlow, complete
from megido_shared.db.tables import LINE_INDEX, TEXT_INDEX, feed_cursors
from megido_shared.db.tables import feed as feed_table

_log = logging.getLogger(__name__)

_LINES_AT_ONCE = 16
_POLL_S = 0.5
_PAUSE_S = 2.0
BUSY_SHARE = 0.25
"""Of the time that it works while flows arrive: the rest is left to those who store them. What waits is done at full
speed when nothing arrives."""
_BUSY_S = 2.0
"""A batch younger than this means that flows arrive."""

_STATEMENT_TIMEOUT_MS = 300_000
"""Longer than ingest's: sorting trigrams into an index takes what it takes, and what never ends in time halts it."""
_IDLE_IN_TRANSACTION_MS = 60_000
"""Longer too: bodies are decoded between two statements."""

_UPSERT = """
INSERT INTO flow_text (flow_id, headers, request_body, response_body, lossy)
SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::boolean[])
ON CONFLICT (flow_id) DO UPDATE SET headers = excluded.headers, request_body = excluded.request_body,
    response_body = excluded.response_body, lossy = excluded.lossy
"""
_LINES = """
INSERT INTO flow_lines (flow_id, line)
SELECT flow_id, url || E'\\n' || user_agent FROM flows WHERE batch_id = ANY (%s) ORDER BY flow_id
ON CONFLICT (flow_id) DO UPDATE SET line = excluded.line WHERE flow_lines.line <> excluded.line
"""
_CLEAN = """
SELECT gin_clean_pending_list(c.oid)
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent IN ('flow_text_content'::regclass, 'flow_lines_line'::regclass) AND pg_relation_size(c.oid) > 16384
"""


class IndexMetrics:
    """How far the text index is. Set where the background work runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.batches = Gauge(
            "megido_ingest_text_index_lag_batches", "Batches in the feed that are not indexed yet.", registry=registry
        )
        self.seconds = Gauge(
            "megido_ingest_text_index_lag_seconds",
            "Age of the oldest batch that is not indexed yet; 0 when there is none.",
            registry=registry,
        )

    def clear(self) -> None:
        self.batches.set(0)
        self.seconds.set(0)


class TextIndexer:
    """Runs on the leader; two of them at once only wait for each other. Waits for a database that is away."""

    def __init__(self, database_url: str, metrics: IndexMetrics) -> None:
        self._url = database_url
        self._metrics = metrics
        self._cleaned = True

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. Never raises for what a database does."""
        await serve_again(self._serve, stop, what="the text index", every_s=_PAUSE_S, log=_log)
        self._metrics.clear()

    async def _serve(self, stop: asyncio.Event) -> None:
        engine = bounded_engine(self._url)
        session = await connect(
            self._url, application_name="megido text index feed", statement_timeout_ms=STATEMENT_TIMEOUT_MS
        )
        try:
            await session.execute("LISTEN megido_feed")
            while not stop.is_set():
                while not stop.is_set() and await self.lines(engine):
                    pass
                begun = time.monotonic()
                worked = await self.texts(engine)
                took = time.monotonic() - begun
                if not worked:
                    await self._tidy(engine)
                    async for _ in session.notifies(timeout=_POLL_S, stop_after=1):
                        pass
                elif await self._show(engine) < _BUSY_S:
                    await self._rest(engine, took * (1 / BUSY_SHARE - 1), stop)
        finally:
            await session.close()
            await engine.dispose()

    async def _rest(self, engine: AsyncEngine, seconds: float, stop: asyncio.Event) -> None:
        """Leaves the machine to others, but for what costs little."""
        until = time.monotonic() + seconds
        while not stop.is_set() and (left := until - time.monotonic()) > 0:
            await pause(stop, min(left, _POLL_S))
            await self.lines(engine)

    async def lines(self, engine: AsyncEngine, batches_at_once: int = _LINES_AT_ONCE) -> bool:
        """Takes the next batches' lines in and moves the cursor, in one transaction. False when nothing was new."""
        async with engine.begin() as connection:
            batches = await feed.batches_after(
                connection, await _locked_position(connection, LINE_INDEX), batches_at_once
            )
            if not batches:
                return False
            await connection.exec_driver_sql(_LINES, ([batch for _, batch in batches],))
            await feed.advance(connection, LINE_INDEX, batches[-1][0])
        self._cleaned = False
        return True

    async def texts(self, engine: AsyncEngine) -> bool:
        """The same of the next batch's headers and bodies."""
        async with engine.begin() as connection:
            batches = await feed.batches_after(connection, await _locked_position(connection, TEXT_INDEX), 1)
            if not batches:
                return False
            async for rows in feed.flow_rows(connection, [batch for _, batch in batches]):
                texts = await asyncio.to_thread(_texts, await _readable(connection, rows))
                await connection.exec_driver_sql(_UPSERT, texts)
            await feed.advance(connection, TEXT_INDEX, batches[-1][0])
        self._cleaned = False
        return True

    async def _tidy(self, engine: AsyncEngine) -> None:
        """Everything is indexed: what is pending in the indexes is sorted in, so that no search has to read it."""
        self._metrics.clear()
        if not self._cleaned:
            async with engine.begin() as connection:
                await connection.exec_driver_sql(_CLEAN)
            self._cleaned = True

    async def _show(self, engine: AsyncEngine) -> float:
        """Sets the metrics; answers how many seconds ago the last batch came."""
        async with engine.connect() as connection:
            behind, oldest, newest = (await connection.execute(LAG)).one()
        self._metrics.batches.set(behind)
        self._metrics.seconds.set(oldest or 0)
        return _BUSY_S if newest is None else float(newest)


def bounded_engine(url: str) -> AsyncEngine:
    """One session, in which a leader that was frozen holds the cursors' locks for a minute at most."""
    return create_engine(
        url, application_name="megido text index", pool_size=1, max_overflow=0, lock_timeout_ms=LOCK_TIMEOUT_MS,
        statement_timeout_ms=_STATEMENT_TIMEOUT_MS, idle_in_transaction_ms=_IDLE_IN_TRANSACTION_MS,
    )  # fmt: skip


def _lag() -> Select[Any]:
    def age(moment: Any) -> Any:
        return func.extract("epoch", func.clock_timestamp() - moment)

    position = select(func.coalesce(func.max(feed_cursors.c.seq), 0)).where(feed_cursors.c.reader == TEXT_INDEX)
    at = feed_table.c.committed_at
    return select(func.count(), age(func.min(at)), age(func.max(at))).where(
        feed_table.c.seq > position.scalar_subquery()
    )


LAG = _lag()
"""(batches that are not indexed, seconds since the oldest of them, seconds since the newest), null where none is."""


async def _locked_position(connection: AsyncConnection, reader: str) -> int:
    await connection.execute(insert(feed_cursors).values(reader=reader, seq=0).on_conflict_do_nothing())
    query = select(feed_cursors.c.seq).where(feed_cursors.c.reader == reader).with_for_update()
    return int(await connection.scalar(query) or 0)


async def _readable(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[StoredFlow]:
    """The flows of rows; one that cannot be decoded is named in the log and left out, its neighbours are not."""
    try:
        return await complete(connection, rows)
    except DBAPIError:
        raise
    except ValueError:
        if len(rows) == 1:
            _log.error("flow %s cannot be decoded and is not searched in", rows[0].id)
            return []
        middle = len(rows) // 2
        return [*await _readable(connection, rows[:middle]), *await _readable(connection, rows[middle:])]


def _texts(flows: Sequence[StoredFlow]) -> tuple[list[Any], ...]:
    """The columns of `_UPSERT`."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    for flow in sorted(flows, key=lambda flow: flow.flow_id):
        request, request_lossy = _text(flow.request_body, flow.request_headers)
        response, response_lossy = _text(flow.response_body, flow.response_headers)
        row = (
            flow.flow_id,
            header_lines(flow.request_headers) + header_lines(flow.response_headers),
            request,
            response,
            request_lossy or response_lossy,
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return columns


def _text(body: StoredBody, headers: list[tuple[bytes, bytes]]) -> tuple[str | None, bool]:
    found = body_text(body.data, headers, truncated=body.truncated)
    return found.text or None, found.lossy


def header_lines(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """`name: value`, a line each; bytes that are not UTF-8 as Latin-1, NUL left out."""
    raw = b"".join(b"%b: %b\n" % pair for pair in headers)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.replace("\0", "")
