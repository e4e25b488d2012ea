"""The whole line under load, from clients over the proxy, its forwarder and Kafka to ingest and Postgres, while a part
of it is killed, comes or goes. At the end the clients' own ledger is compared with the rows.
"""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from scripts.kafka import Cluster, Node

from megido_shared.bus.topics import INGESTED
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from tests.faults.balance import accounts_of_database, settle, targets
from tests.faults.line import SECONDS, Load, fault, loaded, until_topic
from tests.faults.test_capture_network import leader
from tests.faults.test_frozen_postgres import frozen
from tests.integration.ingest.process import IngestProcess
from tests.integration.ingest.support import contents, rows
from tests.support.waiting import until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300 + 6 * SECONDS)]


class Line:
    """Clients and proxy under load, and the ingest processes behind Kafka."""

    def __init__(self, load: Load, database: str, bootstrap: str, place: Path) -> None:
        self.load = load
        self.workers: list[IngestProcess] = []
        self._database = database
        self._bootstrap = bootstrap
        self._place = place
        self._numbers = itertools.count()

    async def join(self) -> IngestProcess:
        """Another ingest process; returns when it works."""
        worker = IngestProcess(self._database, self._place / str(next(self._numbers)) / "data", kafka=self._bootstrap)
        self.workers.append(worker)
        await asyncio.to_thread(worker.wait_ready)
        return worker

    def kill(self, worker: IngestProcess) -> None:
        worker.close()
        self.workers.remove(worker)

    async def stored(self, seconds: float = 90) -> None:
        """Until everything that clients have been answered so far is in Postgres."""
        wanted = set(self.load.ledger)
        await asyncio.to_thread(until, lambda: wanted <= set(targets(self._database)), "all is stored", seconds=seconds)

    async def settle(self) -> None:
        """Ends the load and the proxy, and compares."""
        await self.load.finish()
        assert await asyncio.to_thread(self.load.proxy.stop) == 0
        await self.stored()
        await asyncio.to_thread(until, self._told, "the proxy's last heartbeat is stored", seconds=60)
        settle(
            self.load.ledger,
            targets(self._database),
            accounts_of_database(self._database),
            failed=len(self.load.failed),
        )

    def _told(self) -> bool:
        return rows(self._database, "SELECT state FROM nodes WHERE service = 'capture'") == [("stopping",)]


@asynccontextmanager
async def line(tmp_path: Path, database: str, bootstrap: str) -> AsyncIterator[Line]:
    async with loaded(tmp_path / "proxy", bootstrap) as load:
        found = Line(load, database, bootstrap, tmp_path / "ingest")
        try:
            await until_topic(bootstrap)
            await found.join()
            yield found
            await found.settle()
            for worker in found.workers:
                assert worker.terminate() == 0, worker.output
        finally:
            for worker in found.workers:
                worker.close()


async def test_workers_come_and_go_and_one_is_killed(tmp_path: Path, database: str, fresh_kafka: Node) -> None:
    """With two and with three of them; each change moves streams from one to another under load."""
    async with line(tmp_path, database, fresh_kafka.bootstrap) as flowing:
        await flowing.load.more()
        second = await flowing.join()
        await flowing.load.more()
        await flowing.join()
        await flowing.load.more()
        flowing.kill(flowing.workers[0])
        await flowing.load.more()
        assert await asyncio.to_thread(second.terminate) == 0, second.output
        flowing.workers.remove(second)
        await flowing.load.more()


async def test_a_leader_is_killed(tmp_path: Path, database: str, kafka_cluster: Cluster) -> None:
    bootstrap = kafka_cluster.bootstrap
    async with line(tmp_path, database, bootstrap) as flowing:
        await flowing.join()
        await flowing.load.more()
        killed = kafka_cluster.nodes[await leader(bootstrap)]
        killed.kill()
        began = time.monotonic()
        await flowing.load.more()
        await flowing.stored()
        print(f"a leader killed: all that was answered since is in Postgres after {time.monotonic() - began:.1f} s")
        await asyncio.to_thread(killed.start)
        await flowing.load.more()


@contextmanager
def own_postgres(directory: Path) -> Iterator[tuple[EmbeddedPostgres, str]]:
    postgres = EmbeddedPostgres(DataDir(directory).ensure(), durable=False)
    try:
        url = postgres.start()
        migrate(url)
        yield postgres, url
    finally:
        postgres.stop()


def restart_in_a_transaction(postgres: EmbeddedPostgres, url: str) -> None:
    """What `pg_ctl restart -m immediate` does, at a moment at which a worker has a transaction open that has written:
    no session is ended in order, and the server recovers from its log."""
    with psycopg.connect(conninfo(url), autocommit=True) as watching:
        query = """SELECT pid FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()"""
        until(lambda: watching.execute(query).fetchall(), "a worker writes", seconds=60, every=0.001)
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGQUIT)
    until(lambda: not postgres.running, "it has ended")
    postgres.start()


async def test_postgres_is_restarted_within_transactions(tmp_path: Path, fresh_kafka: Node) -> None:
    with own_postgres(tmp_path / "postgres") as (postgres, url):
        async with line(tmp_path, url, fresh_kafka.bootstrap) as flowing:
            for _ in range(3):
                await flowing.load.more()
                await asyncio.to_thread(restart_in_a_transaction, postgres, url)
                await flowing.stored()


async def test_postgres_and_then_a_worker_are_frozen(tmp_path: Path, fresh_kafka: Node) -> None:
    """In the long form a minute each: then Kafka takes the worker's streams away, and its late commit is fenced."""
    with own_postgres(tmp_path / "postgres") as (postgres, url):
        async with line(tmp_path, url, fresh_kafka.bootstrap) as flowing:
            second = await flowing.join()
            with frozen(postgres):
                await fault(flowing.load)
            await flowing.stored()
            second.signal(signal.SIGSTOP)
            await fault(flowing.load)
            second.signal(signal.SIGCONT)
            await flowing.stored()


async def test_the_topics_are_delivered_three_times(tmp_path: Path, database: str, fresh_kafka: Node) -> None:
    """By somebody who copies them into themselves, twice, while two workers read."""
    async with line(tmp_path, database, fresh_kafka.bootstrap) as flowing:
        await flowing.join()
        await flowing.load.more(200)
        await flowing.settle()
        before = contents(database)
        copied = await copy(fresh_kafka.bootstrap, 2)
        await asyncio.to_thread(until, lambda: not sum(map(lag, flowing.workers)), "all is read again", seconds=60)
        print(f"{copied} records came again")
        assert contents(database) == before


async def copy(bootstrap: str, times: int) -> int:
    """Appends what is on the topics to them, each record where it was. Returns how many."""
    reader = AIOKafkaConsumer(
        *(topic.name for topic in INGESTED), bootstrap_servers=bootstrap, auto_offset_reset="earliest"
    )
    writer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await reader.start()
    await writer.start()
    try:
        ends, found = await reader.end_offsets(reader.assignment()), []
        while not all([await reader.position(partition) >= end for partition, end in ends.items()]):
            found += [record for batch in (await reader.getmany(timeout_ms=200)).values() for record in batch]
        found = [record for record in found if record.offset < ends[record.topic, record.partition]]
        for _ in range(times):
            for record in found:
                await writer.send(record.topic, record.value, key=record.key, partition=record.partition)
        await writer.flush()
    finally:
        await reader.stop()
        await writer.stop()
    return times * len(found)


def lag(worker: IngestProcess) -> float:
    """Records that it has not stored yet, of the streams that it has."""
    lines = worker.get("/metrics")[1].splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("megido_ingest_lag_records{")]
    assert values
    return sum(values)
