"""The background work that one ingest process does for all: partitions, open flows of nodes that are gone, the
outbox, JSON logs, the text index. Who holds a session's advisory lock is the leader; when its session ends, another
takes over."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from megido_ingest import assembly, failures
from megido_ingest.accounts import AccountMetrics, keep_shown
from megido_ingest.background import pause
from megido_ingest.health import Health
from megido_ingest.indexer import IndexMetrics, TextIndexer
from megido_ingest.jsonlogs import JsonLogWriter, LogLayout
from megido_ingest.metrics import Metrics
from megido_ingest.retention import Keeper, Places, RetentionMetrics
from megido_ingest.rollups import prune
from megido_ingest.session import Session, commit, fetch_one
from megido_shared.bus.base import Bus
from megido_shared.clock import Clock
from megido_shared.datadir import DataDir
from megido_shared.db.connect import create_engine
from megido_shared.db.migrate import PARTITIONS_AHEAD
from megido_shared.db.outbox import Relay
from megido_shared.errors import Unavailable

LOOK_S = 2.0
PARTITIONS_S = 600.0
SILENT_S = 300.0
"""A node without a heartbeat for so long is gone. Heartbeats come every few seconds."""
RESTART_GRACE_S = 60.0
"""A node that started again says itself, and better, what became of its open flows; this long it may take."""
_INTERRUPT_AT_ONCE = 500

_OPEN = """
SELECT n.node, n.epoch, n.seen_at, n.started_at,
       (SELECT min(f.started_at) FROM flows f WHERE f.rank = 1 AND f.node = n.node AND f.epoch = n.epoch)
FROM nodes n
WHERE EXISTS (SELECT FROM flows f WHERE f.rank = 1 AND f.node = n.node AND f.epoch = n.epoch)
"""
_OF_NODE = """
SELECT flow_id FROM flows
WHERE rank = 1 AND node = %s AND epoch = %s AND (%s::timestamptz IS NULL OR started_at < %s)
ORDER BY flow_id LIMIT %s
"""

_log = logging.getLogger(__name__)

type Node = tuple[str, UUID]


class Silence:
    """Which nodes are silent, judged by this process's clock alone: by how long ago their `seen_at` last changed
    here. A node's clock may be wrong, and a backlog on the bus must not look like silence."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed: dict[Node, tuple[datetime, float]] = {}

    def forget(self) -> None:
        """Nothing could be heard for a while."""
        self._changed.clear()

    def seconds(self, node: Node, seen_at: datetime) -> float:
        """How long a node has been silent."""
        now = self._clock.monotonic()
        known = self._changed.get(node)
        if known is None or known[0] != seen_at:
            self._changed[node] = (seen_at, now)
            return 0.0
        return now - known[1]


class OpenFlows:
    """Closes the open flows of nodes that are silent, or that have started anew since."""

    def __init__(self, session: Session, clock: Clock, health: Health, metrics: Metrics) -> None:
        self._session = session
        self._silence = Silence(clock)
        self._since_start = Silence(clock)
        self._health = health
        self._metrics = metrics

    async def look(self) -> int:
        """Returns how many flows were closed. Raises psycopg.Error, Unavailable."""
        if self._health.bus or not self._health.consuming:
            self._silence.forget()
            return 0
        connection = await self._session.connection()
        nodes = await (await connection.execute(_OPEN)).fetchall()
        closed = 0
        for node, epoch, seen_at, started_at, oldest in nodes:
            if self._silence.seconds((node, epoch), seen_at) >= SILENT_S:
                closed += await self._close(node, epoch, None)
            elif (
                started_at is not None
                and oldest < started_at
                and self._since_start.seconds((node, epoch), started_at) >= RESTART_GRACE_S
            ):
                closed += await self._close(node, epoch, started_at)
        return closed

    async def _close(self, node: str, epoch: UUID, before: datetime | None) -> int:
        connection = await self._session.connection()
        closed = 0
        while True:
            values: list[Any] = [node, epoch, before, before, _INTERRUPT_AT_ONCE]
            found = [row[0] for row in await (await connection.execute(_OF_NODE, values)).fetchall()]
            if not found:
                break
            closed += await interrupt(self._session, found)
        if closed:
            _log.warning("%d open flows of %s were marked interrupted, the node is gone", closed, node)
            self._metrics.interrupted.inc(closed)
        return closed


async def interrupt(session: Session, flow_ids: list[UUID]) -> int:
    """Marks flows that are still open as interrupted, with the part of their bodies that had come."""
    async with session.transaction() as connection:
        cursor = await connection.execute("SELECT * FROM interrupt_flows(%s::uuid[])", [flow_ids])
        batch, interrupted = await fetch_one(cursor)
        await assembly.assemble_interrupted(connection, batch, interrupted)
        await commit(connection, batch, changed=bool(interrupted))
        return len(interrupted)


class Leader:
    """Runs the background work while it is the leader. Raises nothing that passes: a failure is tried again."""

    def __init__(
        self,
        url: str,
        bus: Bus,
        log_root: Path,
        *,
        clock: Clock,
        metrics: Metrics,
        health: Health,
        log_layout: LogLayout = "tree",
        data_dir: DataDir | None = None,
    ) -> None:
        self._url = url
        self._bus = bus
        self._log_root = log_root
        self._log_layout = log_layout
        self._places = Places(log_root, data_dir)
        self._metrics = metrics
        self._session = Session(url, "megido ingest leader", shard=False)
        self._open_flows = OpenFlows(self._session, clock, health, metrics)
        self._clock = clock
        self._accounts = AccountMetrics(metrics.registry)
        self._retention_metrics = RetentionMetrics(metrics.registry)
        self._index_metrics = IndexMetrics(metrics.registry)
        self._partitions_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`."""
        complained = False
        while not stop.is_set():
            try:
                connection = await self._session.connection()
                cursor = await connection.execute("SELECT pg_try_advisory_lock(hashtext('megido.leader'))")
                if (await fetch_one(cursor))[0]:
                    _log.info("this process does the background work")
                    complained = False
                    await self._lead(connection, stop)
            except (psycopg.Error, Unavailable) as error:
                if not complained:
                    _log.warning("background work waits: %s", failures.unavailable(error))
                complained = True
                await self._session.close()
            await pause(stop, LOOK_S)
        await self._session.close()

    async def _lead(self, connection: psycopg.AsyncConnection[TupleRow], stop: asyncio.Event) -> None:
        """While the session that holds the lock lives."""
        resign = asyncio.Event()
        self._metrics.leader.set(1)
        self._partitions_at = 0.0
        engine = create_engine(self._url, application_name="megido ingest outbox", pool_size=2)
        relay = Relay(engine, lambda: self._bus.producer("ingest"))
        logs = JsonLogWriter(self._url, self._log_root, self._log_layout)
        keeper = Keeper(self._url, self._places, self._clock, self._retention_metrics)
        tasks = [
            asyncio.create_task(_kept_up("outbox relay", relay.run, resign)),
            asyncio.create_task(_kept_up("retention", keeper.run, resign)),
            asyncio.create_task(_kept_up("JSON logs", logs.run, resign)),
            asyncio.create_task(_kept_up("accounting", self._show_accounts, resign)),
            asyncio.create_task(_kept_up("text index", TextIndexer(self._url, self._index_metrics).run, resign)),
        ]
        try:
            while not stop.is_set():
                await self._partitions(connection)
                await self._open_flows.look()
                await pause(stop, LOOK_S)
        finally:
            self._metrics.leader.set(0)
            resign.set()
            _, pending = await asyncio.wait(tasks, timeout=5)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await engine.dispose()

    async def _show_accounts(self, stop: asyncio.Event) -> None:
        await keep_shown(self._url, self._bus, self._clock, self._accounts, stop)

    async def _partitions(self, connection: psycopg.AsyncConnection[TupleRow]) -> None:
        now = self._clock.monotonic()
        if now < self._partitions_at:
            return
        made = (await fetch_one(await connection.execute(PARTITIONS_AHEAD)))[0]
        if made:
            _log.info("%d partitions were made", made)
        await prune(connection)
        self._partitions_at = now + PARTITIONS_S


async def _kept_up(what: str, run: Callable[[asyncio.Event], Awaitable[None]], stop: asyncio.Event) -> None:
    """Runs a part of the background work until `stop`. It handles what passes by itself; a defect in it is
    logged, and must not take the rest down."""
    while not stop.is_set():
        try:
            await run(stop)
        except Exception:  # noqa: BLE001 - whatever it is, the other parts go on
            _log.exception("%s failed, starting it again", what)
            await pause(stop, LOOK_S)
