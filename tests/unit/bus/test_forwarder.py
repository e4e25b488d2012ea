"""The forwarder's window: several batches under way, acknowledged in order, all of them again after a failure."""

import asyncio
import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megido_shared.bus import forwarder
from megido_shared.bus.base import Outgoing
from megido_shared.bus.forwarder import Forwarder, Metrics
from megido_shared.bus.local import Journal, LocalBus
from megido_shared.bus.local.groups import free_limit
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.errors import Unavailable

COUNT = 400


class Flaky:
    """Another side that takes a random part of a batch before it fails, and answers after a random while. Behind a
    failure it takes nothing until it is told to begin again, as the contract says."""

    depth = 3

    def __init__(self, seed: int, *, fails: float) -> None:
        self._rng = random.Random(seed)
        self._fails = fails
        self.pause = 0.01
        self._turn = asyncio.Lock()
        self.arrived: list[bytes] = []
        self.at_once = 0
        self.most_at_once = 0
        self.closed = False
        self._failed = False

    async def ship(self, records: Sequence[Outgoing]) -> int:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async with self._turn:
                if self._failed:
                    raise Unavailable("behind a failure")
                fails = self._failed = self._rng.random() < self._fails
                taken = records[: self._rng.randrange(len(records))] if fails else records
                self.arrived += [record.value for record in taken]
            await asyncio.sleep(self._rng.random() * self.pause)
            if fails:
                raise Unavailable("not now")
            return 0
        finally:
            self.at_once -= 1

    async def begin_again(self) -> None:
        assert self.at_once == 0
        self._failed = False

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(forwarder, "MAX_RECORDS", 10)


def published(data: DataDir) -> tuple[Journal, list[bytes]]:
    journal = Journal.open(data, "capture")
    values = [b"%d" % number for number in range(COUNT)]
    assert all(journal.append(FLOWS.name, b"k", value) for value in values)
    return journal, values


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(5))
async def test_failures_repeat_but_neither_lose_nor_reorder(seed: int, tmp_path: Path, quick: None) -> None:
    data = DataDir(tmp_path / "data")
    journal, values = published(data)
    other = Flaky(seed, fails=0.2)
    stop = asyncio.Event()
    working = asyncio.create_task(Forwarder(data, other, yields_to_ingest=False, metrics=Metrics()).run(stop))
    await until(lambda: free_limit(data, journal.epoch.hex(), FLOWS.name) == journal.used_bytes)
    stop.set()
    await asyncio.wait_for(working, 30)
    assert list(dict.fromkeys(other.arrived)) == values
    assert len(other.arrived) > len(values), "nothing failed, so this proves nothing"
    assert other.most_at_once == Flaky.depth
    assert other.closed and other.at_once == 0
    journal.close()


async def test_a_stop_ships_what_was_written_until_then(tmp_path: Path, quick: None) -> None:
    data = DataDir(tmp_path / "data")
    journal, values = published(data)
    other = Flaky(1, fails=0.0)
    stop = asyncio.Event()
    working = asyncio.create_task(Forwarder(data, other, yields_to_ingest=False, metrics=Metrics()).run(stop))
    await until(lambda: other.arrived)
    stop.set()
    assert journal.append(FLOWS.name, b"k", b"last")
    await asyncio.wait_for(working, 30)
    assert other.arrived == [*values, b"last"]
    assert free_limit(data, journal.epoch.hex(), FLOWS.name) == journal.used_bytes
    journal.close()


async def test_a_stop_waits_for_what_is_under_way_and_acknowledges_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all can be shipped any more."""
    data = DataDir(tmp_path / "data")
    journal, values = published(data)
    other = Flaky(1, fails=0.0)
    stop = asyncio.Event()
    working = asyncio.create_task(Forwarder(data, other, yields_to_ingest=False, metrics=Metrics()).run(stop))
    await until(lambda: len(other.arrived) > 50)
    other.pause = 2.0  # a batch takes a second, and none is begun after half of the four
    monkeypatch.setattr(forwarder, "STOP_SECONDS", 4.0)
    stop.set()
    await asyncio.wait_for(working, 30)
    first = len(other.arrived)
    assert 50 < first < COUNT
    other.pause = 0.01
    stop.clear()
    working = asyncio.create_task(Forwarder(data, other, yields_to_ingest=False, metrics=Metrics()).run(stop))
    await until(lambda: free_limit(data, journal.epoch.hex(), FLOWS.name) == journal.used_bytes)
    stop.set()
    await working
    assert other.arrived == values, "nothing twice"
    journal.close()


async def test_on_a_full_disk_acknowledgements_are_written_over_the_old_ones(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataDir(tmp_path / "data")
    journal, values = published(data)
    other = Flaky(1, fails=0.0)
    stop = asyncio.Event()
    working = asyncio.create_task(Forwarder(data, other, yields_to_ingest=False, metrics=Metrics()).run(stop))
    epoch = journal.epoch.hex()
    await until(lambda: free_limit(data, epoch, FLOWS.name) == journal.used_bytes)
    refused = []
    open_ = os.open

    def full(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        """What a full disk does: no new file, while old ones can be written over."""
        if flags & os.O_CREAT and "acks" in str(path):
            refused.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return open_(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", full)
    assert journal.append(FLOWS.name, b"k", b"one more")
    await until(lambda: free_limit(data, epoch, FLOWS.name) == journal.used_bytes)
    assert refused and other.arrived == [*values, b"one more"]
    (ack,) = (data.groups / "forwarder" / "acks").glob(f"{FLOWS.name}.*")
    monkeypatch.undo()
    ack.unlink()
    monkeypatch.setattr(os, "open", full)
    assert journal.append(FLOWS.name, b"k", b"not acknowledged")
    await until(lambda: b"not acknowledged" in other.arrived)
    monkeypatch.undo()  # the disk has room again; nothing new comes
    await until(lambda: free_limit(data, epoch, FLOWS.name) == journal.used_bytes)
    stop.set()
    await asyncio.wait_for(working, 30)
    journal.close()


@pytest.mark.parametrize("ordered", [True, False])
async def test_an_ordered_producer_is_spent_after_a_failure(ordered: bool, tmp_path: Path) -> None:
    bus = LocalBus(DataDir(tmp_path / "data"))
    producer = await bus.producer("writer", ordered=ordered)
    await producer.append([Outgoing(FLOWS.name, b"k", b"one")])
    with pytest.raises(Unavailable, match="too_large"):
        await producer.append([Outgoing(FLOWS.name, b"k", bytes(17 << 20))])
    if ordered:
        with pytest.raises(Unavailable, match="before this one failed"):
            await producer.append([Outgoing(FLOWS.name, b"k", b"two")])
    else:
        await producer.append([Outgoing(FLOWS.name, b"k", b"two")])
    await producer.close()
