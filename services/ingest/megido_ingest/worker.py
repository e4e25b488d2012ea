"""The loop: poll, prepare a batch ahead, store, commit to the bus. Delivery at least once, storing exactly once."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from megido_ingest import failpoints
from megido_ingest.failures import StaleClaim
from megido_ingest.health import Health
from megido_ingest.limit import TooManyDeadLetters
from megido_ingest.metrics import Metrics
from megido_ingest.prepare import Prepared, prepare
from megido_ingest.store import Store, Stored, only, stale_streams
from megido_shared.bus.base import Batch, Bus, Consumer, Position, Stream
from megido_shared.bus.topics import INGESTED, TOPICS
from megido_shared.errors import Unavailable

GROUP = "ingest"
MAX_RECORDS = 2_000
MAX_BYTES = 8 << 20
LINGER_S = 0.05
"""How long a batch that is not full waits for more. Under load batches fill while the one before is stored."""
IDLE_POLL_S = 0.5
REVOKE_WAIT_S = 5.0
STOP_WAIT_S = 8.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0

_log = logging.getLogger(__name__)


class Backoff:
    """Grows with each failure in a row; a stop cuts the wait short. Says a failure once, not at every attempt."""

    def __init__(self, what: str, metrics: Metrics) -> None:
        self._what = what
        self._metrics = metrics
        self._wait = 0.0

    async def failed(self, error: Exception, stop: asyncio.Event) -> None:
        self._metrics.failures.labels(self._what).inc()
        if not self._wait:
            _log.warning("%s is away, will keep trying: %s", self._what, error)
        self._wait = min(_LAST_BACKOFF_S, self._wait * 2 or _FIRST_BACKOFF_S)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), self._wait)

    def worked(self) -> None:
        if self._wait:
            _log.info("%s is back", self._what)
        self._wait = 0.0


class Worker:
    """One member of the consumer group `ingest`. Any number may run; a stream is stored by one at a time."""

    def __init__(self, bus: Bus, store: Store, metrics: Metrics, health: Health) -> None:
        self._bus = bus
        self._store = store
        self._metrics = metrics
        self._health = health
        self._storing: asyncio.Task[None] | None = None
        self._reopen = False
        self._bus_backoff = Backoff("bus", metrics)
        self._database_backoff = Backoff("database", metrics)
        self.newest_ms = 0
        self.consumer: Consumer | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Returns after `stop`: with what was in hand stored, or left on the bus. Bus or database away: goes on
        trying, and resumes where the database says."""
        while not stop.is_set():
            try:
                consumer = await self._open()
            except Unavailable as error:
                self._health.bus = str(error)
                await self._bus_backoff.failed(error, stop)
                continue
            self.consumer = consumer
            self._health.consuming = True
            try:
                await self._consume(consumer, stop)
            finally:
                self._health.consuming = False
                self.consumer = None
                await self._leave(consumer)

    async def _open(self) -> Consumer:
        """Topics first, so that neither a first start nor a Kafka that was made anew needs another command."""
        if made := await self._bus.create_topics(TOPICS):
            _log.info("topics created: %s", ", ".join(made))
        return await self._bus.consumer(GROUP, INGESTED, resume=self._resume, revoked=self._revoked, pins=True)

    async def _consume(self, consumer: Consumer, stop: asyncio.Event) -> None:
        """Until `stop`, or until the claims must be made anew."""
        self._reopen = False
        while not stop.is_set() and not self._must_reopen():
            batch, claims = await self._gather(consumer, stop)
            if not batch:
                continue
            failpoints.reach("after_poll")
            prepared = await asyncio.to_thread(prepare, batch, claims, self._store.cache)
            failpoints.reach("after_prepare")
            await self._stored()
            if self._must_reopen():
                return  # what was dropped before this batch must be read again first
            if self._health.held:
                await self._hold(consumer, stop)
                return
            self._storing = asyncio.create_task(self._store_batch(consumer, prepared, stop))

    async def _hold(self, consumer: Consumer, stop: asyncio.Event) -> None:
        """Until `stop`: stays a member of its group and stores nothing. What is polled is read again by whoever
        starts next, from where the database says."""
        while not stop.is_set():
            await self._poll(consumer, stop, 1, 1, IDLE_POLL_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), IDLE_POLL_S)

    def _must_reopen(self) -> bool:
        return self._reopen

    async def _gather(self, consumer: Consumer, stop: asyncio.Event) -> tuple[Batch, Mapping[Stream, int]]:
        """A batch, and the claims under which each of its streams was read."""
        batch = await self._poll(consumer, stop, MAX_RECORDS, MAX_BYTES, IDLE_POLL_S)
        claims: Mapping[Stream, int] = dict(self._store.generations)
        deadline = time.monotonic() + LINGER_S
        room = MAX_BYTES - _bytes(batch)
        while batch and not stop.is_set():
            left = deadline - time.monotonic()
            records = MAX_RECORDS - len(batch.records)
            if left <= 0 or records <= 0 or room <= 0:
                break
            more = await self._poll(consumer, stop, records, room, left)
            room -= _bytes(more)
            batch, claims = self._joined(batch, claims, more)
        return batch, claims

    def _joined(self, batch: Batch, claims: Mapping[Stream, int], more: Batch) -> tuple[Batch, Mapping[Stream, int]]:
        now = dict(self._store.generations)
        # A stream that was taken away and came back begins anew: what was read under the former claim is among the
        # later records again, or is another worker's.
        kept = only(batch, lambda stream: now.get(stream) == claims.get(stream)) if now != claims else batch
        return Batch([*kept.records, *more.records], [*kept.gaps, *more.gaps]), now

    async def _poll(
        self, consumer: Consumer, stop: asyncio.Event, max_records: int, max_bytes: int, timeout: float
    ) -> Batch:
        try:
            batch = await consumer.poll(max_records=max_records, max_bytes=max_bytes, timeout=timeout)
        except Unavailable as error:
            self._health.bus = str(error)
            await self._bus_backoff.failed(error, stop)
            return Batch()
        self._bus_backoff.worked()
        self._health.bus = ""
        return batch

    async def _store_batch(self, consumer: Consumer, prepared: Prepared, stop: asyncio.Event) -> None:
        begun = time.monotonic()
        stored: Stored | None = None
        while stored is None:
            try:
                stored = await self._store.store(prepared)
            except StaleClaim as claim:
                self._metrics.failures.labels("claim").inc()
                rest = self._without_stale(claim, consumer, prepared.batch)
                if not rest:
                    return
                prepared = await asyncio.to_thread(prepare, rest, prepared.generations, self._store.cache)
            except TooManyDeadLetters as excess:
                self._too_many(excess)
                return
            except Unavailable as error:
                self._health.database = str(error)
                await self._database_backoff.failed(error, stop)
                if stop.is_set():
                    return  # the bus still has it
        self._database_backoff.worked()
        self._health.database = ""
        self._count(prepared, stored, time.monotonic() - begun)
        try:
            await consumer.commit({stream: end.next_offset for stream, end in prepared.ends.items()})
        except Unavailable as error:
            _log.debug("the bus did not take a commit, the database has it: %s", error)
        failpoints.reach("after_bus_commit")

    def _too_many(self, excess: TooManyDeadLetters) -> None:
        self._health.held = "dead letters: too many, storing has stopped; roll back, or raise --max-dead-letters"
        self._metrics.held.set(1)
        _log.error(
            "storing has stopped, nothing is lost: %s. Roll back what was deployed last and start ingest again, or "
            "start it with a higher --max-dead-letters (0: no limit)",
            excess,
        )

    def _without_stale(self, claim: StaleClaim, consumer: Consumer, batch: Batch) -> Batch:
        """What is left of a batch when other workers have taken streams of it."""
        stale = stale_streams(claim)
        if not stale:
            _log.warning("the database does not know this worker's claims, claiming anew")
            self._store.forget(list(self._store.generations))
            self._reopen = True
            return Batch()
        _log.info("%d streams were claimed by another worker", len(stale))
        if stale & consumer.assigned():
            self._reopen = True  # the bus still gives them to us; leave and join again, so that one of us has them
        return only(batch, lambda stream: stream not in stale)

    def _count(self, prepared: Prepared, stored: Stored, seconds: float) -> None:
        metrics = self._metrics
        for kind, count in (
            ("flow", stored.flows), ("message", stored.messages), ("error", stored.errors), ("auth", stored.auth)
        ):  # fmt: skip
            metrics.records.labels(kind).inc(count)
        metrics.consumed.inc(len(prepared.batch.records))
        metrics.batches.inc()
        metrics.dead_letters.inc(stored.letters)
        metrics.redriven.labels("stored").inc(stored.redriven)
        metrics.redriven.labels("refused").inc(stored.refused)
        metrics.duration.observe(seconds)
        for gap in prepared.batch.gaps:
            metrics.gaps.labels(gap.kind).inc(gap.count)
        self.newest_ms = max(self.newest_ms, prepared.newest_ms)

    async def _stored(self) -> None:
        """Waits for the batch before; a defect in it ends the worker."""
        if self._storing is not None:
            await self._storing
            self._storing = None

    async def _resume(self, streams: Collection[Stream]) -> Mapping[Stream, Position]:
        return await self._store.claim(streams)

    async def _revoked(self, streams: Collection[Stream]) -> None:
        if self._storing is not None:
            await asyncio.wait([self._storing], timeout=REVOKE_WAIT_S)
        self._store.forget(streams)

    async def _leave(self, consumer: Consumer) -> None:
        if self._storing is not None:
            storing, self._storing = self._storing, None
            done, _ = await asyncio.wait([storing], timeout=STOP_WAIT_S)
            if not done:
                storing.cancel()
            with suppress(asyncio.CancelledError):
                await storing
        with suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(3):
                await consumer.close()


def _bytes(batch: Batch) -> int:
    return sum(len(record.value) for record in batch.records)
