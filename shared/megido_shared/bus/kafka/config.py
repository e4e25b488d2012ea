"""Configuration on the compacted topic: read to its end, then followed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from megido_shared.bus.kafka.client import CONNECT_SECONDS, ended, reason, within
from megido_shared.bus.topics import CONFIG
from megido_shared.errors import Unavailable

READ_SECONDS = 15.0
RETRY_SECONDS = 2.0

_log = logging.getLogger(__name__)


class ConfigTopic:
    def __init__(self, options: Mapping[str, Any], prefix: str = "") -> None:
        self._options = options
        self._partition = TopicPartition(prefix + CONFIG.name, 0)

    async def get(self, scope: str) -> bytes | None:
        """The current value, or None. Raises Unavailable."""
        return (await self.all()).get(scope)

    async def all(self) -> dict[str, bytes]:
        """The current values by scope. Raises Unavailable."""
        async with self._reader() as reader:
            found = await within(READ_SECONDS, _to_end(reader), "reading the configuration")
        return {key.decode(errors="replace"): value for key, value in found.items() if value is not None}

    async def watch(self, scopes: Collection[str]) -> AsyncIterator[tuple[str, bytes]]:
        """Never ends by itself: a broker that is away is waited for. A tombstone tells nothing: what somebody took
        off the topic is not thereby allowed."""
        wanted = {scope.encode(): scope for scope in scopes}
        told: dict[bytes, bytes] = {}
        while True:
            try:
                async with self._reader() as reader:
                    found = await within(READ_SECONDS, _to_end(reader), "reading the configuration")
                    while True:
                        for key, value in found.items():
                            if key in wanted and value is not None and told.get(key) != value:
                                told[key] = value
                                yield wanted[key], value
                        found = await _more(reader, 1000)
            except (Unavailable, KafkaError, OSError) as error:
                _log.info("configuration topic: %s", error if isinstance(error, Unavailable) else reason(error))
                await asyncio.sleep(RETRY_SECONDS)

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[AIOKafkaConsumer]:
        reader = AIOKafkaConsumer(**self._options, enable_auto_commit=False, auto_offset_reset="earliest")
        try:
            await within(CONNECT_SECONDS, reader.start(), "connecting")
            reader.assign([self._partition])
            await within(CONNECT_SECONDS, reader.seek_to_beginning(self._partition), "seeking in the configuration")
            yield reader
        finally:
            await ended(reader.stop())


type Values = dict[bytes, bytes | None]
"""By key the last value; None is a tombstone (compaction takes the key away for whoever reads from the beginning)."""


async def _to_end(reader: AIOKafkaConsumer) -> Values:
    """The last value of every scope as of now."""
    [partition] = reader.assignment()
    end = (await reader.end_offsets([partition]))[partition]
    found: Values = {}
    while await reader.position(partition) < end:
        found |= await _more(reader, 200)
    return found


async def _more(reader: AIOKafkaConsumer, timeout_ms: int) -> Values:
    batches = (await reader.getmany(timeout_ms=timeout_ms)).values()
    return {record.key: record.value for records in batches for record in records if record.key}
