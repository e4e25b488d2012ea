"""Several ingest processes over a real Kafka: rebalances, kill -9, a broker that goes and comes back."""

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripts.kafka import Node

from megido_shared import events
from megido_shared.bus.base import Outgoing
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import TOPICS
from megido_shared.db.outbox import outgoing
from tests.faults.balance import SEED, settle_items
from tests.integration.ingest.process import IngestProcess
from tests.integration.ingest.support import Log, contents, empty, ingest, rows
from tests.integration.ingest.traffic import mixed_traffic
from tests.support.waiting import until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

LEFT_OUT = ("dead_letters", "accounting")
"""These name their stream, which differs between a partitioned log and one list."""


async def _publish(bootstrap: str, items: Sequence[events.AnyEvent | bytes]) -> None:
    bus = KafkaBus(bootstrap)
    await bus.create_topics(TOPICS)
    producer = await bus.producer("test")
    await producer.append([outgoing(i) if not isinstance(i, bytes) else Outgoing("megido.flows", i, i) for i in items])
    await producer.close()
    await bus.close()


def _terminals(url: str) -> int:
    return int(
        rows(url, "SELECT coalesce(sum(value), 0) FROM accounting WHERE kind IN ('stored', 'dead_lettered')")[0][0]
    )


async def _undisturbed(url: str, items: Sequence[events.AnyEvent | bytes]) -> tuple[dict[str, Any], int]:
    log = Log()
    log.add(*items)
    await ingest(url, [log.records])
    found, count = contents(url, leave_out=LEFT_OUT), _terminals(url)
    empty(url)
    return found, count


def test_the_first_to_meet_an_empty_kafka_makes_the_topics(database: str, fresh_kafka: Node, tmp_path: Path) -> None:
    worker = IngestProcess(database, tmp_path / "data", kafka=fresh_kafka.bootstrap)
    try:
        worker.wait_ready()
        assert all(topic.name in worker.output for topic in TOPICS), worker.output
        assert worker.terminate() == 0, worker.output
    finally:
        worker.close()


def test_rebalances_and_a_kill_neither_lose_nor_double(database: str, fresh_kafka: Node, tmp_path: Path) -> None:
    items = mixed_traffic(SEED, 900)
    expected, count = asyncio.run(_undisturbed(database, items))
    third = len(items) // 3
    workers = [IngestProcess(database, tmp_path / "1" / "data", kafka=fresh_kafka.bootstrap)]
    try:
        asyncio.run(_publish(fresh_kafka.bootstrap, items[:third]))
        workers[0].wait_ready()
        workers.append(IngestProcess(database, tmp_path / "2" / "data", kafka=fresh_kafka.bootstrap))
        asyncio.run(_publish(fresh_kafka.bootstrap, items[third : 2 * third]))
        workers[1].wait_ready()
        workers[0].signal(signal.SIGKILL)
        workers.append(IngestProcess(database, tmp_path / "3" / "data", kafka=fresh_kafka.bootstrap))
        asyncio.run(_publish(fresh_kafka.bootstrap, items[2 * third :]))
        until(lambda: _terminals(database) >= count, "everything is stored", seconds=90)
        until(lambda: contents(database, leave_out=LEFT_OUT) == expected, "contents are those of a calm run")
        assert _terminals(database) == count
        settle_items(items, database)
        assert [worker.terminate() for worker in workers[1:]] == [0, 0]
    finally:
        for worker in workers:
            worker.close()


def test_a_broker_that_was_killed_and_came_back(database: str, fresh_kafka: Node, tmp_path: Path) -> None:
    items = mixed_traffic(SEED, 300)
    expected, count = asyncio.run(_undisturbed(database, items))
    half = len(items) // 2
    worker = IngestProcess(database, tmp_path / "1" / "data", kafka=fresh_kafka.bootstrap)
    try:
        asyncio.run(_publish(fresh_kafka.bootstrap, items[:half]))
        worker.wait_ready()
        fresh_kafka.kill()
        until(lambda: worker.get("/readyz")[0] == 503, "not ready without a broker", seconds=60)
        fresh_kafka.start()
        asyncio.run(_publish(fresh_kafka.bootstrap, items[half:]))
        until(lambda: _terminals(database) >= count, "everything is stored", seconds=90)
        until(lambda: contents(database, leave_out=LEFT_OUT) == expected, "contents are those of a calm run")
        settle_items(items, database)
        assert worker.terminate() == 0, worker.output
    finally:
        worker.close()
