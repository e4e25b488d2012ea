"""The compacted topic of the configuration: what a tombstone tells, and values as large as they may be."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer

from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import CONFIG
from megido_shared.config import PayloadRule, Snapshot, decode_snapshot, encode_snapshot

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


@pytest.fixture
async def bus(kafka: str) -> AsyncIterator[KafkaBus]:
    """With a topic of its own."""
    bus = KafkaBus(kafka, prefix=f"c-{uuid4().hex[:8]}.")
    await bus.create_topics([CONFIG])
    yield bus
    await bus.close()


async def entomb(kafka: str, bus: KafkaBus, scope: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    try:
        await producer.send_and_wait(bus._config._partition.topic, key=scope.encode(), value=None)
    finally:
        await producer.stop()


async def test_a_tombstone_takes_a_scope_away_before_compaction_does(kafka: str, bus: KafkaBus) -> None:
    """Whoever publishes must learn that it is gone: after the compaction a new reader would find nothing."""
    await bus.put_config("global", b"one")
    await bus.put_config("app:a", b"other")
    await entomb(kafka, bus, "global")
    assert await bus.get_config("global") is None
    assert await bus.get_configs() == {"app:a": b"other"}
    await bus.put_config("global", b"one")
    assert await bus.get_config("global") == b"one"


async def test_a_tombstone_tells_whoever_watches_nothing(kafka: str, bus: KafkaBus) -> None:
    """What was in force restricts, and goes on."""
    await bus.put_config("global", b"one")
    async with asyncio.timeout(60):
        watched = bus.watch_config(["global"])
        assert await anext(watched) == ("global", b"one")
        await entomb(kafka, bus, "global")
        await bus.put_config("global", b"one")
        await bus.put_config("global", b"two")
        assert await anext(watched) == ("global", b"two")
        await watched.aclose()  # type: ignore[attr-defined]


async def test_a_snapshot_of_three_megabytes(bus: KafkaBus) -> None:
    """As an API whose limit is another one might publish."""
    rules = tuple(
        PayloadRule(
            id=number,
            name=f"rule {number}",
            target_url_pattern=".",
            injection_type="header",
            injection_point="X",
            payload_content="x" * 60_000,
        )
        for number in range(50)
    )
    large = Snapshot(scope="global", version=1, rules=rules)
    await bus.put_config("global", encode_snapshot(large))
    found = await bus.get_config("global")
    assert found is not None and decode_snapshot(found) == large
    async with asyncio.timeout(60):
        watched = bus.watch_config(["global"])
        assert await anext(watched) == ("global", found)
        await watched.aclose()  # type: ignore[attr-defined]
