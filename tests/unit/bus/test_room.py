"""Waiting for room in a journal."""

import asyncio
from pathlib import Path

import pytest

from megido_shared.bus.base import Stream
from megido_shared.bus.local import Journal, Room
from megido_shared.bus.local.groups import Group
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir

VALUE = bytes(1000)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(DataDir(tmp_path / "data"), "capture", cap_bytes=20_000)


def fill(journal: Journal) -> None:
    while not journal.is_nearly_full:
        assert journal.append(FLOWS.name, b"k", VALUE)


async def waiting(room: Room, count: int) -> None:
    async with asyncio.timeout(20):
        while room.waiting < count:
            await asyncio.sleep(0)


async def test_with_room_nobody_waits(journal: Journal) -> None:
    room = Room(journal)
    assert room.is_open
    assert await room.wait(0)
    journal.close()


async def test_all_go_on_when_a_reader_has_made_room(journal: Journal, tmp_path: Path) -> None:
    room = Room(journal)
    group = Group(DataDir(tmp_path / "data"), "ingest")
    group.pin([FLOWS.name])
    fill(journal)
    assert not room.is_open
    wait = [asyncio.create_task(room.wait(60)) for _ in range(100)]
    await waiting(room, 100)
    await asyncio.sleep(0.3)  # several looks
    assert not any(task.done() for task in wait)
    group.write_ack(Stream(journal.epoch.hex(), FLOWS.name, 0), journal.used_bytes)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*wait) == [True] * 100
    assert room.waiting == 0
    fill(journal)
    again = asyncio.create_task(room.wait(60))
    await waiting(room, 1)
    journal.cap_bytes *= 2
    async with asyncio.timeout(20):
        assert await again
    journal.close()


async def test_a_wait_is_bounded_and_a_cancelled_one_leaves_nothing(journal: Journal) -> None:
    room = Room(journal)
    fill(journal)
    cancelled = asyncio.create_task(room.wait(60))
    await waiting(room, 1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert room.waiting == 0
    assert not await room.wait(0.1)
    journal.close()


async def test_at_the_end_everybody_is_let_go(journal: Journal) -> None:
    room = Room(journal)
    fill(journal)
    wait = [asyncio.create_task(room.wait(60)) for _ in range(3)]
    await waiting(room, 3)
    room.give_up()
    assert await asyncio.gather(*wait) == [False] * 3
    assert not await room.wait(60)
    journal.close()
