"""What only the local bus can meet: damaged, unfinished and freed segments, dead writers, many processes."""

import asyncio
import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from megido_shared.bus.base import Batch, Gap, Record, Stream
from megido_shared.bus.local import Journal, LocalBus, follow, group_is_live, locks
from megido_shared.bus.local.consumer import LocalConsumer
from megido_shared.bus.local.groups import Group
from megido_shared.bus.local.reader import StreamReader
from megido_shared.bus.local.segments import OVERHEAD, list_segments, pack
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.errors import Unavailable

T = FLOWS.name
RECORD = OVERHEAD + 1 + 1000


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


def fill(journal: Journal, *values: bytes) -> None:
    for value in values:
        assert journal.append(T, b"k", value, journal.next_seq())


def kilobytes(count: int) -> list[bytes]:
    return [b"%1000d" % n for n in range(count)]


def newest(data: DataDir, node: str = "capture-0") -> Path:
    return data.bus / node / list_segments(data.bus / node)[T][-1].file


@asynccontextmanager
async def reading(data: DataDir, group: str = "ingest", **options: object) -> AsyncIterator[LocalConsumer]:
    consumer = await LocalBus(data).consumer(group, [FLOWS], **options)  # type: ignore[arg-type]
    assert isinstance(consumer, LocalConsumer)
    try:
        yield consumer
    finally:
        await consumer.close()


async def until(consumer: LocalConsumer, enough: Callable[[list[Record], list[Gap]], bool]) -> Batch:
    records: list[Record] = []
    gaps: list[Gap] = []
    async with asyncio.timeout(20):
        while not enough(records, gaps):
            batch = await consumer.poll(timeout=0.2)
            records += batch.records
            gaps += batch.gaps
    return Batch(records, gaps)


async def test_each_flipped_byte_is_one_lost_record_and_one_gap_with_live_and_with_dead_writers(data: DataDir) -> None:
    values = [b"", b"one", bytes(range(256)), b"three" * 20, b"four"]
    rng = random.Random(7)
    print("seed 7")
    for live in (True, False):
        for round_ in range(100):
            journal = Journal.open(data, f"n{live}{round_}")
            fill(journal, *values)
            path = newest(data, journal.node)
            raw = bytearray(path.read_bytes())
            # The last record of a live writer may always be on its way: only what follows it tells.
            last = len(raw) - (OVERHEAD + 1 + len(values[-1]))
            at = rng.randrange(last if live else len(raw))
            raw[at] ^= 1 << rng.randrange(8)
            path.write_bytes(raw)
            if not live:
                journal.close()
            ends = [sum(OVERHEAD + 1 + len(value) for value in values[: n + 1]) for n in range(len(values))]
            hit = next(n for n, end in enumerate(ends) if at < end)
            stream = Stream(journal.epoch.hex(), T, 0)
            one = await LocalBus(data).consumer(f"g{live}{round_}", [FLOWS])
            async with asyncio.timeout(20):
                found = Batch()
                while len(found.records) < len(values) - 1 or not found.gaps:
                    batch = await one.poll(timeout=0.2)
                    found = Batch(
                        [*found.records, *(record for record in batch.records if record.stream == stream)],
                        [*found.gaps, *(gap for gap in batch.gaps if gap.stream == stream)],
                    )
            assert [record.value for record in found.records] == values[:hit] + values[hit + 1 :]
            start = ends[hit] - OVERHEAD - 1 - len(values[hit])
            assert found.gaps == [Gap(stream, start, ends[hit], "corrupt", 1)], f"byte {at}, live {live}"
            await one.close()
            journal.close()
            for file in (data.bus / journal.node).iterdir():
                file.unlink()


async def test_an_unfinished_record_of_a_live_writer_is_waited_for(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, b"whole")
    path = newest(data)
    marker = list_segments(path.parent)[T][-1].marker
    late = pack(marker, b"k", b"late", 9)
    for part in range(1, len(late)):
        begin = path.stat().st_size
        with path.open("ab") as file:
            file.write(late[:part])
        async with reading(data, f"g{part}") as consumer:
            found = await until(consumer, lambda records, gaps: bool(records))
            assert not found.gaps
            assert not await consumer.poll(timeout=0.02)
            if part in (1, 20, len(late) - 1):
                with path.open("ab") as file:
                    file.write(late[part:])
                found = await until(consumer, lambda records, gaps: bool(records))
                assert ([record.value for record in found.records], found.gaps) == ([b"late"], [])
        os.truncate(path, begin)
    journal.close()


async def test_the_tail_of_a_dead_writer_is_torn_once_and_reading_goes_on(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, b"one", b"two")
    async with reading(data) as consumer:
        await until(consumer, lambda records, gaps: len(records) == 2)
        path = newest(data)
        end = path.stat().st_size
        with path.open("ab") as file:
            file.write(pack(list_segments(path.parent)[T][-1].marker, b"k", b"three", 3)[:-2])
        assert not await consumer.poll(timeout=0.1)
        journal.close()
        found = await until(consumer, lambda records, gaps: bool(gaps))
        torn = path.stat().st_size
        assert found.gaps == [Gap(Stream(journal.epoch.hex(), T, 0), end, torn, "torn", 1)]
        again = Journal.open(data, "capture")
        fill(again, b"four")
        found = await until(consumer, lambda records, gaps: bool(records))
        assert [(record.value, record.offset) for record in found.records] == [(b"four", torn)]
        assert not found.gaps
        await consumer.commit(found.positions())
        assert set((await consumer.lag()).values()) == {0}
        again.close()


async def test_a_record_damaged_in_a_live_segment_is_passed_over_when_the_next_one_comes(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, b"one", b"two")
    path = newest(data)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    async with reading(data) as consumer:
        found = await until(consumer, lambda records, gaps: bool(records))
        assert ([record.value for record in found.records], found.gaps) == ([b"one"], [])
        fill(journal, b"three")
        found = await until(consumer, lambda records, gaps: bool(records))
        assert [record.value for record in found.records] == [b"three"]
        assert [(gap.kind, gap.count) for gap in found.gaps] == [("corrupt", 1)]
    journal.close()


async def test_offsets_run_through_segments_without_a_jump(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=3 * RECORD)
    fill(journal, *kilobytes(20))
    async with reading(data) as consumer:
        found = await until(consumer, lambda records, gaps: len(records) == 20)
    assert [record.offset for record in found.records] == [n * RECORD for n in range(20)]
    assert [record.next_offset for record in found.records] == [(n + 1) * RECORD for n in range(20)]
    assert [record.value for record in found.records] == kilobytes(20)
    journal.close()


async def test_a_record_greater_than_every_buffer_comes_whole(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=1 << 20)
    values = [os.urandom(size) for size in (10, 3 << 20, 10, 15 << 20, 10)]
    fill(journal, *values)
    async with reading(data) as consumer:
        found = await until(consumer, lambda records, gaps: len(records) == 5)
    assert [record.value for record in found.records] == values
    journal.close()


async def test_freed_segments_are_an_expired_gap(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=2 * RECORD)
    fill(journal, *kilobytes(10))
    async with reading(data) as consumer:
        await until(consumer, lambda records, gaps: len(records) == 10)
        await consumer.commit({Stream(journal.epoch.hex(), T, 0): RECORD})
    names = list_segments(data.bus / "capture-0")[T]
    for name in names[:2]:
        (data.bus / "capture-0" / name.file).unlink()
    async with reading(data) as consumer:
        found = await until(consumer, lambda records, gaps: len(records) == 6)
    assert [record.value for record in found.records] == kilobytes(10)[4:]
    assert found.gaps == [Gap(Stream(journal.epoch.hex(), T, 0), RECORD, 4 * RECORD, "expired", 0)]
    journal.close()


async def test_segments_freed_under_a_reader_are_an_expired_gap_too(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=2 * RECORD)
    fill(journal, *kilobytes(10))
    async with reading(data) as consumer:
        first = await consumer.poll(max_records=1)
        while not first:
            first = await consumer.poll(max_records=1)
        for name in list_segments(data.bus / "capture-0")[T][:4]:
            (data.bus / "capture-0" / name.file).unlink()
        found = await until(consumer, lambda records, gaps: bool(records) and records[-1].value == kilobytes(10)[-1])
        assert [gap.kind for gap in found.gaps] == ["expired"]
        assert found.gaps[0].next_offset == 8 * RECORD
    journal.close()


async def test_the_end_of_a_segment_that_a_power_failure_took_is_a_gap(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=3 * RECORD)
    fill(journal, *kilobytes(6))
    os.truncate(data.bus / "capture-0" / list_segments(data.bus / "capture-0")[T][0].file, RECORD)
    async with reading(data) as consumer:
        found = await until(consumer, lambda records, gaps: len(records) == 4)
    assert [record.value for record in found.records] == [kilobytes(6)[0], *kilobytes(6)[3:]]
    assert found.gaps == [Gap(Stream(journal.epoch.hex(), T, 0), RECORD, 3 * RECORD, "corrupt", 0)]
    journal.close()


async def test_a_new_producer_is_found_while_polling(data: DataDir) -> None:
    async with reading(data) as consumer:
        polling = asyncio.create_task(consumer.poll(timeout=20))
        await asyncio.sleep(0.1)  # it waits already; the case is a start in the middle of a poll
        journal = await asyncio.to_thread(Journal.open, data, "capture")
        fill(journal, b"first")
        begin = time.monotonic()
        batch = await polling
        assert [record.value for record in batch.records] == [b"first"]
        assert time.monotonic() - begin < 2
    journal.close()


async def test_a_consumer_frees_the_segments_of_slots_without_a_writer_and_only_those(data: DataDir) -> None:
    dead = Journal.open(data, "dead", segment_bytes=2 * RECORD)
    fill(dead, *kilobytes(10))
    dead.close()
    async with reading(data, pins=True) as consumer:
        found = await until(consumer, lambda records, gaps: len(records) == 10)
        writer = os.open(data.bus / "dead-0" / locks.SLOT_LOCK, os.O_RDWR)
        assert locks.try_lock(writer)
        await consumer.commit({record.stream: record.offset for record in found.records})
        assert len(list_segments(data.bus / "dead-0")[T]) == 5
        os.close(writer)
        async with asyncio.timeout(20):
            for offset in (9 * RECORD, 10 * RECORD) * 100:
                await consumer.commit({found.records[0].stream: offset})
                if len(list_segments(data.bus / "dead-0")[T]) == 1:
                    break
                await asyncio.sleep(0.1)
    assert len(list_segments(data.bus / "dead-0")[T]) == 1


class Faulty:
    """Makes a method of the readers of one slot fail as with too many open files, until it is told otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, slot: str, after: int = 0) -> None:
        self.active = True
        self.left = after
        real = getattr(StreamReader, method)

        def call(reader: StreamReader, *arguments: object) -> object:
            if self.active and reader.slot.name == slot:
                if self.left <= 0:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(reader.slot))
                self.left -= 1
            return real(reader, *arguments)

        monkeypatch.setattr(StreamReader, method, call)


@pytest.mark.parametrize(("streams", "after"), [(3, 0), (1, 1)])
async def test_a_stream_that_cannot_be_read_now_costs_no_record(
    data: DataDir, monkeypatch: pytest.MonkeyPatch, streams: int, after: int
) -> None:
    """Neither one of the other streams, which were read already, nor (`after` a first piece) one of its own."""
    journals = [Journal.open(data, "capture") for _ in range(streams)]
    values = [[b"%d %1000d" % (number, n) for n in range(1500)] for number in range(streams)]
    for journal, part in zip(journals, values, strict=True):
        fill(journal, *part)
    faulty = Faulty(monkeypatch, "_step", journals[-1].node, after)
    async with reading(data) as consumer:
        seen: list[bytes] = []
        async with asyncio.timeout(20):
            while True:
                try:
                    seen += [record.value for record in (await consumer.poll(timeout=0)).records]
                except Unavailable as error:
                    assert "Too many open files" in str(error)
                    break
        faulty.active = False
        found = await until(consumer, lambda records, gaps: len(seen) + len(records) >= 1500 * streams)
        seen += [record.value for record in found.records]
    assert sorted(seen) == sorted(value for part in values for value in part)
    for journal in journals:
        journal.close()


async def test_a_stream_that_cannot_be_begun_is_left_to_the_next_look(
    data: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals = [Journal.open(data, "capture") for _ in range(2)]
    for journal in journals:
        fill(journal, b"value")
        Group(data, "ingest").write_ack(Stream(journal.epoch.hex(), T, 0), 0)
    faulty = Faulty(monkeypatch, "seek", journals[0].node)
    async with reading(data) as consumer:
        with pytest.raises(Unavailable, match="Too many open files"):
            await consumer.poll(timeout=1)
        faulty.active = False
        await until(consumer, lambda records, gaps: len(records) == 2)
    for journal in journals:
        journal.close()


async def test_whether_a_group_is_live_can_be_asked_without_disturbing_it(data: DataDir) -> None:
    assert not group_is_live(data, "ingest")
    async with reading(data):
        assert group_is_live(data, "ingest")
        assert not group_is_live(data, "forwarder")
    assert not group_is_live(data, "ingest")


def test_asking_whether_a_lock_is_held_never_takes_it(tmp_path: Path) -> None:
    holder, asking, other = (locks.open_lock_file(tmp_path / "lock") for _ in range(3))
    assert not locks.is_locked(asking)
    assert locks.try_lock(holder)
    assert locks.is_locked(asking)
    assert not locks.try_lock(other)
    assert not locks.is_locked(holder), "one's own lock is in nobody's way"
    os.close(holder)
    assert locks.try_lock(other)
    for fd in (asking, other):
        os.close(fd)


async def test_a_follower_goes_on_where_the_other_group_was(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, *kilobytes(4))
    stream = Stream(journal.epoch.hex(), T, 0)
    async with reading(data) as consumer:
        await until(consumer, lambda records, gaps: len(records) == 4)
        await consumer.commit({stream: 3 * RECORD})
    follow(data, "ingest", "forwarder")
    Group(data, "ingest").write_ack(stream, RECORD)
    follow(data, "ingest", "forwarder")
    async with reading(data, "forwarder") as consumer:
        found = await until(consumer, lambda records, gaps: bool(records))
    assert [record.value for record in found.records] == kilobytes(4)[3:]
    journal.close()


async def test_an_idle_consumer_costs_little_and_notices_soon(data: DataDir) -> None:
    journals = [Journal.open(data, "capture") for _ in range(3)]
    for journal in journals:
        fill(journal, b"first")
    async with reading(data) as consumer:
        await until(consumer, lambda records, gaps: len(records) == 3)
        before = time.thread_time()
        await consumer.poll(timeout=2)
        assert (time.thread_time() - before) / 2 < 0.10
        delays = []
        for n in range(20):
            polling = asyncio.create_task(consumer.poll(timeout=20))
            await asyncio.sleep(0.05)  # into its idle rhythm
            begin = time.monotonic()
            fill(journals[n % 3], b"x")
            await polling
            delays.append(time.monotonic() - begin)
        assert sorted(delays)[10] < 0.1
    for journal in journals:
        journal.close()
