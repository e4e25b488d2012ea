"""The background work: partitions, open flows of nodes that are gone, one leader at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg

from megido_ingest.health import Health
from megido_ingest.leader import RESTART_GRACE_S, SILENT_S, Leader, OpenFlows
from megido_ingest.metrics import Metrics
from megido_ingest.session import Session
from megido_shared import events, ids
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import DEAD_LETTERS
from megido_shared.clock import SystemClock
from megido_shared.datadir import DataDir
from megido_shared.db import tables
from megido_shared.testing import FakeClock, a_completed_flow, a_request, a_response
from tests.integration.ingest.support import Log, batches, contents, counters, ingest, rows
from tests.integration.ingest.traffic import TIME, an_event


def _healthy() -> Health:
    health = Health()
    health.bus = health.database = ""
    health.consuming = True
    return health


def _open_flow(**fields: object) -> events.FlowStarted:
    head = a_response(body=events.Body())
    started: events.FlowStarted = an_event(events.FlowStarted, request=a_request(), response=head, **fields)
    return started


async def test_open_flows_of_a_silent_node_are_interrupted_with_what_had_come(any_database: str) -> None:
    flow_id, other = ids.new_id(), ids.new_id()
    pieces = [b"a" * 400, b"b" * 400]
    chunks = [
        an_event(events.BodyChunk, flow_id=flow_id, side="response", index=n, data=piece)
        for n, piece in enumerate(pieces)
    ]
    lost = an_event(events.BodyChunk, flow_id=flow_id, side="response", index=3, data=b"after a gap")
    log = Log()
    log.add(
        an_event(events.NodeStatus, state="running"), _open_flow(flow_id=flow_id), *chunks, lost,
        _open_flow(flow_id=other, node="capture-1"),
        an_event(events.NodeStatus, node="capture-1", state="running"),
    )  # fmt: skip
    await ingest(any_database, [log.records])
    clock, session = FakeClock(), Session(any_database)
    leader = OpenFlows(session, clock, _healthy(), Metrics("bytes"))
    assert await leader.look() == 0
    clock.advance(SILENT_S - 1)
    assert await leader.look() == 0
    # capture-1 is heard of again.
    log.add(an_event(events.NodeStatus, node="capture-1", state="running", time_us=TIME + 1))
    await ingest(any_database, [log.records])
    clock.advance(2)
    assert await leader.look() == 1
    assert rows(
        any_database, "SELECT flow_id, rank, prev_rank, response_body_state, response_size FROM flows ORDER BY 1"
    ) == [
        (ids.to_uuid(flow_id), 2, 1, tables.BODY_TRUNCATED, 800),
        (ids.to_uuid(other), 1, 0, tables.BODY_NONE, 0),
    ]
    assert counters(any_database)[("requests", "")] == 2
    assert rows(any_database, "SELECT count(*) FROM feed JOIN flows USING (batch_id) WHERE rank = 2") == [(1,)]
    assert await leader.look() == 0
    # The node was only cut off: its own record prevails, as if nothing had been said for it.
    whole = events.Body(size=811, chunks=3)
    log.add(
        an_event(events.BodyChunk, flow_id=flow_id, side="response", index=2, data=b"in between."),
        a_completed_flow(flow_id=flow_id, node="capture-0", seq=1, response=a_response(body=whole)),
    )
    await ingest(any_database, [log.records])
    assert rows(
        any_database,
        "SELECT rank, response_body_state, response_size FROM flows WHERE flow_id = %s",
        [ids.to_uuid(flow_id)],
    ) == [(4, tables.BODY_STORED, 811)]
    await session.close()


async def test_flows_from_before_the_nodes_latest_start_are_interrupted(database: str) -> None:
    old, new = ids.new_id(), ids.new_id()
    log = Log()
    log.add(
        an_event(events.NodeStatus, state="started", time_us=TIME - 10_000_000),
        _open_flow(flow_id=old, time_us=TIME - 5_000_000),
        an_event(events.NodeStatus, state="started", time_us=TIME),
        _open_flow(flow_id=new, time_us=TIME + 1),
    )
    await ingest(database, batches(log.records, 1))
    clock, session = FakeClock(), Session(database)
    leader = OpenFlows(session, clock, _healthy(), Metrics("bytes"))
    assert await leader.look() == 0, "the node may still say it itself"
    clock.advance(RESTART_GRACE_S + 1)
    assert await leader.look() == 1
    assert rows(database, "SELECT flow_id, rank FROM flows ORDER BY 1") == [
        (ids.to_uuid(old), 2),
        (ids.to_uuid(new), 1),
    ]
    await session.close()


async def test_nobody_is_silent_while_the_bus_is_away(database: str) -> None:
    log = Log()
    log.add(an_event(events.NodeStatus, state="running"), _open_flow(flow_id=ids.new_id()))
    await ingest(database, [log.records])
    clock, session, health = FakeClock(), Session(database), _healthy()
    leader = OpenFlows(session, clock, health, Metrics("bytes"))
    await leader.look()
    health.bus = "bus: away"
    clock.advance(SILENT_S * 2)
    assert await leader.look() == 0
    health.bus = ""
    assert await leader.look() == 0, "the silence begins to count when the bus is back"
    clock.advance(SILENT_S)
    assert await leader.look() == 1
    await session.close()


@asynccontextmanager
async def _running(url: str, tmp_path: Path, metrics: Metrics) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    bus = LocalBus(DataDir(tmp_path / "data"))
    leader = Leader(url, bus, tmp_path / "logs", clock=SystemClock(), metrics=metrics, health=_healthy())
    task = asyncio.create_task(leader.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


async def _eventually(condition: object, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def _value(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("megido_ingest_leader") or 0.0


async def test_one_leader_at_a_time_and_another_takes_over(database: str, tmp_path: Path) -> None:
    first, second = Metrics("bytes"), Metrics("bytes")
    async with _running(database, tmp_path / "1", first) as stop_first:
        await _eventually(lambda: _value(first) == 1)
        async with _running(database, tmp_path / "2", second):
            await asyncio.sleep(0)
            assert _value(second) == 0
            stop_first.set()
            await _eventually(lambda: _value(second) == 1)
            assert _value(first) == 0


async def test_the_leader_makes_partitions_and_relays_dead_letters(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        for (leaf,) in connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhrelid::regclass::text LIKE 'flows_%'"
            " AND inhparent = 'flows'::regclass ORDER BY 1 DESC LIMIT 2"
        ).fetchall():
            connection.execute(f"DROP TABLE {leaf}")
    before = rows(database, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'flows'::regclass")[0][0]
    log = Log()
    log.add(b"\xc1 poison")
    await ingest(database, [log.records])
    bus = LocalBus(DataDir(tmp_path / "data"))
    async with _running(database, tmp_path, Metrics("bytes")):
        partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'flows'::regclass"
        await _eventually(lambda: rows(database, partitions)[0][0] == before + 2)
        consumer = await bus.consumer("observer", [DEAD_LETTERS])
        batch = await consumer.poll(timeout=10)
        await consumer.close()
    assert [record.value for record in batch.records] == [b"\xc1 poison"]
    assert batch.records[0].key == b"megido.flows/0/0"
    assert rows(database, "SELECT count(*) FROM outbox") == [(0,)]
    assert len(contents(database)["dead_letters"]) == 1
