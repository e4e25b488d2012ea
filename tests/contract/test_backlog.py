"""What a bus says that its streams hold behind a position."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import pytest

from megido_shared.bus.base import Backlog, Bus, Stream
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.local import Journal, LocalBus
from megido_shared.bus.topics import FLOWS, REPLAY_RESULTS, TOPICS
from megido_shared.datadir import DataDir
from megido_shared.db.outbox import outgoing
from megido_shared.testing import a_completed_flow

ENOUGH = 1 << 20


@pytest.fixture(params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
async def bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    """An empty one."""
    opened: Bus
    if request.param == "local":
        opened = LocalBus(DataDir(tmp_path / "data"))
    else:
        opened = KafkaBus(request.getfixturevalue("kafka"), prefix=f"t{uuid4().hex}-")
    yield opened
    await opened.close()


async def test_a_bus_without_topics_holds_nothing(bus: Bus) -> None:
    assert await bus.backlog({}, read_bytes=ENOUGH) == {}


async def test_what_lies_behind_the_positions(bus: Bus) -> None:
    await bus.create_topics(TOPICS)
    producer = await bus.producer("writer")
    await producer.append([outgoing(a_completed_flow()) for _ in range(20)])
    await producer.close()
    whole = await bus.backlog({}, read_bytes=ENOUGH)
    held = {stream for stream, backlog in whole.items() if backlog.behind}
    assert {stream.topic for stream in held} == {FLOWS.name}
    assert REPLAY_RESULTS.name not in {stream.topic for stream in whole}

    consumer = await bus.consumer("reader", [FLOWS])
    ends: dict[Stream, int] = {}
    async with asyncio.timeout(40):
        while not held <= ends.keys():
            ends |= (await consumer.poll(timeout=0.5)).positions()
    await consumer.close()
    drained = await bus.backlog(ends, read_bytes=ENOUGH)
    assert drained.keys() == whole.keys() and set(drained.values()) == {Backlog(0)}
    one = min(held)
    behind = await bus.backlog(ends | {one: 0}, read_bytes=ENOUGH)
    assert {stream for stream, backlog in behind.items() if backlog.behind} == {one}


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


def written(data: DataDir, seqs: range, damage: Callable[[Path], None] | None = None) -> Stream:
    """A journal with a start between each two terminal records."""
    journal = Journal.open(data, "capture")
    for seq in seqs:
        journal.append(FLOWS.name, b"k", bytes(1000), journal.next_seq())
        assert journal.last_seq == seq
        journal.append(FLOWS.name, b"k", b"a start")
    stream = Stream(journal.epoch.hex(), FLOWS.name, 0)
    journal.close()
    if damage:
        damage(min((data.bus / "capture-0").glob("*.log")))
    return stream


async def test_records_of_a_journal_are_counted_over_its_segments(data: DataDir) -> None:
    written(data, range(1, 4))
    stream = written(data, range(4, 6))
    found = (await LocalBus(data).backlog({}, read_bytes=ENOUGH))[stream]
    assert (found.counted, found.last_seq) == (5, 5)
    first = found.behind // 5  # a terminal record and a start
    for done in range(6):
        left = (await LocalBus(data).backlog({stream: done * first}, read_bytes=ENOUGH))[stream]
        assert (left.counted, left.last_seq, left.behind) == (5 - done, 5 if done < 5 else 0, (5 - done) * first)


async def test_more_than_may_be_read_is_not_counted(data: DataDir) -> None:
    stream = written(data, range(1, 4))
    found = (await LocalBus(data).backlog({}, read_bytes=1000))[stream]
    assert found.counted is None and found.behind > 3000


async def test_freed_segments_are_not_taken_for_read_ones(data: DataDir) -> None:
    written(data, range(1, 4))
    stream = written(data, range(4, 6))
    min((data.bus / "capture-0").glob("*.log")).unlink()
    assert (await LocalBus(data).backlog({}, read_bytes=ENOUGH))[stream].counted is None


async def test_a_damaged_record_is_none(data: DataDir) -> None:
    def flip(segment: Path) -> None:
        with segment.open("r+b") as file:
            file.seek(500)
            file.write(b"\xff")

    stream = written(data, range(1, 4), flip)
    found = (await LocalBus(data).backlog({}, read_bytes=ENOUGH))[stream]
    assert (found.counted, found.last_seq) == (2, 3)
