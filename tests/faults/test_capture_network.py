"""A spoilt network between the forwarder and Kafka, and nodes of three that are killed, under load: the proxy answers
everything, nothing is lost, and what waited arrives in order.

MEGIDO_FAULT_SECONDS (3) is how long each fault lasts.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from scripts.kafka import Cluster, Node, free_port

from tests.faults.line import SECONDS, TOPIC, check, check_balance, fault, loaded, until_topic
from tests.fixtures.kafka import started
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300 + 15 * SECONDS)]


@asynccontextmanager
async def behind_a_network(tmp_path: Path) -> AsyncIterator[TcpProxy]:
    """A broker that clients reach, and are sent to, over the proxy only."""
    port = free_port()
    async with tcp_proxy(port) as network:
        node = Node(
            tmp_path / "kafka", port=port, more={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{network.port}"}
        )
        try:
            await asyncio.to_thread(started, node)
            yield network
        finally:
            node.kill()


async def test_a_spoilt_network(tmp_path: Path) -> None:
    async with behind_a_network(tmp_path) as network:
        bootstrap = f"127.0.0.1:{network.port}"
        async with loaded(tmp_path / "data", bootstrap) as load:
            await load.more()
            await network.refuse()
            await fault(load)
            await network.open()
            await load.more()
            network.hole = True
            await fault(load)
            await network.reset()  # what was swallowed is gone
            network.hole = False
            await load.more()
            network.delay, network.rate = 0.3, 200_000
            await fault(load)
            network.delay, network.rate = 0.0, 0
            for _ in range(5):
                await network.reset()
                await load.more(50)
            await load.finish()
            await check_balance(bootstrap, load)
        assert network.accepted > 6


async def leader(bootstrap: str) -> int:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        described = await admin.describe_topics([TOPIC])
        partition = min(described[0]["partitions"], key=lambda found: found["partition"])
        return int(partition["leader"])
    finally:
        await admin.close()


async def test_of_three_nodes_a_leader_is_killed(tmp_path: Path, kafka_cluster: Cluster) -> None:
    """In the long form each in turn, the controller among them."""
    async with loaded(tmp_path / "data", kafka_cluster.bootstrap) as load:
        await until_topic(kafka_cluster.bootstrap)
        await load.more()
        first = await leader(kafka_cluster.bootstrap)
        for number in [first, *(kafka_cluster.nodes.keys() - {first})] if SECONDS > 10 else [first]:
            killed = kafka_cluster.nodes[number]
            killed.kill()
            await load.more()
            # Flowing again, with two nodes: what was answered after the kill arrives while the third is away.
            began = time.monotonic()
            await check(kafka_cluster.bootstrap, load.ledger[:])
            print(f"node {number} killed: everything there after {time.monotonic() - began:.1f} s")
            await asyncio.to_thread(killed.start)
            await load.more()
        await load.finish()
        await check_balance(kafka_cluster.bootstrap, load)
