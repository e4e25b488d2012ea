"""The outbox: what Postgres publishes goes to the bus from here, once its transaction has committed.

`add` writes records inside the caller's transaction; `relay` publishes and then deletes them, so delivery is at
least once and consumers dedupe by event identity. Any number of relays may run (the API's, the ingest
leader's): SKIP LOCKED shares the rows out. Records of one key that were added by different transactions may
therefore change places between two relays; what must not (flow states) merges by rank.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from psycopg import AsyncConnection as RawConnection
from psycopg import Error as PsycopgError
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_shared import events
from megido_shared.bus.base import Outgoing, Producer
from megido_shared.db.tables import outbox
from megido_shared.errors import MegidoError, Unavailable

CHANNEL = "megido_outbox"
"""NOTIFY channel, with an empty payload, at each commit that added records."""

MAX_RECORD_BYTES = 4_000_000
"""Of a record with its key and headers. No bus takes much more (`max.message.bytes`), and one record that is never
taken would hold up all that come after it."""

_MAX_KEY_BYTES = 0xFFFF
_ROUND_RECORDS = 500
_ROUND_BYTES = 8 << 20
_PUBLISH_TIMEOUT_S = 20.0
_IDLE_TIMEOUT = "30s"
_STOP_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


class TooLarge(MegidoError):
    """A record that no bus would take."""


def _fits(record: Outgoing) -> bool:
    headers = sum(len(name) + len(value) for name, value in record.headers.items())
    return len(record.key) <= _MAX_KEY_BYTES and len(record.key) + len(record.value) + headers <= MAX_RECORD_BYTES


def outgoing(event: events.AnyEvent) -> Outgoing:
    """The record that an event is published as."""
    return Outgoing(
        topic=events.topic_of(event).name,
        key=events.key_of(event),
        value=events.encode(event),
        headers=events.cloud_event_headers(event),
    )


async def add(connection: AsyncConnection, records: Sequence[Outgoing]) -> None:
    """Adds records inside the caller's transaction: they are published if and only if it commits. Raises TooLarge;
    then none is added."""
    if not records:
        return
    for record in records:
        if not _fits(record):
            raise TooLarge(f"a record of {len(record.value)} bytes under a key of {len(record.key)} is too large")
    now = datetime.now(UTC)
    rows = [
        {
            "topic": record.topic,
            "key": record.key,
            "value": record.value,
            "headers": {name: value.decode() for name, value in record.headers.items()},
            "created_at": now,
        }
        for record in records
    ]
    await connection.execute(insert(outbox), rows)
    await connection.execute(select(func.pg_notify(CHANNEL, "")))


async def relay(engine: AsyncEngine, producer: Producer) -> int:
    """One round: publishes the oldest records that no other relay holds, deletes them, returns how many.

    0 means that nothing is left for this relay. Raises Unavailable when the bus did not take the records in
    time, SQLAlchemyError when Postgres is away; the records then stay, and some may come twice.
    """
    async with engine.begin() as connection:
        # A relay that was stopped in here must not keep its rows from the others for ever.
        await connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_TIMEOUT}'"))
        chosen = await _claim(connection)
        if not chosen:
            return 0
        query = select(outbox).where(outbox.c.id.in_(chosen)).order_by(outbox.c.id)
        rows = (await connection.execute(query)).all()
        records = [
            Outgoing(
                topic=row.topic,
                key=bytes(row.key),
                value=bytes(row.value),
                headers={name: value.encode() for name, value in row.headers.items()},
            )
            for row in rows
        ]
        fitting = [record for record in records if _fits(record)]
        if len(fitting) < len(records):  # added by SQL: copies of dead letters, which stay in their table
            _log.error("outbox: %d records are larger than any bus takes and left out", len(records) - len(fitting))
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                await producer.append(fitting)
        except TimeoutError as error:
            raise Unavailable(f"the bus did not take {len(records)} records within {_PUBLISH_TIMEOUT_S:g} s") from error
        await connection.execute(delete(outbox).where(outbox.c.id.in_(chosen)))
        return len(records)


async def _claim(connection: AsyncConnection) -> list[int]:
    """Locks the oldest free rows; returns the ids of those that fit into one round (one at least)."""
    query = (
        select(outbox.c.id, func.octet_length(outbox.c.value).label("size"))
        .order_by(outbox.c.id)
        .limit(_ROUND_RECORDS)
        .with_for_update(skip_locked=True)
    )
    chosen: list[int] = []
    total = 0
    for row in await connection.execute(query):
        total += row.size
        if chosen and total > _ROUND_BYTES:
            break
        chosen.append(row.id)
    return chosen


class Relay:
    """Relays until told to stop: woken by `wake` (a commit in this process), by NOTIFY, and by a slow poll.

    `open_producer` makes a producer; after a failure a new one is made, because a Kafka producer that missed
    its deadline is abandoned. Bus or Postgres away: tried again, nothing is lost.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        open_producer: Callable[[], Awaitable[Producer]],
        *,
        poll_s: float = 5.0,
        retry_s: float = 1.0,
    ) -> None:
        self._engine = engine
        self._open_producer = open_producer
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._wake = asyncio.Event()
        self._producer: Producer | None = None
        self._failing = False

    def wake(self) -> None:
        """Something was committed to the outbox."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Returns after `stop`; the round in progress is cut off, its records stay."""
        tasks = [
            asyncio.create_task(stop.wait()),
            asyncio.create_task(self._relay_for_ever()),
            asyncio.create_task(self._listen_for_ever()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a defect must not end the relay in silence
        finally:
            for task in tasks:
                task.cancel()
            # Bounded: cancelling psycopg waits for the server, and a stopped one never answers (psycopg #1371).
            await asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S)
            await self._drop_producer()

    async def _relay_for_ever(self) -> None:
        while True:
            self._wake.clear()
            pause = self._poll_s
            try:
                if self._producer is None:
                    self._producer = await self._open_producer()
                while await relay(self._engine, self._producer):
                    pass
                if self._failing:
                    _log.info("outbox: publishing again")
                self._failing = False
            except (Unavailable, SQLAlchemyError, PsycopgError, OSError) as error:
                pause = self._retry_s
                self._complain(error)
                await self._drop_producer()
            # While something is away, new commits must not turn the retry into a busy loop.
            if self._failing:
                await asyncio.sleep(pause)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    def _complain(self, error: Exception) -> None:
        """Says it once, not at every attempt."""
        if not self._failing:
            _log.warning("outbox: cannot publish now, will keep trying: %s", str(error).partition("\n")[0])
        self._failing = True

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(Unavailable, OSError):
                await producer.close()

    async def _listen_for_ever(self) -> None:
        while True:
            with suppress(SQLAlchemyError, PsycopgError, OSError):
                await self._listen()
            await asyncio.sleep(self._retry_s)

    async def _listen(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            raw = (await connection.get_raw_connection()).driver_connection
            assert isinstance(raw, RawConnection)
            try:
                await raw.execute(f"LISTEN {CHANNEL}")
                self._wake.set()  # what was committed while nobody listened
                async for _ in raw.notifies():
                    self._wake.set()
            finally:
                await connection.invalidate()  # a listening session must not go back to the pool
