"""The exactly-once store: one transaction a batch, its offsets inside."""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import psycopg
from psycopg.rows import TupleRow

from megido_ingest import assembly, failpoints, failures, hits, rows
from megido_ingest.bodycache import BodyCache
from megido_ingest.limit import DEFAULT, DeadLetterLimit, TooManyDeadLetters
from megido_ingest.packing import Packed, RowType, array
from megido_ingest.prepare import Place, Prepared, prepare
from megido_ingest.session import Session, commit, fetch_one
from megido_shared.bus.base import Batch, Position, Record, Stream
from megido_shared.errors import Unavailable

_INGEST = (
    "SELECT * FROM ingest(%s::integer, %s::ingest_position[], %s::ingest_flow[], %s::ingest_body[],"
    " %s::ingest_chunk[], %s::ingest_message[], %s::ingest_error[], %s::ingest_auth[], %s::ingest_node[],"
    " %s::ingest_gap[], %s::ingest_dead_letter[])"
)
_SETTLE = "SELECT * FROM settle_redrives(%s::integer, %s::ingest_redrive[])"
_KNOWN = (
    "SELECT count(*) FROM unnest(%s::ingest_dead_letter[]) AS l"
    ' JOIN dead_letters USING (source_id, topic, partition, "offset")'
)
_CLAIM = "SELECT * FROM claim_streams(%s::text[], %s::text[], %s::integer[])"
_RETRY_S = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a batch changed. All zero and `repeated` when it had been stored before."""

    flows: int = 0
    messages: int = 0
    errors: int = 0
    auth: int = 0
    letters: int = 0
    redriven: int = 0
    """Dead letters that are stored now."""
    refused: int = 0
    """Dead letters that came again and are dead letters still."""
    assembled: int = 0
    repeated: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.flows or self.messages or self.errors or self.auth or self.assembled)


class Store:
    """Stores prepared batches of the streams that it has claimed. Not for two tasks at once, but for `ping`.

    Methods raise Unavailable when the database is away (nothing was stored, or it cannot be told: storing the same
    batch again is always right) and StaleClaim when another worker has claimed a stream of the batch. `store` raises
    TooManyDeadLetters where more than `max_dead_letters` would be stored within a minute (0: any number).
    """

    def __init__(self, url: str, *, max_dead_letters: int = DEFAULT) -> None:
        self.session = Session(url)
        self._limit = DeadLetterLimit(max_dead_letters, time.monotonic)
        self.cache = BodyCache()
        self.generations: dict[Stream, int] = {}
        self._claims = Session(url, "megido ingest claims", shard=False)
        self._health = Session(url, "megido ingest health", shard=False)
        self._asking = asyncio.Lock()
        self._days: set[date] = set()

    async def claim(self, streams: Collection[Stream]) -> Mapping[Stream, Position]:
        """Takes the streams over from whoever had them; answers where each goes on. One that was never read
        begins at offset 0: the database, not the bus, is the truth, also when it is new."""
        wanted = sorted(streams)
        values = [[s.source_id for s in wanted], [s.topic for s in wanted], [s.partition for s in wanted]]
        while True:
            try:
                connection = await self._claims.connection()
                found = await (await connection.execute(_CLAIM, values)).fetchall()
                break
            except psycopg.Error as error:
                if not failures.is_retry(error):
                    await self._claims.close()
                    raise failures.unavailable(error) from error
                # The former holder's transaction ends by itself, at the latest after its idle limit.
                await _pause()
        positions = {}
        for source_id, topic, partition, offset, last_event_id, generation in found:
            stream = Stream(source_id, topic, partition)
            self.generations[stream] = generation
            positions[stream] = Position(offset, bytes(last_event_id))
        return positions

    def forget(self, streams: Collection[Stream]) -> None:
        """They are another worker's now, or will be."""
        for stream in streams:
            self.generations.pop(stream, None)

    async def store(self, prepared: Prepared) -> Stored:
        """Returns only after the batch is committed."""
        while True:
            if prepared.cache_version != self.cache.version:
                prepared = await self._again(prepared)
            try:
                await self._admit(prepared)
                await self._partitions(prepared.days)
                stored = await self._transaction(prepared)
                break
            except psycopg.Error as error:
                prepared = await self._after(error, prepared)
        self._limit.count(len(prepared.batch.records), stored.letters)
        self.cache.add(prepared.body_keys, max(days) if (days := [d for d, _ in prepared.body_keys]) else 0)
        for reason in prepared.reasons if stored.letters or stored.refused else ():
            _log.warning("dead letter: %s", reason)
        return stored

    async def ping(self) -> None:
        """Returns when the database answers; raises Unavailable. At any time, beside the other calls too."""
        async with self._asking:
            try:
                await (await self._health.connection()).execute("SELECT 1")
            except psycopg.Error as error:
                await self._health.close()
                raise failures.unavailable(error) from error

    async def close(self) -> None:
        await self.session.close()
        await self._claims.close()
        await self._health.close()

    async def _admit(self, prepared: Prepared) -> None:
        """Dead letters that are known already, because their topic is delivered once more, are no new ones."""
        records, letters = len(prepared.batch.records), len(prepared.letters)
        if not self._limit.exceeded_by(records, letters):
            return
        connection = await self.session.connection()
        packed = array(self.session.oids.get(rows.LETTER.name, 0), prepared.letters)
        (known,) = await fetch_one(await connection.execute(_KNOWN, [packed]))
        if excess := self._limit.exceeded_by(records, letters - known):
            raise TooManyDeadLetters(f"{excess}; the latest: {prepared.reasons[-1]}")

    async def _again(self, prepared: Prepared, rejected: Mapping[Place, str] | None = None) -> Prepared:
        known = {**prepared.rejected, **(rejected or {})}
        return await asyncio.to_thread(prepare, prepared.batch, prepared.generations, self.cache, known)

    async def _transaction(self, prepared: Prepared) -> Stored:
        async with self.session.transaction() as connection:
            arguments = self._arguments(prepared, _positions(prepared))
            row = await fetch_one(await connection.execute(_INGEST, arguments))
            failpoints.reach("after_function_call")
            batch, flows, messages, errors, auth, letters, waiting = row
            if batch is None:
                await connection.execute("ROLLBACK")
                return Stored(repeated=True)
            assembled = await assembly.assemble(connection, batch, waiting) if waiting else 0
            failpoints.reach("after_assembly")
            redriven, refused = await self._settle(connection, prepared) if prepared.redrives else (0, 0)
            stored = Stored(flows, messages, errors, auth, letters, redriven, refused, assembled)
            besides = await hits.counted(connection, prepared.hits)
            await commit(connection, batch, changed=stored.changed, besides=besides)
            failpoints.reach("after_commit")
            return stored

    async def _settle(self, connection: psycopg.AsyncConnection[TupleRow], prepared: Prepared) -> tuple[int, int]:
        redrives = array(self.session.oids.get(rows.REDRIVE.name, 0), prepared.redrives)
        redriven, refused = await fetch_one(await connection.execute(_SETTLE, [self.session.shard, redrives]))
        return redriven, refused

    def _arguments(self, prepared: Prepared, positions: Sequence[bytes]) -> list[int | Packed]:
        oids = self.session.oids
        columns: list[tuple[RowType, Sequence[bytes]]] = [
            (rows.POSITION, positions),
            (rows.FLOW, prepared.flows),
            (rows.BODY, prepared.bodies),
            (rows.CHUNK, prepared.chunks),
            (rows.MESSAGE, prepared.messages),
            (rows.ERROR, prepared.errors),
            (rows.AUTH, prepared.auth),
            (rows.NODE, prepared.nodes),
            (rows.GAP, prepared.gaps),
            (rows.LETTER, prepared.letters),
        ]
        return [self.session.shard, *(array(oids.get(kind.name, 0), values) for kind, values in columns)]

    async def _partitions(self, days: set[date]) -> None:
        missing = days - self._days
        if missing:
            await self.session.ensure_partitions(missing)
            self._days |= missing

    async def _after(self, error: psycopg.Error, prepared: Prepared) -> Prepared:
        """What to try next after a failed transaction; raises when there is nothing."""
        if failures.is_stale(error):
            raise failures.stale(error) from error
        if failures.is_missing_partition(error):
            self._days.clear()
            return prepared
        if failures.is_retry(error):
            await _pause()
            return prepared
        if failures.is_data(error):
            return await self._without_bad(error, prepared)
        return await self._lost(error)

    async def _lost(self, error: psycopg.Error) -> Prepared:
        await self.session.close()
        self.cache.clear()
        self._days.clear()
        raise failures.unavailable(error) from error

    async def _without_bad(self, error: psycopg.Error, prepared: Prepared) -> Prepared:
        """Finds the records that Postgres refuses and prepares the batch again with them as dead letters."""
        try:
            found = await self._search(prepared.batch.records)
        except psycopg.Error as other:
            if failures.is_retry(other):
                return prepared  # the batch will be refused once more
            return await self._lost(other)
        if not found:
            raise Unavailable(f"the database refuses a batch, but none of its records: {error}") from error
        return await self._again(prepared, found)

    async def _search(self, records: Sequence[Record]) -> dict[Place, str]:
        error = await self._refusal(records)
        if error is None:
            return {}
        if len(records) == 1:
            return {(records[0].stream, records[0].offset): f"{type(error).__name__}: {error.diag.message_primary}"}
        middle = len(records) // 2
        return await self._search(records[:middle]) | await self._search(records[middle:])

    async def _refusal(self, records: Sequence[Record]) -> psycopg.Error | None:
        """Stores the records for trial, without their offsets, and rolls back."""
        trial = await asyncio.to_thread(prepare, Batch(records), {}, self.cache)
        trial.letters.clear()
        try:
            async with self.session.transaction() as connection:
                await connection.execute(_INGEST, self._arguments(trial, []))
                await connection.execute("ROLLBACK")
        except psycopg.Error as error:
            if failures.is_data(error):
                return error
            raise
        return None


def _positions(prepared: Prepared) -> list[bytes]:
    return [
        rows.POSITION.pack(
            stream.source_id, stream.topic, stream.partition, prepared.generations.get(stream, 0), end.next_offset,
            end.last_event_id, end.rewound,
        )
        for stream, end in sorted(prepared.ends.items())
    ]  # fmt: skip


def only(batch: Batch, keep: Callable[[Stream], bool]) -> Batch:
    """What a batch has of the streams that pass."""
    return Batch([r for r in batch.records if keep(r.stream)], [g for g in batch.gaps if keep(g.stream)])


def stale_streams(claim: failures.StaleClaim) -> set[Stream]:
    """The streams that another worker has; empty when this database knows none of our claims."""
    return {Stream(*place) for place in json.loads(claim.detail)}


async def _pause() -> None:
    await asyncio.sleep(_RETRY_S * (1 + random.random()))
