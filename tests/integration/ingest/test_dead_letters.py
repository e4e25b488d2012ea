"""Records that cannot be stored: in the table and on the topic with a reason, once; and never all of the traffic."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer

from megido_ingest.prepare import prepare
from megido_ingest.store import Store, Stored
from megido_shared import events, ids, redrive
from megido_shared.bus.base import Batch, Bus, Outgoing, Record
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import AUTH, DEAD_LETTERS, FLOWS, TOPICS
from megido_shared.datadir import DataDir
from megido_shared.db import outbox
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.ingest.process import IngestProcess
from tests.integration.ingest.support import Log, rows, stream
from tests.integration.ingest.traffic import an_event
from tests.support.waiting import until

REFUSE = "ALTER TABLE flows ADD CONSTRAINT refused CHECK (host <> 'refused.example')"
POISON = b"\xc1 no event"


@dataclass(frozen=True)
class Place:
    """Where records go, and the ingest that reads them."""

    root: Path
    url: str
    kafka: str = ""
    prefix: str = ""

    def bus(self) -> Bus:
        return KafkaBus(self.kafka, prefix=self.prefix) if self.kafka else LocalBus(DataDir(self.root / "data"))

    def ingest(self, *arguments: str) -> IngestProcess:
        return IngestProcess(
            self.url, self.root / "data", kafka=self.kafka, kafka_prefix=self.prefix, arguments=arguments
        )

    def publish(self, *records: Outgoing) -> None:
        async def publishing() -> None:
            bus = self.bus()
            await bus.create_topics(TOPICS)
            producer = await bus.producer("capture")
            await producer.append(records)
            await producer.close()
            await bus.close()

        asyncio.run(publishing())

    def copies(self, count: int) -> dict[bytes, bytes]:
        """Keys and values of the first `count` copies on the topic; fails where more of them come."""

        async def reading() -> list[Record]:
            bus = self.bus()
            consumer = await bus.consumer(uuid.uuid4().hex, [DEAD_LETTERS])
            found: list[Record] = []
            async with asyncio.timeout(30):
                while len(found) < count:
                    found += (await consumer.poll(timeout=0.2)).records
            await consumer.close()
            await bus.close()
            return found

        found = asyncio.run(reading())
        assert len(found) == count
        return {record.key: record.value for record in found}


@pytest.fixture(params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> Place:
    DataDir(tmp_path / "data").ensure()
    if request.param == "local":
        return Place(tmp_path, database)
    return Place(tmp_path, database, request.getfixturevalue("kafka"), f"t{uuid.uuid4().hex[:8]}-")


def renamed(event: events.AnyEvent, **changes: object) -> bytes:
    """What another version may write: the event with fields added or of another shape."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(events.encode(event)) | changes)


def good(seq: int, **fields: object) -> Outgoing:
    return outbox.outgoing(a_completed_flow(seq=seq, **fields))


def bad(value: bytes, topic: str = FLOWS.name) -> Outgoing:
    return Outgoing(topic, b"key", value)


def letters(url: str) -> list[tuple[str, str]]:
    return rows(url, "SELECT event_type, reason FROM dead_letters ORDER BY id")


def accounted(url: str) -> dict[str, int]:
    """Of all nodes, without what is 0."""
    found = rows(url, "SELECT kind, sum(value)::bigint FROM accounting GROUP BY kind HAVING sum(value) <> 0")
    return dict(found)


def stored(url: str, flow: events.FlowCompleted) -> bool:
    return bool(rows(url, "SELECT 1 FROM flows WHERE flow_id = %s", [ids.to_uuid(flow.flow_id)]))


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def reasons_on_kafka(place: Place, count: int) -> set[str]:
    async def reading() -> set[str]:
        consumer = AIOKafkaConsumer(
            place.prefix + DEAD_LETTERS.name, bootstrap_servers=place.kafka, auto_offset_reset="earliest"
        )
        await consumer.start()
        found: list[str] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [dict(record.headers)["megido_reason"].decode() for record in records]
        await consumer.stop()
        return set(found)

    return asyncio.run(reading())


def test_in_the_table_and_on_the_topic_and_counted_once(place: Place) -> None:
    execute(place.url, REFUSE)
    flow = a_completed_flow(seq=1)
    newer = a_completed_flow(seq=2)
    refused = a_completed_flow(seq=12, request=a_request(host="refused.example"))
    poison = {
        "no MessagePack": bad(POISON),
        "nested too deeply": bad(b"\x81\xa1x" + b"\x91" * 100_000),
        "an unknown type": bad(renamed(a_completed_flow(seq=10), type="FlowRenewed")),
        "a type that changed its shape": bad(renamed(a_completed_flow(seq=11), request="GET http://x/")),
        "what Postgres refuses": outbox.outgoing(refused),
        "an event of a topic that is not stored": bad(
            events.encode(an_event(events.ReplayFlows, job_id=ids.new_id())), AUTH.name
        ),
    }
    process = place.ingest()
    try:
        place.publish(
            outbox.outgoing(flow),
            *poison.values(),
            bad(renamed(newer, colour="blue", depth={"of": ["field"]})),
            good(3),
        )
        until(lambda: len(letters(place.url)) == len(poison), "a dead letter each", seconds=60)
        until(lambda: accounted(place.url).get("stored") == 3, "the neighbours, and the newer schema's")
        assert stored(place.url, flow) and stored(place.url, newer)
        reasons = sorted(reason for _, reason in letters(place.url))
        for part in (
            "FlowRenewed",
            "malformed",
            "RecursionError",
            "Expected `object`",
            "CheckViolation",
            "ReplayFlows",
        ):
            assert any(part in reason for reason in reasons), (part, reasons)
        # A ReplayFlows numbers nothing (seq 0), so accounting has no use for it.
        assert accounted(place.url) == {"stored": 3, "dead_lettered": len(poison) - 1}
        copies = place.copies(len(poison))
        assert sorted(copies.values()) == sorted(record.value for record in poison.values())
        if place.kafka:
            assert reasons_on_kafka(place, len(poison)) == set(reasons)

        # All of it is delivered once more. (A relay that is stopped before it has deleted what it published does it
        # again, which is another matter.)
        until(lambda: not rows(place.url, "SELECT 1 FROM outbox"), "nothing waits to be published")
        assert process.terminate() == 0, process.output
        execute(place.url, "UPDATE ingest_offsets SET \"offset\" = 0, last_event_id = ''")
        last = a_completed_flow(seq=4)
        place.publish(outbox.outgoing(last))
        process = place.ingest()
        until(lambda: accounted(place.url).get("stored") == 4, "what came last", seconds=60)
        auth = "SELECT 1 FROM ingest_offsets WHERE topic = 'megido.auth' AND \"offset\" > 0"
        until(lambda: rows(place.url, auth), "the other topic once more")
        until(lambda: not rows(place.url, "SELECT 1 FROM outbox"), "nothing waits to be published")
        assert len(letters(place.url)) == len(poison)
        assert len(place.copies(len(poison))) == len(poison)
        assert accounted(place.url) == {"stored": 4, "dead_lettered": len(poison) - 1}
    finally:
        process.close()


def test_a_bad_deploy_does_not_turn_the_traffic_into_dead_letters(place: Place) -> None:
    limit = ("--max-dead-letters", "100")
    process = place.ingest(*limit)
    try:
        process.wait_ready()
        mixed = [bad(POISON) if n % 10 == 0 else good(n) for n in range(1, 300)]
        place.publish(*mixed)
        until(lambda: accounted(place.url) == {"stored": 270, "dead_lettered": 29}, "a tenth of poison", seconds=60)
        assert process.get("/readyz") == (200, "ready\n")

        last = a_completed_flow(seq=500)
        # More than a batch: what comes behind the batch that was refused must wait too.
        place.publish(*[bad(POISON)] * 2_050, *[good(n) for n in range(300, 500)], outbox.outgoing(last))
        status, missing = until(
            lambda: (a := process.get("/readyz"))[0] != 200 and a, "storing has stopped", seconds=60
        )
        assert status == 503
        assert "--max-dead-letters" in missing
        until(lambda: "megido_ingest_held 1.0" in process.get("/metrics")[1], "the metric")
        assert process.output.count("storing has stopped, nothing is lost") == 1
        assert "oll back" in process.output
        assert accounted(place.url)["dead_lettered"] <= 100
        assert process.terminate() == 0, process.output

        # The same version once more: it stops again.
        process = place.ingest(*limit)
        until(lambda: "storing has stopped" in process.output, "it stops again", seconds=60)
        assert accounted(place.url)["dead_lettered"] <= 200
        assert process.terminate() == 0, process.output

        # Somebody decides that they may be dead letters.
        process = place.ingest("--max-dead-letters", "0")
        until(lambda: stored(place.url, last), "all that had waited", seconds=60)
        until(lambda: accounted(place.url) == {"stored": 471, "dead_lettered": 2_079}, "nothing lost, nothing twice")
    finally:
        process.close()


async def _store(url: str, batches: Sequence[Sequence[Record]], most: int = 1_000) -> list[Stored]:
    store = Store(url, max_dead_letters=most)
    try:
        done = []
        for records in batches:
            await store.claim({record.stream for record in records})
            done.append(await store.store(prepare(Batch(records), dict(store.generations), store.cache)))
        return done
    finally:
        await store.close()


def again(record: Record, offset: int, attempt: int, value: bytes | None = None) -> Record:
    """The dead letter of `record` as it comes once more, on another stream."""
    key = redrive.key(redrive.Redrive(attempt, record.stream, record.offset))
    return Record(stream(source="ab" * 16), offset, offset + 1, key, record.value if value is None else value)


def queue(url: str, attempt: int) -> None:
    execute(url, f"UPDATE dead_letters SET state = 'queued', attempts = {attempt}")


def states(url: str) -> list[tuple[str, int]]:
    return rows(url, "SELECT state, attempts FROM dead_letters ORDER BY id")


async def test_an_earlier_attempt_says_nothing_about_a_later_one(database: str) -> None:
    (record,) = Log().add(POISON)
    await _store(database, [[record]])
    queue(database, 2)
    await _store(database, [[again(record, 0, attempt=1)]])
    assert states(database) == [("queued", 2)]
    (done,) = await _store(database, [[again(record, 1, attempt=2)]])
    assert (done.letters, done.redriven, done.refused) == (0, 0, 1)
    assert states(database) == [("new", 2)]
    assert accounted(database) == {"dead_lettered": 1}


async def test_a_redrive_that_is_delivered_three_times_leaves_the_count_once(database: str) -> None:
    execute(database, REFUSE)
    (record,) = Log().add(events.encode(a_completed_flow(seq=7, request=a_request(host="refused.example"))))
    (done,) = await _store(database, [[record]])
    assert (done.letters, done.flows) == (1, 0)
    execute(database, "ALTER TABLE flows DROP CONSTRAINT refused")
    queue(database, 1)
    copies = [again(record, n, attempt=1) for n in range(3)]
    (first, second) = await _store(database, [copies[:2], copies])
    assert (first.flows, first.redriven, second.flows, second.redriven) == (1, 1, 0, 0)
    assert states(database) == [("redriven", 1)]
    query = "SELECT kind, node, sum(value)::bigint FROM accounting GROUP BY kind, node ORDER BY kind"
    assert rows(database, query) == [("dead_lettered", "test-0", 0), ("stored", "test-0", 1)]


async def test_redrives_in_a_database_made_anew(database: str) -> None:
    """It has no such dead letter: what cannot be stored becomes one, under the place where it was first."""
    first, second = Log().add(POISON, events.encode(a_completed_flow(seq=1)))
    batch = [again(first, 0, attempt=3), again(second, 1, attempt=1)]
    await _store(database, [batch, batch])
    assert states(database) == [("new", 3)]
    assert rows(database, 'SELECT source_id, "offset" FROM dead_letters') == [(first.stream.source_id, first.offset)]
    assert accounted(database) == {"dead_lettered": 1, "stored": 1}
    assert rows(database, "SELECT count(*) FROM outbox") == [(1,)]
    await _store(database, [[first]])
    assert accounted(database) == {"dead_lettered": 1, "stored": 1}


async def test_the_limit_counts_no_dead_letter_twice(database: str) -> None:
    """A topic that is delivered once more brings all of its dead letters at once."""
    log = Log()
    log.add(*[POISON] * 90)
    most = 900  # a share counts from 90 on
    for start in range(0, 90, 30):
        await _store(database, [log.records[start : start + 30]], most)
    log.add(*[events.encode(a_completed_flow(seq=n)) for n in range(1, 11)])
    (done,) = await _store(database, [log.records], most)
    assert (done.letters, done.flows) == (0, 10)
