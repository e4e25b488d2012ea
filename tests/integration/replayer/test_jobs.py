"""Jobs: order, delay, cancel, pause, several replayers, a database or a journal that is away."""

import asyncio
import time

import pytest

from megido_shared import events, ids
from megido_shared.bus.local import LocalBus
from megido_shared.db.outbox import outgoing
from megido_shared.events import FlowCompleted, NodeStatus, ReplayProgressed
from tests.integration.replayer.harness import World, eventually, replaying
from tests.support.raw_server import OK, RawServer


class Target:
    """Counts what arrives, in order; answers when `open` is set."""

    def __init__(self):
        self.hits = []
        self.times = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, talk):
        while True:
            head = await talk.head()
            self.hits.append(int(head.split(b" ")[1][1:]))
            self.times.append(time.monotonic())
            await self.open.wait()
            await talk.say(OK)


@pytest.fixture
async def target():
    return Target()


async def test_a_job_keeps_its_order(world, target):
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 70))
        async with replaying(world.settings()):
            items = await world.ended(job)
            await eventually(lambda: world.job_state(job) == "done", "the job is done")
    assert target.hits == list(range(70))
    assert {(item.state, item.attempt) for item in items} == {("succeeded", 1)}
    flows = await world.published(FlowCompleted)
    assert [flow.replay_position for flow in flows] == list(range(70))
    assert [flow.seq for flow in flows] == list(range(1, 71))


async def test_concurrency_sends_several_at_a_time(world, target):
    target.open.clear()
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 9, b"POST"))
        async with replaying(world.settings(concurrency=3)):
            await eventually(lambda: len(target.hits) == 3, "three at a time")
            await asyncio.sleep(0.1)
            assert len(target.hits) == 3
            target.open.set()
            await world.ended(job)
    assert sorted(target.hits) == list(range(9))


async def test_a_delay_lies_between_items(world, target):
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 3), delay_s=0.3)
        async with replaying(world.settings(concurrency=5)):
            await world.ended(job)
    assert target.hits == [0, 1, 2]
    gaps = [later - earlier for earlier, later in zip(target.times, target.times[1:], strict=False)]
    assert all(gap >= 0.3 for gap in gaps)


async def test_jobs_do_not_wait_for_each_other(world, target):
    stuck = Target()
    stuck.open.clear()
    async with RawServer(stuck) as black_hole, RawServer(target) as server:
        slow = world.job(await world.store_requests(black_hole.port, 1))
        quick = world.job(await world.store_requests(server.port, 2))
        async with replaying(world.settings(give_up_s=0.2)):
            await world.ended(quick)
            assert world.states(slow) in (["claimed"], ["sent"])
            stuck.open.set()
            await world.ended(slow)


@pytest.mark.parametrize("delay_s", [0.0, 60.0])
@pytest.mark.parametrize(("asked", "left"), [("cancelled", "cancelled"), ("paused", "queued")])
async def test_cancel_and_pause_between_items(world, target, delay_s, asked, left):
    if not delay_s:
        target.open.clear()
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 5), delay_s=delay_s)
        async with replaying(world.settings()):
            await eventually(lambda: target.hits, "the first item arrives")
            await world.change("UPDATE replay_jobs SET state = %s, updated_at = now()", asked)
            target.open.set()
            await eventually(lambda: world.states(job) == ["succeeded", *[left] * 4], f"items are {left}", 5)
            assert world.job_state(job) == asked
            if asked == "paused":
                await world.change("UPDATE replay_jobs SET state = 'running', options = options - 'delay_s'")
                await world.ended(job)
    assert target.hits == ([0] if asked == "cancelled" else [0, 1, 2, 3, 4])


async def test_two_replayers_share_jobs_and_send_nothing_twice(world, target, tmp_path):
    other = World(world.database, tmp_path / "other")
    async with RawServer(target) as server:
        flows = await world.store_requests(server.port, 60)
        ordered = [world.job(flows[start : start + 20]) for start in (0, 20, 40)]
        async with replaying(world.settings()), replaying(other.settings()):
            for job in ordered:
                await world.ended(job)
    assert sorted(target.hits) == list(range(60))
    for start in (0, 20, 40):
        part = [hit for hit in target.hits if start <= hit < start + 20]
        assert part == sorted(part)
    claimed_by = {item.claimed_by for job in ordered for item in world.items(job)}
    assert len({name.partition("/")[0] for name in claimed_by}) == 1  # both are called replayer-0 ...
    assert all(len(name.partition("/")[2]) == 32 for name in claimed_by)  # ... and told apart by their epochs


async def test_a_command_wakes_the_replayer(world, target):
    async with RawServer(target) as server:
        flows = await world.store_requests(server.port, 1)
        async with replaying(world.settings(poll_s=300.0)):
            await eventually(lambda: "bus" in str(world.data_dir.groups) or world.data_dir.groups.exists(), "a group")
            bus = LocalBus(world.data_dir)
            producer = await bus.producer("api")
            job = world.job(flows)
            command = events.ReplayFlows(
                event_id=ids.new_id(), node="api-0", epoch=ids.new_id(), time_us=1, job_id=job.bytes
            )
            await producer.append([outgoing(command)])
            await world.ended(job)
            await producer.close()
            await bus.close()


async def test_connections_to_the_database_that_break_in_a_send_lose_nothing(world, target):
    target.open.clear()
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 3, b"POST"))
        async with replaying(world.settings()):
            await eventually(lambda: target.hits, "the first item arrives")
            with world.sql() as sql:
                sql.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'megido-replayer' AND datname = current_database()"
                )
            target.open.set()
            items = await world.ended(job)
    assert [item.state for item in items] == ["succeeded"] * 3
    assert target.hits == [0, 1, 2]


async def test_nothing_is_sent_that_the_journal_cannot_record(world, target):
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 1))
        async with replaying(world.settings(journal_cap_bytes=10)):
            await eventually(lambda: world.items(job)[0].attempt >= 2, "it is tried again")
            assert target.hits == []
        assert world.states(job) == ["queued"]
        async with replaying(world.settings()):
            await world.ended(job)
    assert target.hits == [0]


async def test_heartbeats_count_what_was_done(world, target):
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 2))
        async with replaying(world.settings(heartbeat_s=0.1)):
            await world.ended(job)
        beats = await world.published(NodeStatus)
        assert [beats[0].state, beats[-1].state] == ["started", "stopping"]
        assert {beat.service for beat in beats} == {"replayer"}
        assert beats[-1].counters["succeeded"] == beats[-1].captured == 2
        async with replaying(world.settings(heartbeat_s=0.1)):
            pass
    assert (await world.published(NodeStatus))[-1].captured == 2  # the count goes on where it was


async def test_an_answer_that_comes_while_stopping_is_waited_for(world, target):
    target.open.clear()
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 3, b"POST"))
        async with replaying(world.settings()):
            await eventually(lambda: target.hits, "the first item arrives")
            asyncio.get_running_loop().call_later(0.3, target.open.set)
    assert world.states(job) == ["succeeded", "queued", "queued"]


async def test_a_send_that_is_given_up_while_stopping_is_unknown(world, target):
    target.open.clear()
    async with RawServer(target) as server:
        job = world.job(await world.store_requests(server.port, 3, b"POST"))
        async with replaying(world.settings(give_up_s=0.1)):
            await eventually(lambda: target.hits, "the first item arrives")
        assert world.states(job) == ["unknown", "queued", "queued"]
        target.open.set()
        async with replaying(world.settings()):
            items = await world.ended(job)
    assert target.hits == [0, 1, 2]
    assert [item.state for item in items] == ["unknown", "succeeded", "succeeded"]
    assert "may have been acted upon" in items[0].error
    assert [one.state for one in await world.published(ReplayProgressed)].count("begun") == 3
