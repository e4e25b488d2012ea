"""One database session of ingest: its time limits, its shard of the counters, its types, the feed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import date
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from megido_ingest import failpoints, packing, rows
from megido_ingest.failures import unavailable
from megido_shared.db.connect import connect

LOCK_TIMEOUT_MS = 2_000
IDLE_IN_TRANSACTION_MS = 10_000
STATEMENT_TIMEOUT_MS = 30_000
DEADLINE_S = 60.0
"""Of a whole transaction: longer than any server-side limit, for a network that swallows packets."""

FEED_CHANNEL = "megido_feed"
_SHARDS = 1024

# A batch's rows pass through memory; past work_mem they would go through temporary files.
_SETTINGS = f"""
SET lock_timeout = {LOCK_TIMEOUT_MS};
SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS};
SET jit = off;
SET work_mem = '64MB';
"""
# The server runs the whole message whatever becomes of us, so the lock that all workers share is never held by one
# that was stopped.
_COMMIT_TO_FEED = """
SELECT pg_advisory_xact_lock(hashtext('megido.feed'));
INSERT INTO feed (batch_id, committed_at) VALUES ({batch}, clock_timestamp());
SELECT pg_notify('megido_feed', currval(pg_get_serial_sequence('feed', 'seq'))::text);
{besides}
COMMIT
"""


class Session:
    """Opened on first use and again after a failure. Not for two tasks at once."""

    def __init__(self, url: str, application_name: str = "megido ingest", *, shard: bool = True) -> None:
        self._url = url
        self._application_name = application_name
        self._connection: psycopg.AsyncConnection[TupleRow] | None = None
        self.oids: dict[str, int] = {}
        self.shard = 0
        self._wants_shard = shard

    async def connection(self) -> psycopg.AsyncConnection[TupleRow]:
        """Raises psycopg.Error when the server is away."""
        if self._connection is None or self._connection.closed:
            self._connection = await self._open()
        return self._connection

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                await connection.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[psycopg.AsyncConnection[TupleRow]]:
        """BEGIN on entry. The body commits; whatever it raises rolls back, and a connection that is of no use any
        more is closed. Raises psycopg.Error; Unavailable past `DEADLINE_S`."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                connection = await self.connection()
                try:
                    await connection.execute("BEGIN")
                    failpoints.reach("after_begin")
                    yield connection
                except psycopg.Error:
                    await self._roll_back(connection)
                    raise
        except TimeoutError as error:
            await self._drop()
            raise unavailable(error) from error
        except BaseException:
            if self._connection is not None and self._connection.info.transaction_status.name not in ("IDLE",):
                await self._drop()
            raise

    async def ensure_partitions(self, days: set[date]) -> None:
        connection = await self.connection()
        for day in sorted(days):
            await connection.execute("SELECT ensure_partitions(%s, %s)", [day, day])

    async def _open(self) -> psycopg.AsyncConnection[TupleRow]:
        connection = await connect(
            self._url, application_name=self._application_name, statement_timeout_ms=STATEMENT_TIMEOUT_MS
        )
        try:
            await connection.execute(_SETTINGS)
            packing.register(connection)
            found = await (
                await connection.execute(
                    "SELECT typname, oid FROM pg_type WHERE typname = ANY (%s) AND pg_type_is_visible(oid)",
                    [[kind.name for kind in rows.ALL]],
                )
            ).fetchall()
            self.oids = dict(found)
            if self._wants_shard:
                self.shard = await _take_shard(connection)
                await connection.execute("SELECT set_config('megido.shard', %s, false)", [str(self.shard)])  # rollups
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _roll_back(self, connection: psycopg.AsyncConnection[TupleRow]) -> None:
        try:
            await connection.execute("ROLLBACK")
        except psycopg.Error:
            await self._drop()

    async def _drop(self) -> None:
        await self.close()


def commit_message(batch: int, besides: str = "") -> str:
    """Feed lock, feed row, NOTIFY and COMMIT: one message."""
    return _COMMIT_TO_FEED.format(batch=int(batch), besides=besides)


async def commit(
    connection: psycopg.AsyncConnection[TupleRow], batch: int, *, changed: bool, besides: str = ""
) -> None:
    """Ends the transaction; a batch that changed rows gets its place in the feed. `besides`: statements for the same
    message, of which each ends with a semicolon."""
    if changed:
        await connection.execute(commit_message(batch, besides))
    else:
        await connection.execute(f"{besides} COMMIT")


async def fetch_one(cursor: psycopg.AsyncCursor[TupleRow]) -> tuple[Any, ...]:
    row = await cursor.fetchone()
    assert row is not None
    return row


async def _take_shard(connection: psycopg.AsyncConnection[TupleRow]) -> int:
    """The lowest shard of the counters that no live session holds; held until the session ends."""
    for shard in range(_SHARDS):
        cursor = await connection.execute("SELECT pg_try_advisory_lock(hashtext('megido.shard'), %s)", [shard])
        if (await fetch_one(cursor))[0]:
            return shard
    return _SHARDS  # shared by whoever is left: right all the same, only slower
