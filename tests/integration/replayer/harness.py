"""The real service in this process, on a real Postgres and a real local bus, and the rows that it works on."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from megido_replayer.__main__ import serve
from megido_replayer.settings import Settings
from megido_shared import events, ids
from megido_shared.bus.base import Batch, Record, Stream
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import FLOWS, NODES, REPLAY_RESULTS
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo, create_engine
from megido_shared.db.read import StoredFlow, load_flow
from megido_shared.replay import ReplayOptions, to_json
from megido_shared.settings import Common
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.ingest.support import Log, ingest

FINAL = {"succeeded", "failed", "timed_out", "skipped", "cancelled", "unknown"}


@dataclass
class World:
    """A database and a data directory; what a person would do with them."""

    database: str
    root: Path

    @property
    def data_dir(self) -> DataDir:
        return DataDir(self.root / "data")

    def settings(self, **changes: Any) -> Settings:
        common = Common(self.data_dir.ensure(), database_url=self.database)
        return Settings(**({"common": common, "metrics_port": 0, "poll_s": 0.1} | changes))

    # Originals

    async def store(self, *flows: events.FlowCompleted) -> list[uuid.UUID]:
        """Stores captured flows as ingest does."""
        log = Log(Stream(uuid.uuid4().hex, FLOWS.name, 0))
        await ingest(self.database, [log.add(*flows)])
        return [ids.to_uuid(flow.flow_id) for flow in flows]

    async def store_request(self, port: int, method: bytes = b"GET", target: bytes = b"/", **fields: Any) -> uuid.UUID:
        (flow_id,) = await self.store(captured(port, method, target, **fields))
        return flow_id

    async def store_requests(self, port: int, count: int, method: bytes = b"GET") -> list[uuid.UUID]:
        """Requests of /0, /1, … in this order."""
        return await self.store(*(captured(port, method, b"/%d" % number) for number in range(count)))

    # Jobs

    def job(self, flows: Sequence[uuid.UUID], *, state: str = "queued", **options: Any) -> uuid.UUID:
        """A job as the API makes it; loopback allowed, as the API on loopback says."""
        job_id = ids.to_uuid(ids.new_id())
        chosen = to_json(ReplayOptions(**({"allow_loopback": True} | options)))
        with self.sql() as sql:
            sql.execute(
                "INSERT INTO replay_jobs VALUES (%s, %s, %s::jsonb, 'test', now(), now())", (job_id, state, chosen)
            )
            for position, flow_id in enumerate(flows):
                sql.execute(
                    "INSERT INTO replay_items (job_id, position, original_flow_id, original_id, state, attempt,"
                    " updated_at) VALUES (%s, %s, %s, 7, 'queued', 0, now())",
                    (job_id, position, flow_id),
                )
        return job_id

    def sql(self) -> psycopg.Connection[Any]:
        return psycopg.connect(conninfo(self.database), autocommit=True, row_factory=namedtuple_row)

    def items(self, job_id: uuid.UUID) -> list[Any]:
        with self.sql() as sql:
            return sql.execute("SELECT * FROM replay_items WHERE job_id = %s ORDER BY position", (job_id,)).fetchall()

    def states(self, job_id: uuid.UUID) -> list[str]:
        return [item.state for item in self.items(job_id)]

    def job_state(self, job_id: uuid.UUID) -> str:
        with self.sql() as sql:
            row = sql.execute("SELECT state FROM replay_jobs WHERE job_id = %s", (job_id,)).fetchone()
        return str(row[0])

    async def change(self, statement: str, *values: Any) -> None:
        """An update in a thread: it may have to wait for a lock of the service, which runs in this one."""

        def work() -> None:
            with self.sql() as sql:
                sql.execute(statement, values)

        await asyncio.to_thread(work)

    async def ended(self, job_id: uuid.UUID, seconds: float = 20.0) -> list[Any]:
        """The items once all of them are in a final state and the job, which is settled after them, is too."""
        await eventually(lambda: set(self.states(job_id)) <= FINAL, f"the items of job {job_id} end", seconds)
        await eventually(lambda: self.job_state(job_id) not in ("queued", "running"), f"job {job_id} ends", seconds)
        return self.items(job_id)

    # What was published

    async def published(self, kind: type[Any]) -> list[Any]:
        """Every event of a type that is on the bus, in order within its node."""
        return [event for event in map(events.decode, [r.value for r in await self.records()]) if type(event) is kind]

    async def records(self) -> list[Record]:
        bus = LocalBus(self.data_dir)
        consumer = await bus.consumer(f"test-{next(_groups)}", [FLOWS, REPLAY_RESULTS, NODES])
        found: list[Record] = []
        try:
            while batch := await consumer.poll(timeout=0.2):
                found.extend(batch.records)
        finally:
            await consumer.close()
            await bus.close()
        return found

    async def ingest_published(self) -> None:
        """Stores what was published, as ingest does."""
        found = [record for record in await self.records() if record.stream.topic == FLOWS.name]
        await ingest(self.database, [Batch(found).records])

    async def load(self, flow_id: uuid.UUID) -> StoredFlow:
        engine = create_engine(self.database)
        async with engine.connect() as connection:
            flow = await load_flow(connection, flow_id)
        await engine.dispose()
        assert flow is not None
        return flow


def captured(port: int, method: bytes, target: bytes, **fields: Any) -> events.FlowCompleted:
    """A flow to the target on this machine, with only a Host header unless said otherwise."""
    headers = fields.pop("headers", [(b"Host", b"127.0.0.1:%d" % port)])
    known = {"scheme": "http", "host": "127.0.0.1", "port": port, "method": method, "target": target}
    return a_completed_flow(request=a_request(**(known | fields), headers=events.pack_headers(headers)))


_groups = itertools.count()


@asynccontextmanager
async def replaying(settings: Settings, *, forwarder: bool = False) -> AsyncIterator[asyncio.Task[None]]:
    """The service, stopped as SIGTERM stops it."""
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop, forwarder=forwarder))
    try:
        yield task
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await task


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; last: {answer!r}"
        await asyncio.sleep(0.02)
    return answer
