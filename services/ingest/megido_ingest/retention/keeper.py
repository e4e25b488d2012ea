"""When retention runs: every so many minutes, and when somebody asks. Part of the leader's background work."""

import asyncio
import logging

import psycopg
from prometheus_client import CollectorRegistry, Counter, Gauge

from megido_ingest.background import pause, serve_again
from megido_ingest.retention.runs import Places, Retention
from megido_shared.clock import Clock
from megido_shared.retention import Policy, Report
from megido_shared.retention.policy import CHANNEL

_LOOK_S = 2.0
_PAUSE_S = 5.0

_log = logging.getLogger(__name__)


class RetentionMetrics:
    """What retention did in this process, and whether it keeps to its limit."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.runs = Counter(
            "megido_retention_runs", "Runs that were not dry, by outcome: done, failed.", ["outcome"], registry=registry
        )
        self.rows = Counter("megido_retention_rows", "Rows removed, by table.", ["table"], registry=registry)
        self.log_bytes = Counter("megido_retention_log_bytes", "Bytes of log files removed.", registry=registry)
        self.database = Gauge("megido_database_bytes", "The database on disk, at the last run.", registry=registry)
        self.over = Gauge(
            "megido_retention_over_bytes",
            "How much the database was above its limit after the last run, because the last two days stay.",
            registry=registry,
        )

    def count(self, report: Report) -> None:
        self.runs.labels("failed" if report.errors else "done").inc()
        for day in report.days:
            for table, rows in day.rows.items():
                self.rows.labels(table).inc(rows)
        for table, rows in report.tables.items():
            self.rows.labels(table).inc(rows)
        self.log_bytes.inc(report.logs.bytes)
        self.database.set(report.bytes_after)
        self.over.set(report.over_bytes)


class Keeper:
    """Raises nothing that passes: a failed run is noted and tried again at its next time."""

    def __init__(self, url: str, places: Places, clock: Clock, metrics: RetentionMetrics) -> None:
        self._url = url
        self._places = places
        self._clock = clock
        self._metrics = metrics
        self._ran: float | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`."""
        await serve_again(self._serve, stop, what="retention", every_s=_PAUSE_S, log=_log)

    async def _serve(self, stop: asyncio.Event) -> None:
        async with Retention.opened(self._url, self._places, self._clock) as retention:
            if retention is None:  # a leader of before that has not ended yet
                await pause(stop, _PAUSE_S)
                return
            await retention.connection.execute(f"LISTEN {CHANNEL}")
            while not stop.is_set():
                await self.look(retention)
                async for _ in retention.connection.notifies(timeout=_LOOK_S, stop_after=1):
                    pass

    async def look(self, retention: Retention) -> None:
        """Does what is due. Raises psycopg.Error, OSError."""
        for run, dry in await retention.queued():
            await self._asked(retention, run, dry=dry)
        if self._is_due(await retention.policy()):
            self._ran = self._clock.monotonic()
            await self._scheduled(retention)

    def _is_due(self, policy: Policy) -> bool:
        if not policy.every_minutes or not (policy.limits_rows or policy.limits_logs):
            return False
        return self._ran is None or self._clock.monotonic() - self._ran >= policy.every_minutes * 60

    async def _asked(self, retention: Retention, run: int, *, dry: bool) -> None:
        try:
            report = await retention.asked(run, dry=dry)
        except OSError as error:
            self._metrics.runs.labels("failed").inc()
            await retention.failed(run, str(error))
            return
        except psycopg.Error:
            self._metrics.runs.labels("failed").inc()
            raise
        if not dry:
            self._metrics.count(report)

    async def _scheduled(self, retention: Retention) -> None:
        try:
            self._metrics.count(await retention.scheduled())
        except (psycopg.Error, OSError):
            self._metrics.runs.labels("failed").inc()
            raise
