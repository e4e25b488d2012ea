"""kill -9 and SIGTERM of the real replayer process while a target holds its answer back.

Whatever instant the kill comes in: the target is hit at most once, and the item says honestly how it ended.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from megido_shared.db.connect import conninfo
from megido_shared.events import FlowCompleted, decode
from tests.faults.balance import accounts_of_events, settle
from tests.integration.replayer.harness import World, eventually
from tests.support.raw_server import OK, RawServer


@pytest.fixture
def world(database: str, tmp_path: Path) -> World:
    return World(database, tmp_path)


class Process:
    def __init__(self, world: World, *flags: str) -> None:
        world.data_dir.ensure()
        self._log = world.root / f"replayer-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.child = subprocess.Popen(
                [
                    sys.executable, "-m", "megido_replayer", "--data-dir", str(world.data_dir.root),
                    "--database-url", world.database, "--metrics-port", "0", *flags,
                ],
                stderr=log,
                stdout=log,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def ready(self) -> str:
        """The address of its probes."""
        line = await eventually(
            lambda: next((line for line in self.log.splitlines() if "ready: " in line), None), "ready", 30
        )
        return "http://" + line.rpartition("http://")[2]

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    async def terminate(self) -> float:
        """Seconds until it was gone."""
        started = time.monotonic()
        self.child.send_signal(signal.SIGTERM)
        await eventually(lambda: self.child.poll() is not None, "the process ends", 30)
        return time.monotonic() - started


@asynccontextmanager
async def replayer(world: World, *flags: str) -> AsyncIterator[Process]:
    process = Process(world, *flags)
    try:
        yield process
    finally:
        if process.child.poll() is None:
            process.kill()


class Target:
    """Holds every answer back until `open`; keeps what arrived."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.open = asyncio.Event()

    async def __call__(self, talk) -> None:
        while True:
            self.heads.append(await talk.head())
            await self.open.wait()
            await talk.say(OK)


@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_killed_between_sending_and_result(world, method):
    target = Target()
    async with RawServer(target) as server:
        flows = await world.store_requests(server.port, 3, method)
        async with replayer(world) as process:
            await process.ready()
            job = world.job(flows)
            await eventually(lambda: target.heads, "the first request arrives")
            process.kill()
        assert world.states(job) == ["sent", "claimed", "claimed"]
        target.open.set()
        async with replayer(world) as process:
            items = await world.ended(job, 30)
            await eventually(lambda: world.job_state(job) == "done", "the job is done")
            assert await process.terminate() < 15
            assert process.child.returncode == 0
    assert [item.state for item in items] == ["unknown", "succeeded", "succeeded"]
    assert [head.split(b" ")[1] for head in target.heads] == [b"/0", b"/1", b"/2"]
    assert [flow.replay_position for flow in await world.published(FlowCompleted)] == [1, 2]
    await settle_job(world, items, [int(head.split(b" ")[1][1:]) for head in target.heads])


async def test_killed_again_and_again_under_load_nothing_is_sent_twice(world):
    """Kills at random instants while a job of unsafe requests runs: every request arrives at most once, and those
    that are called succeeded did arrive."""
    target = Target()
    target.open.set()
    async with RawServer(target) as server:
        flows = await world.store_requests(server.port, 200, b"POST")
        job = world.job(flows)
        for round_ in range(5):
            async with replayer(world) as process:
                enough = min(len(target.heads) + 7 + round_, 200)
                await eventually(lambda enough=enough: len(target.heads) >= enough, "some arrive", 30)
                process.kill()
        async with replayer(world) as process:
            items = await world.ended(job, 60)
            await process.terminate()
    hits = [int(head.split(b" ")[1][1:]) for head in target.heads]
    assert len(hits) == len(set(hits))
    states = {item.position: item.state for item in items}
    assert set(states.values()) <= {"succeeded", "unknown"}
    assert list(states.values()).count("unknown") <= 5
    assert {position for position, state in states.items() if state == "succeeded"} <= set(hits)
    flows_by_position = [flow.replay_position for flow in await world.published(FlowCompleted)]
    assert len(flows_by_position) == len(set(flows_by_position))
    assert {position for position, state in states.items() if state == "succeeded"} == set(flows_by_position)
    await settle_job(world, items, hits)


async def settle_job(world: World, items: list[Any], hits: list[int]) -> None:
    """The target's ledger of what arrived, less what the items say is unknown, against the flows that were published;
    each node's numbers have no gaps."""
    unknown = [f"{item.position}" for item in items if item.state == "unknown"]
    found = [record for record in map(decode, [r.value for r in await world.records()]) if record.seq]
    stored = [f"{flow.replay_position}" for flow in found if isinstance(flow, FlowCompleted)]
    settle([f"{hit}" for hit in hits], stored, accounts_of_events(found), failed=len(unknown), elsewhere=unknown)


async def test_stopped_long_enough_to_lose_its_lease_it_sends_nothing_twice(world):
    """SIGSTOP while the answer is outstanding: another replayer settles the item; the late answer then tells."""
    target = Target()
    other = World(world.database, world.root / "other")
    async with RawServer(target) as server:
        flow = await world.store_request(server.port, b"POST", b"/0")
        async with replayer(world, "--lease", "1") as stopped:
            await stopped.ready()
            job = world.job([flow])
            await eventually(lambda: target.heads, "the request arrives")
            os.kill(stopped.child.pid, signal.SIGSTOP)
            try:
                async with replayer(other) as process:
                    await process.ready()
                    await eventually(lambda: world.states(job) == ["unknown"], "its lease expires", 30)
                    target.open.set()
            finally:
                os.kill(stopped.child.pid, signal.SIGCONT)
            await eventually(lambda: world.states(job) == ["succeeded"], "the late answer is believed")
    assert len(target.heads) == 1


async def test_sigterm_ends_it_in_time_with_an_answer_outstanding(world):
    target = Target()
    async with RawServer(target) as server:
        flow = await world.store_request(server.port, b"POST", b"/0")
        async with replayer(world) as process:
            await process.ready()
            job = world.job([flow])
            await eventually(lambda: target.heads, "the request arrives")
            assert await process.terminate() < 15
            assert process.child.returncode == 0, process.log
        assert world.states(job) == ["unknown"]


async def test_sigterm_ends_it_in_time_with_the_database_away_too(world):
    """The answer comes, the row cannot be written: the next start completes it from the journal."""
    target = Target()
    async with RawServer(target) as server:
        flow = await world.store_request(server.port, b"POST", b"/0")
        async with replayer(world) as process:
            await process.ready()
            job = world.job([flow])
            await eventually(lambda: target.heads, "the request arrives")
            with connections_refused(world):
                target.open.set()
                await eventually(lambda: "the database is away" in process.log, "it notices")
                assert await process.terminate() < 15
                assert process.child.returncode == 0, process.log
        assert world.states(job) == ["sent"]
        async with replayer(world) as process:
            (item,) = await world.ended(job)
    assert (item.state, item.status) == ("succeeded", 200)
    assert len(target.heads) == 1


@contextmanager
def connections_refused(world: World) -> Iterator[None]:
    """The database as if it were away: nobody gets in, and who is in is thrown out."""
    with psycopg.connect(conninfo(world.database), dbname="postgres", autocommit=True) as admin:
        name = conninfo_to_dict(conninfo(world.database))["dbname"]
        admin.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
        try:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            yield
        finally:
            admin.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')


async def test_readiness_and_metrics(world):
    target = Target()
    target.open.set()
    async with RawServer(target) as server, replayer(world) as process, httpx.AsyncClient() as client:
        base = await process.ready()
        assert (await client.get(base + "/readyz")).status_code == 200
        job = world.job([await world.store_request(server.port)])
        await world.ended(job)
        text = (await client.get(base + "/metrics")).text
        assert 'megido_replay_items_total{state="succeeded"} 1.0' in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--database-url", "mysql://h/x"], "postgresql:// URL is needed"),
        (["--database-url", "postgresql:///x", "--protect", "nowhere"], "HOST:PORT"),
        (["--database-url", "postgresql:///x", "--ca-file", "/nonexistent"], "/nonexistent"),
        (["--database-url", "postgresql:///x", "--concurrency", "0"], "--concurrency"),
        ([], "no database"),
    ],
)
def test_bad_configuration_is_one_line(tmp_path, flags, message):
    command = [sys.executable, "-m", "megido_replayer", "--data-dir", str(tmp_path), *flags]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MEGIDO_")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env=env, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
