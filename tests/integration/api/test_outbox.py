import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from megido_shared.bus.base import Outgoing
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.db import outbox
from megido_shared.db.connect import create_engine
from megido_shared.db.tables import outbox as table
from megido_shared.errors import Unavailable
from megido_shared.testing import a_completed_flow
from tests.integration.api.harness import eventually, on_topic


class Recording:
    """A producer that keeps what it was given, and is away when told so."""

    def __init__(self) -> None:
        self.taken: list[Outgoing] = []
        self.away = False
        self.attempts = 0

    async def append(self, records: Sequence[Outgoing]) -> None:
        self.attempts += 1
        if self.away:
            raise Unavailable("away")
        self.taken.extend(records)

    async def close(self) -> None:
        pass


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    made = create_engine(database)
    yield made
    await made.dispose()


def some(count: int) -> list[Outgoing]:
    return [outbox.outgoing(a_completed_flow(seq=number + 1)) for number in range(count)]


async def waiting(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(select(func.count()).select_from(table)) or 0


async def add(engine: AsyncEngine, records: Sequence[Outgoing]) -> None:
    async with engine.begin() as connection:
        await outbox.add(connection, records)


async def test_published_in_order_whole_and_once(engine: AsyncEngine) -> None:
    records = some(1200)
    await add(engine, records)
    producer = Recording()
    rounds = []
    while published := await outbox.relay(engine, producer):
        rounds.append(published)
    assert producer.taken == records
    assert len(rounds) > 1
    assert await waiting(engine) == 0


async def test_what_is_rolled_back_is_not_published(engine: AsyncEngine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.begin() as connection:
            await outbox.add(connection, some(1))
            raise ZeroDivisionError
    assert await outbox.relay(engine, Recording()) == 0


async def test_nothing_is_lost_while_the_bus_is_away(engine: AsyncEngine) -> None:
    records = some(3)
    await add(engine, records)
    producer = Recording()
    producer.away = True
    with pytest.raises(Unavailable):
        await outbox.relay(engine, producer)
    assert await waiting(engine) == 3
    producer.away = False
    assert await outbox.relay(engine, producer) == 3
    assert producer.taken == records


async def test_two_relays_share_and_never_wait_for_each_other(engine: AsyncEngine) -> None:
    await add(engine, some(700))
    held = asyncio.Event()
    release = asyncio.Event()

    class Slow(Recording):
        async def append(self, records: Sequence[Outgoing]) -> None:
            held.set()
            await release.wait()
            await super().append(records)

    slow, quick = Slow(), Recording()
    first = asyncio.create_task(outbox.relay(engine, slow))
    await held.wait()
    assert await outbox.relay(engine, quick) == 200
    release.set()
    assert await first == 500
    taken = {record.value for record in slow.taken} | {record.value for record in quick.taken}
    assert len(taken) == 700


async def test_a_round_is_bounded_in_bytes(engine: AsyncEngine) -> None:
    large = [Outgoing(FLOWS.name, b"k", bytes([number]) * 3_900_000) for number in range(5)]
    await add(engine, large)
    producer = Recording()
    assert [await outbox.relay(engine, producer) for _ in range(4)] == [2, 2, 1, 0]
    assert producer.taken == large


@pytest.mark.parametrize(
    "record",
    [
        Outgoing(FLOWS.name, b"k", bytes(outbox.MAX_RECORD_BYTES)),
        Outgoing(FLOWS.name, b"k" * 65_536, b"v"),
        Outgoing(FLOWS.name, b"k", b"v", {"h": bytes(outbox.MAX_RECORD_BYTES)}),
    ],
    ids=["value", "key", "headers"],
)
async def test_what_no_bus_takes_is_refused(engine: AsyncEngine, record: Outgoing) -> None:
    with pytest.raises(outbox.TooLarge):
        await add(engine, [*some(1), record])
    assert await waiting(engine) == 0


async def test_what_no_bus_takes_does_not_hold_up_the_rest(
    engine: AsyncEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ingest's SQL adds copies of dead letters, past the check."""
    records = some(2)
    await add(engine, records[:1])
    async with engine.begin() as connection:
        row = {"topic": FLOWS.name, "key": b"k" * 70_000, "value": b"v", "headers": {}, "created_at": func.now()}
        await connection.execute(insert(table).values(row))
    await add(engine, records[1:])
    bus = LocalBus(DataDir(tmp_path / "data").ensure())
    producer = await bus.producer("api")
    assert await outbox.relay(engine, producer) == 3
    assert await waiting(engine) == 0
    assert [record.value for record in await on_topic(bus, FLOWS, 2)] == [record.value for record in records]
    assert "1 records are larger" in caplog.text
    await producer.close()


async def test_the_relay_is_woken_by_another_process_and_keeps_trying(
    engine: AsyncEngine, database: str, tmp_path: Path
) -> None:
    producer = Recording()
    producer.away = True

    async def opened() -> Recording:
        return producer

    relay = outbox.Relay(engine, opened, poll_s=3600, retry_s=0.02)
    stop = asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await add(engine, some(2))

        async def tried() -> bool:
            return producer.attempts >= 3

        await eventually(tried, "three attempts")
        producer.away = False

        async def taken(count: int) -> bool:
            return len(producer.taken) == count

        await eventually(lambda: taken(2), "the waiting records")
        await add(engine, some(1))  # nobody calls wake: only NOTIFY can tell
        await eventually(lambda: taken(3), "the notified record")
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def test_the_relay_survives_the_loss_of_its_sessions(engine: AsyncEngine, database: str, tmp_path: Path) -> None:
    groups = itertools.count()
    bus = LocalBus(DataDir(tmp_path / "data").ensure())
    relay = outbox.Relay(engine, lambda: bus.producer("api"), poll_s=0.2, retry_s=0.02)
    stop = asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await add(engine, some(1))
        await on_topic(bus, FLOWS, 1)
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        records = some(1)
        await eventually(lambda: _added(engine, records), "Postgres to take records again")

        async def published() -> bool:
            # What was published when the session was lost before that was noted is published once more.
            found = await on_topic(bus, FLOWS, 2, group=f"later-{next(groups)}")
            return found[-1].value == records[0].value

        await eventually(published, "what was added later on the topic")
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def _added(engine: AsyncEngine, records: Sequence[Outgoing]) -> bool:
    await add(engine, records)
    return True
