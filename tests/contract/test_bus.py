"""What `megido_shared.bus.base` promises, on every bus."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from megido_shared import events, ids
from megido_shared.bus.base import Bus, Consumer, Gap, Outgoing, Position, Record, Stream
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import TOPICS, Topic
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow

type OpenBus = Callable[[], Bus]

PATIENCE = 40.0


@pytest.fixture(params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
def open_bus(request: pytest.FixtureRequest, tmp_path: Path) -> OpenBus:
    """Opens one and the same bus, as often as it is called."""
    if request.param == "local":
        return lambda: LocalBus(DataDir(tmp_path / "data"))
    address = request.getfixturevalue("kafka")
    return lambda: KafkaBus(address)


@pytest.fixture
async def bus(open_bus: OpenBus) -> AsyncIterator[Bus]:
    opened = open_bus()
    yield opened
    await opened.close()


@pytest.fixture
async def topic(bus: Bus) -> Topic:
    made = a_topic()
    assert await bus.create_topics([made]) == [made.name]
    return made


def a_topic() -> Topic:
    return Topic(f"t-{uuid4().hex}", 4, "delete", "key")


def a_group() -> str:
    return f"g-{uuid4().hex}"


def a_record(topic: Topic, key: int, n: int) -> Outgoing:
    return Outgoing(topic.name, b"key-%d" % key, b"%d" % n)


async def append(bus: Bus, records: Sequence[Outgoing], name: str = "writer") -> None:
    producer = await bus.producer(name)
    try:
        await producer.append(records)
    finally:
        await producer.close()


async def read(consumer: Consumer, count: int, *, commit: bool = False) -> tuple[list[Record], list[Gap]]:
    """Polls until `count` records are there."""
    records: list[Record] = []
    gaps: list[Gap] = []
    deadline = time.monotonic() + PATIENCE
    while len(records) < count and time.monotonic() < deadline:
        batch = await consumer.poll(timeout=0.5)
        records.extend(batch.records)
        gaps.extend(batch.gaps)
        if commit:
            await consumer.commit(batch.positions())
    assert len(records) >= count, f"{len(records)} of {count} records came"
    return records, gaps


@contextlib.asynccontextmanager
async def member(bus: Bus, group: str, *topics: Topic, **options: object) -> AsyncIterator[Consumer]:
    consumer = await bus.consumer(group, topics, **options)  # type: ignore[arg-type]
    try:
        yield consumer
    finally:
        await consumer.close()


async def test_records_come_in_order_for_each_key(bus: Bus, topic: Topic) -> None:
    producer = await bus.producer("writer")
    for start in range(0, 300, 50):
        await producer.append([a_record(topic, n % 7, n) for n in range(start, start + 50)])
    await producer.close()
    async with member(bus, a_group(), topic) as consumer:
        records, gaps = await read(consumer, 300)
    assert not gaps
    assert sorted(int(record.value) for record in records) == list(range(300))
    for key in range(7):
        mine = [int(record.value) for record in records if record.key == b"key-%d" % key]
        assert mine == sorted(mine)


async def test_every_offset_leads_to_the_next_record_of_its_stream(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, n, n) for n in range(50)])
    async with member(bus, a_group(), topic) as consumer:
        records, _ = await read(consumer, 50)
        assert {record.stream for record in records} <= consumer.assigned()
    for stream in {record.stream for record in records}:
        mine = [record for record in records if record.stream == stream]
        assert [record.next_offset for record in mine[:-1]] == [record.offset for record in mine[1:]]


@pytest.mark.parametrize(
    "value",
    [b"", bytes(range(256)), b"\x00" * 1000, os.urandom(900 * 1024)],
    ids=["empty", "every byte", "zeros", "900 KB"],
)
async def test_bytes_come_back_as_they_were(bus: Bus, topic: Topic, value: bytes) -> None:
    key = bytes(range(256))
    await append(bus, [Outgoing(topic.name, key, value)])
    async with member(bus, a_group(), topic) as consumer:
        records, _ = await read(consumer, 1)
    assert [(record.key, record.value) for record in records] == [(key, value)]


async def test_a_poll_keeps_to_its_limits(bus: Bus, topic: Topic) -> None:
    await append(bus, [Outgoing(topic.name, b"k", bytes(1000)) for _ in range(100)])
    async with member(bus, a_group(), topic) as consumer:
        seen = 0
        deadline = time.monotonic() + PATIENCE
        while seen < 40 and time.monotonic() < deadline:
            batch = await consumer.poll(max_records=10)
            assert len(batch.records) <= 10
            seen += len(batch.records)
        while seen < 80 and time.monotonic() < deadline:
            batch = await consumer.poll(max_bytes=3000)
            assert len(batch.records) <= 3
            seen += len(batch.records)
        first = await consumer.poll(max_bytes=1)
        assert len(first.records) == 1, "a record greater than the limit comes alone"


async def test_an_empty_poll_waits_no_longer_than_asked(bus: Bus, topic: Topic) -> None:
    async with member(bus, a_group(), topic) as consumer:
        await consumer.poll(timeout=0.1)
        begin = time.monotonic()
        assert not await consumer.poll(timeout=0.3)
        assert 0.2 < time.monotonic() - begin < 5


async def test_a_waiting_poll_is_woken_by_a_new_record(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, 0, 0)])
    async with member(bus, a_group(), topic) as consumer:
        await read(consumer, 1)
        polling = asyncio.create_task(consumer.poll(timeout=30))
        await asyncio.sleep(0)
        await append(bus, [a_record(topic, 0, 1)])
        batch = await asyncio.wait_for(polling, PATIENCE)
    assert [record.value for record in batch.records] == [b"1"]


async def test_a_cancelled_poll_loses_nothing(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, n, n) for n in range(1000)])
    values: list[int] = []
    async with member(bus, a_group(), topic) as consumer:
        deadline = time.monotonic() + PATIENCE
        attempt = 0
        while len(values) < 1000 and time.monotonic() < deadline:
            # Cancelled after every possible number of the loop's turns, so also just when a batch is ready.
            attempt += 1
            polling = asyncio.create_task(consumer.poll(max_records=7))
            for _ in range(attempt % 50):
                await asyncio.sleep(0 if attempt % 2 else 0.0001)
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                values += [int(record.value) for record in (await polling).records]
    assert sorted(values) == list(range(1000))


async def test_a_group_goes_on_where_it_committed(bus: Bus, topic: Topic) -> None:
    group = a_group()
    await append(bus, [a_record(topic, n, n) for n in range(20)])
    async with member(bus, group, topic) as consumer:
        await read(consumer, 20, commit=True)
        await append(bus, [a_record(topic, n, n) for n in range(20, 25)], "other")
        await read(consumer, 5)  # not committed
    async with member(bus, group, topic) as consumer:
        records, gaps = await read(consumer, 5)
        assert not await consumer.poll(timeout=0.5)
    assert sorted(int(record.value) for record in records) == list(range(20, 25))
    assert not gaps


async def test_groups_do_not_know_of_each_other(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, n, n) for n in range(10)])
    async with member(bus, a_group(), topic) as one, member(bus, a_group(), topic) as other:
        await read(one, 10, commit=True)
        records, _ = await read(other, 10)
    assert len(records) == 10


async def test_commits_of_foreign_streams_are_ignored(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, 0, 0)])
    async with member(bus, a_group(), topic) as consumer:
        await read(consumer, 1)
        await consumer.commit({Stream("elsewhere", topic.name, 0): 7})


async def test_a_stored_position_wins_over_the_commit(bus: Bus, topic: Topic) -> None:
    group = a_group()
    await append(bus, [a_record(topic, 0, n) for n in range(10)])
    async with member(bus, group, topic) as consumer:
        records, _ = await read(consumer, 10, commit=True)
    fifth = records[5]
    asked: list[Stream] = []

    async def resume(streams: object) -> dict[Stream, Position]:
        asked.extend(streams)  # type: ignore[call-overload]
        return {fifth.stream: Position(fifth.offset)}

    async with member(bus, group, topic, resume=resume) as consumer:
        again, gaps = await read(consumer, 5)
    assert [record.value for record in again] == [b"5", b"6", b"7", b"8", b"9"]
    assert not gaps
    assert fifth.stream in asked


async def _publish_flows(bus: Bus, topic: Topic, count: int) -> list[events.FlowCompleted]:
    flows = [a_completed_flow() for _ in range(count)]
    await append(
        bus, [Outgoing(topic.name, b"k", events.encode(flow), events.cloud_event_headers(flow)) for flow in flows]
    )
    return flows


async def _positions_after(bus: Bus, topic: Topic, count: int) -> list[Record]:
    async with member(bus, a_group(), topic) as consumer:
        records, _ = await read(consumer, count)
    return records


async def test_a_position_whose_event_matches_is_taken(bus: Bus, topic: Topic) -> None:
    flows = await _publish_flows(bus, topic, 6)
    records = await _positions_after(bus, topic, 6)

    async def resume(streams: object) -> dict[Stream, Position]:
        return {records[3].stream: Position(records[3].offset, flows[2].event_id)}

    async with member(bus, a_group(), topic, resume=resume) as consumer:
        again, gaps = await read(consumer, 3)
    assert [events.decode(record.value).event_id for record in again] == [flow.event_id for flow in flows[3:]]
    assert not gaps


async def test_a_position_of_another_log_starts_over(bus: Bus, topic: Topic) -> None:
    await _publish_flows(bus, topic, 6)
    records = await _positions_after(bus, topic, 6)

    async def resume(streams: object) -> dict[Stream, Position]:
        return {records[3].stream: Position(records[3].offset, ids.new_id())}

    async with member(bus, a_group(), topic, resume=resume) as consumer:
        again, gaps = await read(consumer, 6)
    assert [record.value for record in again] == [record.value for record in records]
    assert [(gap.kind, gap.next_offset) for gap in gaps] == [("rewound", records[0].offset)]


async def test_a_position_behind_the_end_starts_over(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, 0, n) for n in range(3)])
    records = await _positions_after(bus, topic, 3)

    async def resume(streams: object) -> dict[Stream, Position]:
        return {records[0].stream: Position(records[-1].next_offset + 1000)}

    async with member(bus, a_group(), topic, resume=resume) as consumer:
        again, gaps = await read(consumer, 3)
    assert len(again) == 3
    assert [gap.kind for gap in gaps] == ["rewound"]


async def test_an_error_of_resume_reaches_poll_and_the_next_poll_asks_again(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, 0, 0)])
    answers = iter([ConnectionError("the database is away")])

    async def resume(streams: object) -> dict[Stream, Position]:
        for error in answers:
            raise error
        return {}

    async with member(bus, a_group(), topic, resume=resume) as consumer:
        with pytest.raises(Exception, match="the database is away"):
            await read(consumer, 1)
        records, _ = await read(consumer, 1)
    assert len(records) == 1


async def test_members_share_the_streams(bus: Bus, topic: Topic) -> None:
    producers = [await bus.producer("writer") for _ in range(4)]
    for n, producer in enumerate(producers):
        await producer.append([a_record(topic, key, 100 * n + key) for key in range(30)])
    group = a_group()
    revoked: list[Stream] = []

    async def on_revoked(streams: object) -> None:
        revoked.extend(streams)  # type: ignore[call-overload]

    async with member(bus, group, topic, revoked=on_revoked) as first:
        await read(first, 120, commit=True)
        streams = first.assigned()
        assert len(streams) == 4
        async with member(bus, group, topic) as second:
            deadline = time.monotonic() + PATIENCE
            while not (len(first.assigned()) == 2 == len(second.assigned())) and time.monotonic() < deadline:
                await asyncio.gather(first.poll(timeout=0.2), second.poll(timeout=0.2))
            assert first.assigned() | second.assigned() == streams
            assert not first.assigned() & second.assigned()
            assert set(revoked) >= second.assigned()
            for n, producer in enumerate(producers):
                await producer.append([a_record(topic, key, 1000 + 100 * n + key) for key in range(30)])
            (mine, _), (theirs, _) = await asyncio.gather(_drain(first), _drain(second))
            values = sorted(int(record.value) for record in [*mine, *theirs])
            assert values == sorted(1000 + 100 * n + key for n in range(4) for key in range(30))
            assert mine
            assert theirs
            await second.commit({record.stream: record.next_offset for record in theirs})
            await first.commit({record.stream: record.next_offset for record in mine})
        while first.assigned() != streams and time.monotonic() < deadline:
            await first.poll(timeout=0.2)
        assert first.assigned() == streams
    for producer in producers:
        await producer.close()


async def _drain(consumer: Consumer) -> tuple[list[Record], list[Gap]]:
    """Until nothing has come for a second and a half."""
    records: list[Record] = []
    gaps: list[Gap] = []
    while batch := await consumer.poll(timeout=1.5):
        records.extend(batch.records)
        gaps.extend(batch.gaps)
    return records, gaps


CRASHING = """
import asyncio, sys
from pathlib import Path
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import Topic
from megido_shared.datadir import DataDir

async def main(kind, where, group, topic):
    bus = KafkaBus(where) if kind == "kafka" else LocalBus(DataDir(Path(where)))
    consumer = await bus.consumer(group, [Topic(topic, 4, "delete", "key")], pins=True)
    seen = 0
    while True:
        batch = await consumer.poll(max_records=10, timeout=0.2)
        if seen < 40:
            await consumer.commit(batch.positions())
        seen += len(batch.records)
        for record in batch.records:
            print(record.value.decode(), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_member_killed_before_its_commit_loses_nothing(
    request: pytest.FixtureRequest, bus: Bus, topic: Topic, tmp_path: Path
) -> None:
    kind = "kafka" if isinstance(bus, KafkaBus) else "local"
    where = request.getfixturevalue("kafka") if kind == "kafka" else str(tmp_path / "data")
    await append(bus, [a_record(topic, n, n) for n in range(100)])
    group = a_group()
    child = subprocess.Popen(
        [sys.executable, "-c", CRASHING, kind, where, group, topic.name], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    seen = {int(await asyncio.to_thread(child.stdout.readline)) for _ in range(60)}
    child.send_signal(signal.SIGKILL)
    seen |= {int(line) for line in child.stdout.read().split()}
    child.wait()
    child.stdout.close()
    async with member(bus, group, topic) as consumer:
        rest: set[int] = set()
        deadline = time.monotonic() + PATIENCE
        while seen | rest != set(range(100)) or len(rest) < 60:
            rest |= {int(record.value) for record in (await consumer.poll(timeout=0.5)).records}
            assert time.monotonic() < deadline, f"{len(rest)} of the rest came"
    assert len(rest) <= 90, "what was committed does not come again"


async def test_lag_falls_with_the_commits(bus: Bus, topic: Topic) -> None:
    await append(bus, [a_record(topic, n, n) for n in range(30)])
    async with member(bus, a_group(), topic) as consumer:
        await consumer.poll(max_records=1, timeout=5)
        behind = sum((await consumer.lag()).values())
        assert behind >= 30
        await read(consumer, 29, commit=True)
        assert 0 <= sum((await consumer.lag()).values()) < behind
        batch_ends = await _ends(bus, topic)
        await consumer.commit(batch_ends)
        assert set((await consumer.lag()).values()) == {0}
        await append(bus, [a_record(topic, 0, 99)], "other")
        deadline = time.monotonic() + PATIENCE
        while not sum((await consumer.lag()).values()) and time.monotonic() < deadline:
            await consumer.poll(timeout=0.1)
        assert sum((await consumer.lag()).values()) > 0


async def _ends(bus: Bus, topic: Topic) -> dict[Stream, int]:
    async with member(bus, a_group(), topic) as consumer:
        records, _ = await read(consumer, 30)
        return {record.stream: record.next_offset for record in records}


async def test_all_topics_of_the_table_can_be_made_and_made_again(bus: Bus) -> None:
    await bus.create_topics(TOPICS)
    assert await bus.create_topics(TOPICS) == []
    assert {topic.name for topic in TOPICS} <= await bus.topics()


async def test_configuration_is_the_last_value_of_a_scope(bus: Bus) -> None:
    await bus.create_topics(TOPICS)
    scope, other = f"app:{uuid4().hex}/../x", f"node:{uuid4().hex}"
    assert await bus.get_config(scope) is None
    await bus.put_config(scope, b"one")
    await bus.put_config(other, b"other")
    await bus.put_config(scope, bytes(range(256)))
    assert await bus.get_config(scope) == bytes(range(256))
    assert await bus.get_config(other) == b"other"
    found = await bus.get_configs()
    assert (found[scope], found[other]) == (bytes(range(256)), b"other")


async def test_watching_tells_the_current_value_and_the_later_ones(bus: Bus, open_bus: OpenBus) -> None:
    await bus.create_topics(TOPICS)
    scope, unset = f"app:{uuid4().hex}", f"app:{uuid4().hex}"
    await bus.put_config(scope, b"one")
    elsewhere = open_bus()
    watched = elsewhere.watch_config([scope, unset])
    async with asyncio.timeout(PATIENCE):
        assert await anext(watched) == (scope, b"one")
        await bus.put_config(f"app:{uuid4().hex}", b"of nobody here")
        await bus.put_config(scope, b"two")
        assert await anext(watched) == (scope, b"two")
        await bus.put_config(unset, b"first")
        assert await anext(watched) == (unset, b"first")
    await watched.aclose()  # type: ignore[attr-defined]
    await elsewhere.close()


async def test_ping_answers(bus: Bus) -> None:
    await bus.create_topics([a_topic()])
    await bus.ping()


async def test_closing_takes_no_time(open_bus: OpenBus) -> None:
    bus = open_bus()
    topic = a_topic()
    await bus.create_topics([topic])
    producer = await bus.producer("writer")
    await producer.append([a_record(topic, 0, 0)])
    consumer = await bus.consumer(a_group(), [topic])
    await consumer.poll(timeout=0.1)
    begin = time.monotonic()
    await producer.close()
    await consumer.close()
    await bus.close()
    assert time.monotonic() - begin < 10
