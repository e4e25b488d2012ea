"""A member of a Kafka consumer group, with positions that somebody else may decide."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

from megido_shared.bus.base import Batch, Gap, Position, Record, Resume, Revoked, Stream
from megido_shared.bus.identity import event_id_of
from megido_shared.bus.kafka.client import CONNECT_SECONDS, ended, reason, within
from megido_shared.errors import Unavailable

CALL_SECONDS = 10.0
SESSION_MS = 8_000
HEARTBEAT_MS = 2_000
REBALANCE_MS = 30_000
CHECK_SECONDS = 5.0
"""How often a consumer without news asks whether there is a broker at all."""
ROUND_RECORDS = 500

_NOT_OURS = (
    CommitFailedError,
    IllegalGenerationError,
    IllegalStateError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

_log = logging.getLogger(__name__)


class _Place:
    """Where one assigned partition is read: `next` is the offset wanted next; `check` the event id that the record
    before it must have, if that is still to be seen."""

    def __init__(self, stream: Stream, next_offset: int, check: bytes = b"") -> None:
        self.stream = stream
        self.next = next_offset
        self.check = check


class KafkaConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is not typed
    """Partitions are placed (sought to where they are to be read) from `poll`, not from the client's rebalance
    callback: an error there would be swallowed, here the caller of `poll` gets it and the next poll tries again."""

    def __init__(
        self,
        options: Mapping[str, Any],
        group: str,
        topics: Iterable[str],
        *,
        prefix: str = "",
        source_id: Callable[[], Awaitable[str]],
        resume: Resume | None,
        revoked: Revoked | None,
    ) -> None:
        self._options = options
        self._group = group
        self._prefix = prefix
        self._topics = sorted(prefix + topic for topic in topics)
        self._source_id = source_id
        self._resume = resume
        self._revoked = revoked
        self._client: AIOKafkaConsumer | None = None
        self._source = ""
        self._unplaced: set[TopicPartition] = set()
        self._places: dict[TopicPartition, _Place] = {}
        self._committed: dict[Stream, int] = {}
        self._fetched: deque[tuple[TopicPartition, ConsumerRecord]] = deque()
        self._gaps: list[Gap] = []
        self._checked = 0.0

    async def start(self) -> None:
        """Joins the group. Raises Unavailable."""
        client = AIOKafkaConsumer(
            **self._options,
            group_id=self._group,
            enable_auto_commit=False,
            # Every partition is sought; what is out of range must be told, not mended in silence.
            auto_offset_reset="none",
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            rebalance_timeout_ms=REBALANCE_MS,
            fetch_max_bytes=16 << 20,
            fetch_max_wait_ms=100,
            # Topics that appear later are noticed within this time.
            metadata_max_age_ms=30_000,
        )
        client.subscribe(self._topics, listener=self)
        try:
            await within(CONNECT_SECONDS, client.start(), f"joining group {self._group}")
        except BaseException:
            await _discard(client)
            raise
        self._client = client
        self._checked = time.monotonic()

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        gone = [self._places[tp].stream for tp in revoked if tp in self._places]
        if gone and self._revoked:
            await self._revoked(gone)
        self._forget()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._forget()
        self._unplaced = set(assigned)

    async def poll(self, *, max_records: int = 2000, max_bytes: int = 8 << 20, timeout: float = 1.0) -> Batch:
        client = await self._running()
        try:
            await self._place(client)
            await self._fetch(client, max_records, max_bytes, timeout)
        except IllegalStateError:
            return Batch()  # a rebalance took the partitions in the middle; the next poll places the new ones
        except (KafkaError, OSError) as error:
            await self._give_up()
            raise Unavailable(f"Kafka: reading as group {self._group}: {reason(error)}") from error
        batch = self._take(client, max_records, max_bytes)
        if batch:
            self._checked = time.monotonic()
        elif time.monotonic() - self._checked > CHECK_SECONDS:
            await within(CALL_SECONDS, client.topics(), "asking for the topics")
            self._checked = time.monotonic()
        return batch

    async def commit(self, positions: Mapping[Stream, int]) -> None:
        client = await self._running()
        streams = {place.stream: tp for tp, place in self._places.items()}
        ours = {stream: offset for stream, offset in positions.items() if stream in streams}
        if not ours:
            return
        try:
            committing = client.commit({streams[stream]: offset for stream, offset in ours.items()})
            async with asyncio.timeout(CALL_SECONDS):
                await committing
        except _NOT_OURS as error:
            _log.info("a commit of group %s came too late: %s", self._group, error)
            return
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable(f"Kafka: committing for group {self._group}: {reason(error)}") from error
        self._committed.update(ours)

    def assigned(self) -> frozenset[Stream]:
        return frozenset(place.stream for place in self._places.values())

    async def lag(self) -> Mapping[Stream, int]:
        """Records between what is committed and the end of each assigned partition."""
        client = await self._running()
        places = dict(self._places)
        if not places:
            return {}
        ends = await within(CALL_SECONDS, client.end_offsets(list(places)), "asking for the ends")
        return {
            place.stream: max(0, ends[tp] - self._committed.get(place.stream, place.next))
            for tp, place in places.items()
        }

    async def close(self) -> None:
        await self._give_up()

    async def _running(self) -> AIOKafkaConsumer:
        if self._client is None:
            await self.start()
        return self._client

    async def _give_up(self) -> None:
        """Drops a client that failed; the next call begins with a new one."""
        client, self._client = self._client, None
        self._forget()
        if client:
            await _discard(client)

    def _forget(self) -> None:
        self._places.clear()
        self._unplaced = set()
        self._fetched.clear()
        self._gaps.clear()
        self._committed.clear()

    async def _place(self, client: AIOKafkaConsumer) -> None:
        """Seeks newly assigned partitions: to what `resume` says, else the committed offset, else the earliest."""
        wanted = self._unplaced
        if not wanted:
            return
        self._source = await self._source_id()
        streams = {tp: Stream(self._source, tp.topic.removeprefix(self._prefix), tp.partition) for tp in wanted}
        stored = await self._resume(streams.values()) if self._resume else {}
        doing = "asking for the offsets"
        committed = {
            tp: await within(CALL_SECONDS, client.committed(tp), doing) for tp in wanted if streams[tp] not in stored
        }
        lows = await within(CALL_SECONDS, client.beginning_offsets(list(wanted)), doing)
        ends = await within(CALL_SECONDS, client.end_offsets(list(wanted)), doing)
        if self._unplaced is not wanted:
            return  # another rebalance came in between
        for tp, stream in streams.items():
            before = committed.get(tp)
            position = stored.get(stream) or (Position(lows[tp]) if before is None else Position(before))
            self._seek(client, tp, stream, position, low=lows[tp], end=ends[tp])
        self._unplaced = set()

    def _seek(
        self, client: AIOKafkaConsumer, tp: TopicPartition, stream: Stream, position: Position, *, low: int, end: int
    ) -> None:
        offset = position.offset
        self._committed[stream] = min(offset, end)
        if offset > end:
            self._gaps.append(Gap(stream, offset, low, "rewound", 0))
            offset = low
        elif offset < low:
            self._gaps.append(Gap(stream, offset, low, "expired", low - offset))
            offset = low
        elif position.last_event_id and offset > low:
            # The record before tells whether this is still the same log: read it again, see `_accept`.
            self._places[tp] = _Place(stream, offset, position.last_event_id)
            client.seek(tp, offset - 1)
            return
        self._places[tp] = _Place(stream, offset)
        client.seek(tp, offset)

    async def _fetch(self, client: AIOKafkaConsumer, max_records: int, max_bytes: int, timeout: float) -> None:
        """Fills `_fetched`; waits only while nothing is there at all."""
        if self._gaps:
            timeout = 0.0
        size = sum(len(record.value or b"") for _, record in self._fetched)
        while len(self._fetched) < max_records and size < max_bytes:
            wait = 0 if self._fetched else int(timeout * 1000)
            try:
                found = await client.getmany(timeout_ms=wait, max_records=min(ROUND_RECORDS, max_records))
            except OffsetOutOfRangeError as error:
                await self._clamp(client, error.args[0])
                return
            except NoOffsetForPartitionError:
                return  # from before the partition was placed
            if not found:
                return
            for tp, records in found.items():
                self._fetched.extend((tp, record) for record in records)
                size += sum(len(record.value or b"") for record in records)

    async def _clamp(self, client: AIOKafkaConsumer, offsets: Mapping[TopicPartition, int]) -> None:
        """Retention (or a recreated topic) removed what was to be read next."""
        doing = "asking for the offsets"
        lows = await within(CALL_SECONDS, client.beginning_offsets(list(offsets)), doing)
        for tp, asked in offsets.items():
            place = self._places.get(tp)
            if place is None:
                continue
            low = lows[tp]
            if asked < low:
                self._gaps.append(Gap(place.stream, place.next, low, "expired", max(0, low - place.next)))
            else:
                self._gaps.append(Gap(place.stream, place.next, low, "rewound", 0))
            place.next, place.check = low, b""
            client.seek(tp, low)

    def _take(self, client: AIOKafkaConsumer, max_records: int, max_bytes: int) -> Batch:
        records: list[Record] = []
        size = 0
        while self._fetched and len(records) < max_records and (size < max_bytes or not records):
            tp, found = self._fetched.popleft()
            place = self._places.get(tp)
            if place is None or not self._accept(client, tp, place, found):
                continue
            place.next = found.offset + 1
            value = found.value or b""
            size += len(value)
            records.append(Record(place.stream, found.offset, place.next, found.key or b"", value))
        gaps, self._gaps = self._gaps, []
        return Batch(records, gaps)

    def _accept(self, client: AIOKafkaConsumer, tp: TopicPartition, place: _Place, found: ConsumerRecord) -> bool:
        """Whether a fetched record is to be delivered; decides the check of a resumed position on the way."""
        if place.check:
            check, place.check = place.check, b""
            if found.offset == place.next - 1 and _event_id(found) != check:
                self._rewind(client, tp, place)
                return False
        return bool(found.offset >= place.next)

    def _rewind(self, client: AIOKafkaConsumer, tp: TopicPartition, place: _Place) -> None:
        """The stored position is of another log: start over, identity dedupes."""
        self._gaps.append(Gap(place.stream, place.next, 0, "rewound", 0))
        place.next = 0
        self._fetched = deque(item for item in self._fetched if item[0] != tp)
        # Offset 0 may be long gone; then the broker says so and `_clamp` finds the low watermark.
        client.seek(tp, 0)


def _event_id(found: ConsumerRecord) -> bytes:
    """From the CloudEvents header, or from the value when somebody published without headers."""
    for name, value in found.headers:
        if name == "ce_id":
            with contextlib.suppress(ValueError):
                return bytes.fromhex(value.decode("ascii", "replace"))
    return event_id_of(found.value or b"")


async def _discard(client: AIOKafkaConsumer) -> None:
    """Leaves the group if that can be done in time; closes the connections in any case."""
    if not await ended(client.stop()):
        await ended(client._client.close(), 1.0)
