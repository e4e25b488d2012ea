"""The producer: idempotent, acks=all, zstd, and never waiting for ever."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer

from megido_shared.bus.base import Outgoing
from megido_shared.bus.kafka.client import CONNECT_SECONDS, MAX_REQUEST_BYTES, ended, within
from megido_shared.errors import Unavailable

APPEND_SECONDS = 45.0
"""Longer than a broker's restart and than the client's own request timeout (40 s): giving a producer up sooner
would turn every restart into duplicates."""

BATCH_BYTES = 1 << 20


class KafkaProducer:
    """With the broker away an idempotent aiokafka producer never gives up: `send`, `flush` and `stop` hang
    (aiokafka #1013, #1101), and a sequence error wedges it (#1017). So every call has a deadline, and a producer
    that missed it or failed is abandoned; the next append makes a new one."""

    def __init__(self, options: Mapping[str, Any], *, deadline: float = APPEND_SECONDS) -> None:
        self._options = options
        self._deadline = deadline
        self._client: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()

    async def append(self, records: Sequence[Outgoing]) -> None:
        client = await self._started()
        try:
            await within(self._deadline, _send(client, records), f"storing {len(records)} records")
        except (Unavailable, asyncio.CancelledError):
            if self._client is client:
                self._client = None
            await _abandon(client)
            raise

    async def close(self) -> None:
        client, self._client = self._client, None
        if client and not await ended(client.stop()):
            await _abandon(client)

    async def _started(self) -> AIOKafkaProducer:
        async with self._starting:
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
                    await _abandon(client)
                    raise
                self._client = client
            return self._client


async def _send(client: AIOKafkaProducer, records: Sequence[Outgoing]) -> None:
    """In order; records of one partition travel in one batch or in batches one after the other."""
    waiting = []
    for record in records:
        headers = list(record.headers.items())
        waiting.append(await client.send(record.topic, record.value, key=record.key, headers=headers))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _abandon(client: AIOKafkaProducer) -> None:
    """Ends a producer without its `stop`, which waits until everything is delivered."""
    client._closed = True
    sender = client._sender.sender_task
    if sender:
        sender.cancel()
    await ended(client.client.close())
    if sender:
        await asyncio.wait([sender], timeout=1.0)
        sender.cancel()
