"""Kafka away, frozen or killed under load: the proxy answers everything, nothing is lost, and what waited arrives in
order.

MEGIDO_FAULT_SECONDS (3) is how long each fault lasts.
"""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts.kafka import Node

from tests.faults.line import SECONDS, check_balance, fault, loaded, until_topic
from tests.fixtures.kafka import started

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300 + 15 * SECONDS)]


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_a_broker_that_stops_answering(how: str, tmp_path: Path, fresh_kafka: Node) -> None:
    """The second time the forwarder is killed with it."""
    async with loaded(tmp_path / "data", fresh_kafka.bootstrap) as load:
        await until_topic(fresh_kafka.bootstrap)
        await load.more()
        if how == "frozen":
            fresh_kafka.pause()
            await fault(load)
            fresh_kafka.go_on()
        else:
            fresh_kafka.kill()
            await fault(load)
            load.kill_forwarder()
            await asyncio.to_thread(fresh_kafka.start)
        await load.more()
        await load.finish()
        await check_balance(fresh_kafka.bootstrap, load)


async def test_a_stop_while_kafka_is_away_is_in_time_and_loses_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path / "kafka")
    async with loaded(tmp_path / "data", node.bootstrap) as load:
        await load.more()
        await load.finish()
        began = time.monotonic()
        assert await asyncio.to_thread(load.proxy.stop) == 0
        assert time.monotonic() - began < 15
    await asyncio.to_thread(started, node)
    command = [sys.executable, "-m", "megido_shared.bus.forwarder", "--data-dir", str(tmp_path / "data")]
    forwarder = subprocess.Popen([*command, "--kafka", node.bootstrap])
    try:
        await check_balance(node.bootstrap, load)
        await asyncio.to_thread(node.kill)
        forwarder.terminate()
        assert await asyncio.to_thread(forwarder.wait, 15) == 0
    finally:
        forwarder.kill()
        forwarder.wait()
        node.kill()
