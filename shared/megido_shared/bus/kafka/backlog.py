"""How far the partitions of a Kafka are ahead of what has been stored."""

from collections.abc import Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from megido_shared.bus.base import Backlog, Stream
from megido_shared.bus.kafka.client import CONNECT_SECONDS, ended, within

_CALL_SECONDS = 5.0


async def backlog(
    options: Mapping[str, Any],
    source_id: str,
    partitions: Mapping[TopicPartition, str],
    positions: Mapping[Stream, int],
) -> dict[Stream, Backlog]:
    """`Bus.backlog` of existing partitions with their topics' own names. Raises Unavailable."""
    if not partitions:
        return {}
    client = AIOKafkaConsumer(**options, enable_auto_commit=False)
    try:
        await within(CONNECT_SECONDS, client.start(), "connecting")
        client.assign(list(partitions))  # so that their leaders are known
        client.pause(*partitions)
        ends = await within(_CALL_SECONDS, client.end_offsets(list(partitions)), "asking for the offsets")
        lows = await within(_CALL_SECONDS, client.beginning_offsets(list(partitions)), "asking for the offsets")
    finally:
        await ended(client.stop())
    found = {}
    for partition, topic in partitions.items():
        stream = Stream(source_id, topic, partition.partition)
        behind = max(0, ends[partition] - max(lows[partition], positions.get(stream, 0)))
        found[stream] = Backlog(behind, counted=None if behind else 0)
    return found
