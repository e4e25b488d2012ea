"""The same on Kafka: commands come from there, and the journal is shipped there by the replayer's own forwarder."""

import asyncio
import socket

import httpx
import pytest

from megido_shared import events, ids
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import FLOWS
from megido_shared.db.outbox import outgoing
from megido_shared.settings import Common
from tests.integration.replayer.harness import replaying
from tests.support.raw_server import OK, RawServer


async def answering(talk):
    while True:
        await talk.head()
        await talk.say(OK)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def ready(port: int) -> None:
    async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
        while (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code != 200:
            await asyncio.sleep(0.05)


@pytest.mark.kafka
async def test_commands_and_flows_on_an_empty_kafka(world, fresh_kafka):
    kafka = fresh_kafka.bootstrap
    bus = KafkaBus(kafka)
    producer = await bus.producer("api")
    common = Common(world.data_dir.ensure(), kafka=kafka, database_url=world.database)
    try:
        async with RawServer(answering) as server:
            original = await world.store_request(server.port)
            settings = world.settings(common=common, poll_s=300.0, metrics_port=free_port())
            async with replaying(settings, forwarder=True):
                await ready(settings.metrics_port)
                consumer = await bus.consumer(f"test-{ids.new_id().hex()}", [FLOWS])
                job = world.job([original])
                command = events.ReplayFlows(
                    event_id=ids.new_id(), node="api-0", epoch=ids.new_id(), time_us=1, job_id=job.bytes
                )
                await producer.append([outgoing(command)])
                (item,) = await world.ended(job, 60)
                assert item.state == "succeeded", item.error
                async with asyncio.timeout(60):
                    found = None
                    while found is None:
                        batch = await consumer.poll(timeout=1.0)
                        keys = {record.key: record for record in batch.records}
                        found = keys.get(item.result_flow_id.bytes)
                await consumer.close()
        flow = events.decode(found.value)
        assert (flow.is_replay, flow.original_flow_id) == (True, original.bytes)
    finally:
        await producer.close()
        await bus.close()
