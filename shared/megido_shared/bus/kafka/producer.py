"""The producer: idempotent, acks=all, zstd, and never waiting for ever."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2

from megido_shared.bus.base import BEHIND_A_FAILURE, Outgoing
from megido_shared.bus.kafka.client import CONNECT_SECONDS, MAX_REQUEST_BYTES, ended, within
from megido_shared.errors import Unavailable

APPEND_SECONDS = 45.0
"""Longer than a broker's restart and than the client's own request timeout (40 s): giving a producer up sooner
would turn every restart into duplicates."""

BATCH_BYTES = 1 << 20


class KafkaProducer:
    """With the broker away an idempotent aiokafka producer never gives up: `send`, `flush` and `stop` hang
    (aiokafka #1013, #1101), and a sequence error wedges it (#1017). So every call has a deadline, and a producer
    that missed it or failed is abandoned; the next append makes a new one, unless the order matters (`ordered`).

    Overlapping appends keep their order: each is queued whole before the next, the client has one batch of a partition
    under way at a time, and behind one that failed the broker refuses the next (a gap in the sequence numbers).
    """

    def __init__(
        self, options: Mapping[str, Any], *, deadline: float = APPEND_SECONDS, ordered: bool = False, prefix: str = ""
    ) -> None:
        self._options = options
        self._deadline = deadline
        self._ordered = ordered
        self._prefix = prefix
        self._failed = False
        self._client: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._queueing = asyncio.Lock()

    async def append(self, records: Sequence[Outgoing]) -> None:
        client = await self._started()
        try:
            await within(self._deadline, self._send(client, records), f"storing {len(records)} records")
        except (Unavailable, asyncio.CancelledError):
            self._give_up(client)
            await _abandon(client)
            raise

    async def close(self) -> None:
        client, self._client = self._client, None
        if client and not await ended(client.stop()):
            await _abandon(client)

    async def _send(self, client: AIOKafkaProducer, records: Sequence[Outgoing]) -> None:
        async with self._queueing:
            if self._client is not client:
                raise Unavailable(BEHIND_A_FAILURE)
            try:
                batches = await _queue(client, self._prefix, records)
            except BaseException:
                self._give_up(client)  # before the next has its turn
                raise
        await asyncio.gather(*batches)

    def _give_up(self, client: AIOKafkaProducer) -> None:
        self._failed = True
        if self._client is client:
            self._client = None

    async def _started(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._failed and self._ordered:
                raise Unavailable(BEHIND_A_FAILURE)
            if self._client is None:
                client = AIOKafkaProducer(
                    **self._options,
                    enable_idempotence=True,
                    acks="all",
                    compression_type="zstd",
                    max_batch_size=BATCH_BYTES,
                    max_request_size=MAX_REQUEST_BYTES,
                )
                try:
                    await within(min(self._deadline, CONNECT_SECONDS), client.start(), "connecting")
                except BaseException:
                    self._failed = True
                    await _abandon(client)
                    raise
                self._client = client
            return self._client


async def _queue(client: AIOKafkaProducer, prefix: str, records: Sequence[Outgoing]) -> list[asyncio.Future[Any]]:
    """Hands the records over in batches of our own (half the CPU of `send`); a future each. Those of one partition
    travel one after the other."""
    queued: list[asyncio.Future[Any]] = []
    try:
        await _fill(client, prefix, records, queued)
    except BaseException:
        for future in queued:
            future.cancel()
        raise
    return queued


async def _fill(
    client: AIOKafkaProducer, prefix: str, records: Sequence[Outgoing], queued: list[asyncio.Future[Any]]
) -> None:
    partitions: dict[str, list[int]] = {}
    filling: dict[tuple[str, int], Any] = {}
    for record in records:
        if len(record.value) > MAX_REQUEST_BYTES:
            raise Unavailable(f"a record of {len(record.value)} bytes is more than Kafka takes")
        topic = prefix + record.topic
        if (known := partitions.get(topic)) is None:
            known = partitions[topic] = sorted(await client.partitions_for(topic))
        # As Kafka's own clients place a key, for other producers of the topic.
        place = topic, known[(murmur2(record.key) & 0x7FFFFFFF) % len(known)]
        headers = list(record.headers.items())
        batch = filling.get(place) or client.create_batch()
        if batch.append(timestamp=None, key=record.key, value=record.value, headers=headers) is None:
            queued.append(await client.send_batch(batch, place[0], partition=place[1]))
            batch = client.create_batch()
            batch.append(timestamp=None, key=record.key, value=record.value, headers=headers)
        filling[place] = batch
    for (topic, partition), batch in filling.items():
        queued.append(await client.send_batch(batch, topic, partition=partition))


async def _abandon(client: AIOKafkaProducer) -> None:
    """Ends a producer without its `stop`, which waits until everything is delivered. Whoever waits for it fails."""
    client._closed = True
    sender = client._sender.sender_task
    if sender:
        sender.cancel()
    _fail_pending(client._message_accumulator)
    await ended(client.client.close())
    if sender:
        await asyncio.wait([sender], timeout=1.0)
        sender.cancel()


def _fail_pending(accumulator: Any) -> None:
    batches = [*(batch for queue in accumulator._batches.values() for batch in queue), *accumulator._pending_batches]
    accumulator.fail_all(KafkaError("the producer was given up"))
    for batch in batches:
        for future in (batch.future, batch._drain_waiter):
            if future.done() and not future.cancelled():
                future.exception()  # asyncio would log that nobody asked for it
