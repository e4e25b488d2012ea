"""What only Kafka can do to us: be away, and come back."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from scripts.kafka import Node, free_port

from megido_shared import events
from megido_shared.bus.base import Outgoing, Position, Stream
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import TOPICS, Topic
from megido_shared.errors import ConfigurationError, Unavailable
from megido_shared.testing import a_completed_flow

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

TOPIC = Topic("outage", 3, "delete", "key")
GROUP = "readers"


@pytest.fixture
async def bus(fresh_kafka: Node) -> AsyncIterator[KafkaBus]:
    opened = KafkaBus(fresh_kafka.bootstrap, append_seconds=3.0)
    await opened.create_topics([TOPIC])
    yield opened
    async with asyncio.timeout(20):
        await opened.close()


def records(start: int, stop: int) -> list[Outgoing]:
    return [Outgoing(TOPIC.name, b"k%d" % (n % 5), b"%d" % n) for n in range(start, stop)]


async def test_an_append_without_a_broker_fails_within_its_deadline_and_later_succeeds(
    fresh_kafka: Node, bus: KafkaBus
) -> None:
    producer = await bus.producer("writer")
    await producer.append(records(0, 10))
    fresh_kafka.kill()
    for _ in range(2):  # the second one meets no producer at all
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="Kafka"):
            await producer.append(records(10, 20))
        assert time.monotonic() - begin < 20
    fresh_kafka.start()
    await producer.append(records(10, 20))
    consumer = await bus.consumer(GROUP, [TOPIC])
    values: list[int] = []
    async with asyncio.timeout(60):
        while set(values) != set(range(20)):
            values += [int(record.value) for record in (await consumer.poll()).records]
    await consumer.close()
    await producer.close()


async def test_nothing_hangs_in_close_when_the_broker_is_gone(fresh_kafka: Node, bus: KafkaBus) -> None:
    producer = await bus.producer("writer")
    await producer.append(records(0, 1))
    consumer = await bus.consumer(GROUP, [TOPIC])
    await consumer.poll(timeout=0.1)
    pending = asyncio.create_task(producer.append(records(1, 2)))
    fresh_kafka.kill()
    begin = time.monotonic()
    await producer.close()
    await consumer.close()
    await bus.close()
    assert time.monotonic() - begin < 20
    await asyncio.wait([pending], timeout=20)
    assert pending.done()
    pending.exception()


async def test_a_stopped_broker_does_not_hold_an_append_past_its_deadline(fresh_kafka: Node, bus: KafkaBus) -> None:
    producer = await bus.producer("writer")
    await producer.append(records(0, 10))
    fresh_kafka.pause()
    begin = time.monotonic()
    with pytest.raises(Unavailable):
        await producer.append(records(10, 20))
    assert time.monotonic() - begin < 20
    fresh_kafka.go_on()
    async with asyncio.timeout(60):
        while True:
            try:
                await producer.append(records(10, 20))
                break
            except Unavailable:
                continue
    await producer.close()


async def test_a_reader_says_that_the_broker_is_away_and_goes_on_after_its_return(
    fresh_kafka: Node, bus: KafkaBus
) -> None:
    patient = KafkaBus(fresh_kafka.bootstrap)
    producer = await patient.producer("writer")
    await producer.append(records(0, 20))
    consumer = await bus.consumer(GROUP, [TOPIC])
    values: list[int] = []
    async with asyncio.timeout(60):
        while len(values) < 20:
            batch = await consumer.poll()
            values += [int(record.value) for record in batch.records]
            await consumer.commit(batch.positions())
    fresh_kafka.kill()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(60):
            while True:
                await consumer.poll(timeout=0.5)
    with pytest.raises(Unavailable):
        await bus.ping()
    fresh_kafka.start()
    await producer.append(records(20, 40))
    async with asyncio.timeout(60):
        while set(values) != set(range(40)):
            try:
                values += [int(record.value) for record in (await consumer.poll(timeout=0.5)).records]
            except Unavailable:
                await asyncio.sleep(0.2)
    assert sorted(values) == list(range(40)), "what was committed did not come again"
    await consumer.close()
    await producer.close()
    await patient.close()


async def test_what_retention_removed_is_an_expired_gap(fresh_kafka: Node, bus: KafkaBus) -> None:
    short = Topic("short", 1, "delete", "key", retention_ms=1000)
    await bus.create_topics([short])
    producer = await bus.producer("writer")
    for _ in range(3):
        await producer.append([Outgoing(short.name, b"k", b"old")])
    stream = Stream(await bus.cluster_id(), short.name, 0)
    await _delete_up_to(fresh_kafka, short.name, 3)
    await producer.append([Outgoing(short.name, b"k", b"new")])

    async def resume(streams: object) -> dict[Stream, Position]:
        return {stream: Position(1)}

    consumer = await bus.consumer(GROUP, [short], resume=resume)
    batch = await consumer.poll(timeout=10)
    while not batch.records:
        batch = type(batch)((await consumer.poll(timeout=10)).records, batch.gaps)
    assert [(gap.kind, gap.offset, gap.next_offset, gap.count) for gap in batch.gaps] == [("expired", 1, 3, 2)]
    assert [record.value for record in batch.records] == [b"new"]
    await consumer.close()
    await producer.close()


async def _delete_up_to(node: Node, topic: str, offset: int) -> None:
    """As retention would, but now."""
    command = node.tool("org.apache.kafka.tools.DeleteRecordsCommand")
    request = node.data / "delete.json"
    request.write_text(f'{{"partitions": [{{"topic": "{topic}", "partition": 0, "offset": {offset}}}], "version": 1}}')
    process = await asyncio.create_subprocess_exec(
        *command, "--bootstrap-server", node.bootstrap, "--offset-json-file", str(request),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output


async def test_topics_are_made_as_the_table_says(fresh_kafka: Node) -> None:
    bus = KafkaBus(fresh_kafka.bootstrap)
    assert set(await bus.create_topics(TOPICS)) == {topic.name for topic in TOPICS}
    output = await _describe(fresh_kafka)
    for topic in TOPICS:
        line = next(line for line in output.splitlines() if line.startswith(f"Topic: {topic.name}\t"))
        assert f"PartitionCount: {topic.partitions}\t" in line
        assert "ReplicationFactor: 1" in line
        assert all(
            f"{name}={value}" in line for name, value in topic.config(1).items() if name != "min.insync.replicas"
        )
    await bus.close()


async def _describe(node: Node) -> str:
    command = node.tool("org.apache.kafka.tools.TopicCommand")
    process = await asyncio.create_subprocess_exec(
        *command, "--bootstrap-server", node.bootstrap, "--describe", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_a_missing_topic_is_named(fresh_kafka: Node) -> None:
    bus = KafkaBus(fresh_kafka.bootstrap)
    with pytest.raises(ConfigurationError, match="megido migrate"):
        await bus.consumer(GROUP, [TOPIC])
    await bus.close()


async def test_a_topic_that_was_confirmed_is_waited_for(fresh_kafka: Node, bus: KafkaBus) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=fresh_kafka.bootstrap)
    await admin.start()
    # As with a broker that has not heard of it yet.
    await admin.delete_topics([TOPIC.name])
    async with asyncio.timeout(30):
        while TOPIC.name in await admin.list_topics():
            await asyncio.sleep(0.05)
    asked = asyncio.Event()
    topics = bus.topics

    async def watched() -> frozenset[str]:
        found = await topics()
        asked.set()
        return found

    bus.topics = watched  # type: ignore[method-assign]
    opening = asyncio.create_task(bus.consumer(GROUP, [TOPIC]))
    await asyncio.wait_for(asked.wait(), 30)
    await admin.create_topics([NewTopic(TOPIC.name, TOPIC.partitions, 1)])
    await admin.close()
    await (await opening).close()


async def test_headers_are_cloud_events(kafka: str) -> None:
    from aiokafka import AIOKafkaConsumer

    bus = KafkaBus(kafka)
    topic = Topic(f"t-{uuid4().hex}", 1, "delete", "key")
    await bus.create_topics([topic])
    flow = a_completed_flow()
    producer = await bus.producer("writer")
    await producer.append([Outgoing(topic.name, b"k", events.encode(flow), events.cloud_event_headers(flow))])
    await producer.close()
    await bus.close()
    reader = AIOKafkaConsumer(topic.name, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await reader.start()
    found = await asyncio.wait_for(reader.getone(), 30)
    await reader.stop()
    assert dict(found.headers)["ce_id"] == flow.event_id.hex().encode()
    assert dict(found.headers)["ce_type"] == b"megido.FlowCompleted.v1"


async def test_nobody_there_is_unavailable_at_once_with_the_address() -> None:
    bus = KafkaBus(f"127.0.0.1:{free_port()}")
    begin = time.monotonic()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
        await bus.ping()
    with pytest.raises(Unavailable):
        await bus.consumer(GROUP, [TOPIC])
    with pytest.raises(Unavailable):
        await (await bus.producer("writer")).append(records(0, 1))
    assert time.monotonic() - begin < 20
    await bus.close()


async def test_the_clients_noise_is_thinned_out(caplog: pytest.LogCaptureFixture) -> None:
    bus = KafkaBus(f"127.0.0.1:{free_port()}")
    with caplog.at_level(logging.DEBUG, "aiokafka"):
        for _ in range(20):
            with pytest.raises(Unavailable):
                await bus.ping()
    assert sum("Unable connect" in record.getMessage() for record in caplog.records) <= 1
    await bus.close()


@pytest.mark.parametrize(
    ("security", "message"),
    [
        ({"SECURITY_PROTOCOL": "TLS"}, "cannot be TLS"),
        ({"SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, "SASL_USERNAME"),
        ({"SECURITY_PROTOCOL": "SSL", "CA_FILE": "/nowhere.pem"}, "CA_FILE"),
    ],
)
async def test_security_settings_that_cannot_work_are_refused(security: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        KafkaBus("127.0.0.1:1", security=security)
