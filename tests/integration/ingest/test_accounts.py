"""Accounting as metrics."""

import asyncio
from pathlib import Path
from uuid import uuid4

from prometheus_client import CollectorRegistry

from megido_ingest.accounts import AccountMetrics, keep_shown
from megido_shared import events, ids
from megido_shared.accounting import Heartbeat
from megido_shared.bus.local import LocalBus
from megido_shared.clock import SystemClock
from megido_shared.datadir import DataDir
from megido_shared.db.accounting import Figures, accounts
from megido_shared.testing import a_completed_flow
from tests.integration.ingest.support import Log, ingest
from tests.integration.ingest.traffic import an_event


async def test_gauges_by_node_while_somebody_leads(database: str, tmp_path: Path) -> None:
    log = Log()
    counters = {"dropped_terminal": 1, "dropped_terminal:cap": 1, "journal_waiting": 0}
    for epoch, captured in ((ids.new_id(), 4), (ids.new_id(), 3)):
        flows = [a_completed_flow(node="capture-0", epoch=epoch, seq=seq) for seq in (1, 2)]
        status = an_event(
            events.NodeStatus, state="running", epoch=epoch, captured=captured, counters=counters, time_us=1
        )
        log.add(*flows, status)
    await ingest(database, [log.records])
    registry, stop = CollectorRegistry(), asyncio.Event()

    def gauge(name: str) -> float | None:
        return registry.get_sample_value(f"megido_accounting_{name}", {"node": "capture-0"})

    bus = LocalBus(DataDir(tmp_path / "data"))
    task = asyncio.create_task(keep_shown(database, bus, SystemClock(), AccountMetrics(registry), stop))
    async with asyncio.timeout(20):
        while gauge("captured") is None:
            assert not task.done()
            await asyncio.sleep(0.02)
    shown = {name: gauge(name) for name in ("captured", "stored", "waiting", "dropped", "unexplained", "corrupt")}
    assert shown == {"captured": 7, "stored": 4, "waiting": 0, "dropped": 2, "unexplained": 1, "corrupt": 0}
    stop.set()
    await task
    assert gauge("captured") is None, "another may lead now, and the figures of here would grow old"


async def test_nothing_is_shown_while_the_database_is_away(tmp_path: Path) -> None:
    registry, stop = CollectorRegistry(), asyncio.Event()
    metrics = AccountMetrics(registry)
    heard = Heartbeat("capture", "running", 1.0, 3, {}, 0)
    metrics.show(accounts(Figures(heartbeats={("capture-0", uuid4()): heard}), {}))
    assert registry.get_sample_value("megido_accounting_captured", {"node": "capture-0"}) == 3
    away = "postgresql://megido@127.0.0.1:9/none"
    bus = LocalBus(DataDir(tmp_path / "data"))
    task = asyncio.create_task(keep_shown(away, bus, SystemClock(), metrics, stop))
    async with asyncio.timeout(20):
        while any(metric.samples for metric in registry.collect()):
            assert not task.done()
            await asyncio.sleep(0.02)
    stop.set()
    await task
