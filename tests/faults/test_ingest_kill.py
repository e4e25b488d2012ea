"""kill -9 of ingest between every pair of its steps, and a worker stopped inside its transaction.

What is in the database afterwards is compared with an undisturbed run: contents, counters, accounting.
"""

import asyncio
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from megido_ingest import session
from megido_ingest.failpoints import POINTS
from megido_ingest.store import Store
from megido_shared import events
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow, a_response
from tests.faults.balance import SEED, settle_items
from tests.integration.ingest.process import IngestProcess, journal_of
from tests.integration.ingest.support import Log, contents, empty, ingest, rows, store_records, stream
from tests.integration.ingest.traffic import mixed_traffic
from tests.support.waiting import until

RECORDS = 4_000
"""Flows and the like, so nearly twice as many records: more than two full batches, and a point's second pass is in
the middle."""


@pytest.fixture(scope="module")
def items() -> list[events.AnyEvent | bytes]:
    return mixed_traffic(SEED, RECORDS)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, items: list[events.AnyEvent | bytes]) -> Path:
    """A data directory with a journal in it. Runs work on copies, so offsets and epochs are the same in each."""
    data_dir = tmp_path_factory.mktemp("recorded") / "data"
    assert len(items) > RECORDS
    journal_of(data_dir, items)
    return data_dir


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict]:
    """Filled by the first run."""
    return {}


def _copy(recorded: Path, tmp_path: Path, name: str) -> Path:
    data_dir = tmp_path / name / "data"
    shutil.copytree(recorded, data_dir)
    return data_dir


def _lag(process: IngestProcess) -> list[float]:
    lines = process.get("/metrics")[1].splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("megido_ingest_lag_bytes{")]


def _caught_up(process: IngestProcess) -> bool:
    lag = _lag(process)
    return bool(lag) and not any(lag)


def _run(url: str, data_dir: Path, *failpoints: str) -> dict:
    for failpoint in failpoints:
        killed = IngestProcess(url, data_dir, failpoint=failpoint)
        try:
            killed.wait_killed()
        finally:
            killed.close()
    process = IngestProcess(url, data_dir)
    try:
        process.wait_ready()
        until(lambda: _caught_up(process), "the journal is stored", seconds=60)
        assert process.terminate() == 0, process.output
    finally:
        process.close()
    return contents(url)


@pytest.fixture
def expected(undisturbed: dict[str, dict], recorded: Path, database: str, tmp_path: Path) -> dict:
    if not undisturbed:
        undisturbed["contents"] = _run(database, _copy(recorded, tmp_path, "undisturbed"))
        empty(database)
    return undisturbed["contents"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step_nothing_is_lost_or_doubled(
    point: str,
    expected: dict,
    recorded: Path,
    items: list[events.AnyEvent | bytes],
    database: str,
    tmp_path: Path,
) -> None:
    # At the first batch, then at the second of what is left.
    found = _run(database, _copy(recorded, tmp_path, "killed"), f"{point}:1", f"{point}:2")
    assert len(found["flows"]) > RECORDS / 3
    assert found["dead_letters"]
    assert found == expected
    settle_items(items, database)
    orphans = rows(database, "SELECT count(*) FROM flows WHERE batch_id NOT IN (SELECT batch_id FROM feed)")
    assert orphans == [(0,)]


def _distinct_flows(count: int, first: int = 0) -> list[events.FlowCompleted]:
    """Flows whose bodies nobody else stores: of equal ones the second worker waits for the first."""
    return [
        a_completed_flow(seq=n + 1, response=a_response(body=n.to_bytes(4) * 100)) for n in range(first, first + count)
    ]


def test_the_late_commit_of_a_stopped_worker_changes_nothing(database: str, tmp_path: Path) -> None:
    """It stops inside its transaction, another takes its stream over, and then it goes on."""
    data_dir = tmp_path / "run" / "data"
    flows = _distinct_flows(300)
    journal_of(data_dir, flows)
    stopped = IngestProcess(database, data_dir, failpoint="after_function_call:1:stop")
    try:
        stopped.wait_stopped()
        assert rows(database, "SELECT count(*) FROM flows") == [(0,)], "nothing may be visible before the commit"
        others = _distinct_flows(20, first=1000)
        took = asyncio.run(_others_work_meanwhile(database, others))
        assert took < 5, f"another worker waited {took:.1f} s for one that is stopped"
        assert asyncio.run(_take_over(database, data_dir)) == len(flows)
        before = contents(database)
        feed = rows(database, "SELECT * FROM feed")
        stopped.signal(signal.SIGCONT)
        # It finds its connection gone, its claim stale, claims anew, and reads on where the database says.
        stopped.wait_ready()
        until(lambda: _caught_up(stopped), "the resumed worker has caught up", seconds=30)
        assert stopped.terminate() == 0, stopped.output
    finally:
        stopped.close()
    assert contents(database) == before
    assert rows(database, "SELECT * FROM feed") == feed
    settle_items([*flows, *others], database)


async def _others_work_meanwhile(url: str, flows: list[events.FlowCompleted]) -> float:
    """Seconds that another worker's transaction takes, its feed row included."""
    log = Log(stream(partition=7, source="ab" * 16))
    log.add(*flows)
    begun = time.monotonic()
    (stored,) = await ingest(url, [log.records])
    assert stored.flows == len(flows)
    return time.monotonic() - begun


async def _take_over(url: str, data_dir: Path) -> int:
    """Claims what the stopped worker holds (its session ends by its idle limit) and stores it all."""
    consumer = await LocalBus(DataDir(data_dir)).consumer("observer", [FLOWS])
    batch = await consumer.poll(timeout=5)
    await consumer.close()
    store = Store(url)
    begun = time.monotonic()
    positions = await store.claim({record.stream for record in batch.records})
    waited = time.monotonic() - begun
    assert waited < session.IDLE_IN_TRANSACTION_MS / 1000 + 5
    assert [position.offset for position in positions.values()] == [0]
    stored = await store_records(store, batch.records)
    await store.close()
    return stored.flows


def test_a_worker_that_stops_after_sending_its_commit_does_not_hold_the_feed(any_database: str) -> None:
    """The feed's lock is taken and given back inside one message, which the server runs to its end by itself."""
    stopped = psycopg.connect(any_database, autocommit=True)
    with closing(stopped), psycopg.connect(any_database, autocommit=True) as other:
        stopped.execute("BEGIN")
        stopped.execute("SELECT nextval('batch_ids')")
        stopped.pgconn.send_query(session.commit_message(1).encode())
        stopped.pgconn.flush()
        # The answer is never read.
        until(
            lambda: other.execute("SELECT pg_try_advisory_xact_lock(hashtext('megido.feed'))").fetchone() == (True,),
            "the feed's lock is free",
            seconds=5,
        )
        until(lambda: rows(any_database, "SELECT batch_id FROM feed") == [(1,)], "the commit happened", seconds=5)
