"""Two deployments on one Kafka, told apart by a prefix of the names of topics and groups."""

import asyncio
from uuid import uuid4

import pytest

from megido_shared.bus.base import Outgoing
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import CONFIG, Topic
from megido_shared.errors import ConfigurationError

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


async def test_each_sees_its_own_topics_groups_and_configuration(kafka: str) -> None:
    topic = Topic(f"t-{uuid4().hex}", 3, "delete", "key")
    prefixes = [f"{name}-{uuid4().hex[:8]}." for name in ("one", "two")]
    buses = [KafkaBus(kafka, prefix=prefix) for prefix in prefixes]
    for bus in buses:
        assert set(await bus.create_topics([topic, CONFIG])) == {topic.name, CONFIG.name}
        assert await bus.create_topics([topic]) == []
        assert await bus.topics() == {topic.name, CONFIG.name}
    consumers = [await bus.consumer("readers", [topic]) for bus in buses]
    sources = []
    for bus, consumer, prefix in zip(buses, consumers, prefixes, strict=True):
        producer = await bus.producer("writer")
        await producer.append([Outgoing(topic.name, b"k", prefix.encode())])
        await producer.close()
        await bus.put_config("global", prefix.encode())
        batch = await consumer.poll(timeout=30)
        [record] = batch.records
        assert (record.value, record.stream.topic) == (prefix.encode(), topic.name)
        sources.append(record.stream.source_id)
        await consumer.commit(batch.positions())
        assert sum((await consumer.lag()).values()) == 0
    assert len(set(sources)) == 2
    for bus, consumer, prefix in zip(buses, consumers, prefixes, strict=True):
        assert await bus.get_config("global") == prefix.encode()
        async with asyncio.timeout(30):
            assert await anext(bus.watch_config(["global"])) == ("global", prefix.encode())
        await consumer.close()
        await bus.close()
    everything = KafkaBus(kafka)
    assert {prefix + topic.name for prefix in prefixes} <= await everything.topics()
    await everything.close()


@pytest.mark.parametrize("prefix", ["a b", "a/", "x" * 61])
def test_a_prefix_that_kafka_would_refuse_is_refused_at_once(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="MEGIDO_KAFKA_PREFIX"):
        KafkaBus("127.0.0.1:1", prefix=prefix)
