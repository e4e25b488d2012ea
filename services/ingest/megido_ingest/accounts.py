"""Accounting as metrics, by the leader: what the API answers at `/proxy/api/accounting/`, for alerts."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_shared.bus.base import Bus
from megido_shared.clock import Clock, utc
from megido_shared.db.accounting import Accounts, Figures, look
from megido_shared.db.connect import create_engine

EVERY_S = 10.0
_READ_BYTES = 8 << 20
"""Of journals; more that waits is inferred. This process has records to store."""

_GAUGES = {
    "captured": "Terminal records that a node has numbered.",
    "stored": "Those that were stored.",
    "waiting": "Those in the journal, on the bus, or not told of yet by the node.",
    "dead_lettered": "Those kept with a reason.",
    "dropped": "Those that the node's journal could not take.",
    "expired": "Those that the bus removed before they were stored.",
    "corrupt": "Those damaged in the journal.",
    "unexplained": "Those that are nowhere; below 0: counted twice.",
}


class AccountMetrics:
    """Gauges by node; a node's are the sums over its data directories. None where this process does not lead."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges = {
            name: Gauge(f"megido_accounting_{name}", text, ["node"], registry=registry)
            for name, text in _GAUGES.items()
        }

    def show(self, accounts: Accounts) -> None:
        nodes: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_GAUGES, 0))
        for account in accounts.nodes:
            balance, sums = account.balance, nodes[account.node]
            for name in _GAUGES.keys() - {"dropped"}:
                sums[name] += getattr(balance, name)
            sums["waiting"] += balance.since_heartbeat
            sums["dropped"] += sum(balance.dropped.values())
        self.clear()
        for node, sums in nodes.items():
            for name, value in sums.items():
                self._gauges[name].labels(node).set(value)

    def clear(self) -> None:
        for gauge in self._gauges.values():
            gauge.clear()


async def keep_shown(url: str, bus: Bus, clock: Clock, metrics: AccountMetrics, stop: asyncio.Event) -> None:
    """Until `stop`. While Postgres is away there are no figures."""
    engine = create_engine(url, application_name="megido ingest accounting", pool_size=1)
    try:
        while not stop.is_set():
            try:
                metrics.show(await look(_reader(engine), bus, utc(clock.time_us()), read_bytes=_READ_BYTES))
            except (SQLAlchemyError, OSError):
                metrics.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), EVERY_S)
    finally:
        metrics.clear()
        await engine.dispose()


def _reader(engine: AsyncEngine) -> Callable[[Callable[[AsyncConnection], Awaitable[Figures]]], Awaitable[Figures]]:
    async def read(work: Callable[[AsyncConnection], Awaitable[Figures]]) -> Figures:
        async with engine.connect() as connection:
            return await work(connection)

    return read
