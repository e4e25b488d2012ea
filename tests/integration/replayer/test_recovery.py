"""What a restart and an expired lease make of items that a dead replayer held."""

import uuid

import pytest

from megido_replayer.prepare import Prepared
from megido_replayer.queries import Item
from megido_replayer.recording import Recorder, Sent
from megido_replayer.target import Target
from megido_replayer.transport import RawRequest, RawResponse, SendError
from megido_replayer.transport.wire import render
from megido_shared import ids
from megido_shared.bus.local import Journal
from megido_shared.clock import SystemClock
from megido_shared.events import ErrorType, FlowCompleted
from tests.integration.replayer.harness import replaying
from tests.support.raw_server import OK, RawServer

ANSWER = RawResponse(status=418, reason=b"", http_version="HTTP/1.1", headers=[], body=b"x", body_size=1)


class Past:
    """A replayer that died: its journal, and what it wrote there."""

    def __init__(self, world):
        self.journal = Journal.open(world.data_dir, "replayer")
        self.me = f"{self.journal.node}/{self.journal.epoch.hex()}"
        self.recorder = Recorder(self.journal, SystemClock(), 1 << 20)
        self.recorder.status("started")  # the service does so before it claims anything: it makes the epoch last

    def sent(self, item, flow_id):
        request = RawRequest(b"POST", b"/", [(b"Host", b"h")])
        return Sent(item, flow_id, Prepared(request, Target("http", "h", 80, b"/")), render(request), 1)


async def one_item(world, server, **columns):
    """A running job with one POST in the state that the columns say."""
    flow = await world.store_request(server.port, b"POST")
    job = world.job([flow], state="running")
    with world.sql() as sql:
        for name, value in columns.items():
            sql.execute(f"UPDATE replay_items SET {name} = %s WHERE job_id = %s", (value, job))
    return job, Item(job, 0, 1, flow, 7)


async def answering(talk):
    while True:
        await talk.head()
        await talk.say(OK)


@pytest.fixture
async def server():
    async with RawServer(answering) as running:
        yield running


@pytest.fixture
def past(world):
    return Past(world)


async def settled(world, job):
    async with replaying(world.settings(lease_s=600.0)):
        (item,) = await world.ended(job)
    return item


async def test_claimed_and_not_begun_is_queued_again(world, past, server):
    job, _ = await one_item(world, server, state="claimed", claimed_by=past.me, attempt=1, lease_until="2100-01-01")
    past.journal.close()
    item = await settled(world, job)
    assert (item.state, item.attempt, item.claimed_by) == ("succeeded", 2, past.me)
    assert len(server.talks) == 1


@pytest.mark.parametrize("begun", [True, False])
async def test_sent_without_a_result_is_unknown_and_never_sent_again(world, past, server, begun):
    flow_id = ids.new_id()
    job, item = await one_item(
        world, server, state="sent", claimed_by=past.me, attempt=1, lease_until="2100-01-01",
        result_flow_id=ids.to_uuid(flow_id),
    )  # fmt: skip
    if begun:
        past.recorder.begun(item, flow_id)
    past.journal.close()
    row = await settled(world, job)
    assert (row.state, row.result_flow_id) == ("unknown", None)
    assert "may have been acted upon" in row.error
    assert server.talks == []
    assert world.job_state(job) == "done"


@pytest.mark.parametrize("result_too", [True, False])
@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (None, "succeeded", 418),
        (SendError(ErrorType.TIMEOUT, "no answer", sent=True), "timed_out", None),
        (SendError(ErrorType.CONNECTION_RESET, "cut", sent=True, response=ANSWER), "failed", 418),
    ],
)
async def test_a_flow_in_the_journal_completes_its_row(world, past, server, error, state, status, result_too):
    flow_id = ids.new_id()
    job, item = await one_item(
        world, server, state="sent", claimed_by=past.me, attempt=1, lease_until="2100-01-01",
        result_flow_id=ids.to_uuid(flow_id),
    )  # fmt: skip
    sent = past.sent(item, flow_id)
    past.recorder.begun(item, flow_id)
    recorded = past.recorder.completed(sent, ANSWER) if error is None else past.recorder.failed(sent, error)
    assert recorded
    if result_too:
        past.recorder.ended(item, state, flow_id)
    past.journal.close()
    row = await settled(world, job)
    assert (row.state, row.status, row.result_flow_id) == (state, status, ids.to_uuid(flow_id))
    assert row.error == (None if error is None else str(error))
    assert server.talks == []


async def test_the_result_of_a_redirect_is_its_last_flow(world, past, server):
    first, last = ids.new_id(), ids.new_id()
    job, item = await one_item(
        world, server, state="sent", claimed_by=past.me, attempt=1, lease_until="2100-01-01",
        result_flow_id=ids.to_uuid(first),
    )  # fmt: skip
    past.recorder.begun(item, first)
    past.recorder.completed(past.sent(item, first), ANSWER)
    past.recorder.completed(past.sent(item, last), ANSWER)
    past.recorder.ended(item, "succeeded", last)
    past.journal.close()
    assert (await settled(world, job)).result_flow_id == ids.to_uuid(last)


async def test_a_flow_that_is_stored_completes_its_row_when_the_journal_is_gone(world, past, server, tmp_path):
    flow_id = ids.new_id()
    job, item = await one_item(
        world, server, state="sent", claimed_by="replayer-0/gone", attempt=1, lease_until="2000-01-01",
        result_flow_id=ids.to_uuid(flow_id),
    )  # fmt: skip
    past.recorder.completed(past.sent(item, flow_id), ANSWER)
    await world.ingest_published()
    past.journal.close()
    row = await settled(world, job)
    assert (row.state, row.status, row.result_flow_id) == ("succeeded", 418, ids.to_uuid(flow_id))
    assert server.talks == []


@pytest.mark.parametrize(("state", "becomes", "hits"), [("claimed", "succeeded", 1), ("sent", "unknown", 0)])
async def test_leases_of_a_replayer_that_never_comes_back_expire(world, server, state, becomes, hits):
    job, _ = await one_item(
        world, server, state=state, claimed_by="replayer-0/gone", attempt=1, lease_until="2000-01-01",
        result_flow_id=None if state == "claimed" else uuid.uuid4(),
    )  # fmt: skip
    row = await settled(world, job)
    assert row.state == becomes
    assert len(server.talks) == hits
    if becomes == "unknown":
        assert row.result_flow_id is None
        assert await world.published(FlowCompleted) == []


async def test_leases_of_the_living_are_respected(world, server):
    job, _ = await one_item(
        world, server, state="claimed", claimed_by="replayer-0/other", attempt=1, lease_until="2100-01-01"
    )
    other = world.job([await world.store_request(server.port)])
    async with replaying(world.settings()):
        await world.ended(other)
        assert world.states(job) == ["claimed"]
        assert world.job_state(job) == "running"


async def test_a_late_result_replaces_unknown(world, past, server):
    """The lease expired while the process was stopped in the middle; then the answer came after all."""
    from megido_replayer import queries
    from megido_shared.db.connect import create_engine

    job, item = await one_item(world, server, state="sent", claimed_by=past.me, attempt=1, lease_until="2000-01-01")
    past.journal.close()
    engine = create_engine(world.database)
    async with engine.begin() as connection:
        await queries.expire(connection)
        assert (world.states(job), (await queries.held(connection, past.me))) == (["sent"], [])
    assert world.states(job) == ["unknown"]
    async with engine.begin() as connection:
        assert await queries.finish(connection, item, past.me, queries.Outcome("succeeded", 200))
        assert not await queries.finish(connection, item, "other", queries.Outcome("failed"))
    await engine.dispose()
    assert world.states(job) == ["succeeded"]
