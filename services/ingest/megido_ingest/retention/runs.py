"""One run: a plan, and, unless it is a dry one, taking away what the plan says. Every step is noted as it is done.

Safe against a kill anywhere: a day goes in one transaction with its note, other rows in short ones, files one by one.
One run at a time: a session's advisory lock.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from megido_ingest import failpoints
from megido_ingest.retention import files, rows
from megido_ingest.session import fetch_one
from megido_shared.clock import Clock, utc
from megido_shared.datadir import DataDir
from megido_shared.db.connect import connect
from megido_shared.logfiles import cleaning
from megido_shared.logfiles.cleaning import Cleanup
from megido_shared.retention import FIELDS, NOTHING, Policy, Report
from megido_shared.retention.report import to_json

SCHEDULE = "schedule"
"""Who asks for a run that nobody asked for."""
_SETTINGS = "SET lock_timeout = '2s'; SET idle_in_transaction_session_timeout = '10s'"
_STATEMENT_MS = 600_000
_POLICY = f"SELECT {', '.join(FIELDS)} FROM retention_policy"  # noqa: S608 - our own names
_LOCK = "SELECT pg_try_advisory_lock(hashtext('megido.retention'))"

type _Connection = psycopg.AsyncConnection[TupleRow]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """What lies in files: the root of the log files, and the data directory with the local bus."""

    log_root: Path
    data_dir: DataDir | None = None


@dataclass(frozen=True, slots=True)
class _Files:
    logs: Cleanup
    bus: dict[Path, list[Any]]


class Retention:
    """Runs with one connection of its own, in autocommit mode. Methods raise psycopg.Error and OSError."""

    def __init__(self, connection: _Connection, places: Places, clock: Clock) -> None:
        self.connection = connection
        self._places = places
        self._clock = clock

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str, places: Places, clock: Clock) -> AsyncIterator["Retention | None"]:
        """None while another run is under way."""
        connection = await connect(url, application_name="megido retention", statement_timeout_ms=_STATEMENT_MS)
        try:
            await connection.execute(_SETTINGS)
            mine = (await fetch_one(await connection.execute(_LOCK)))[0]
            yield cls(connection, places, clock) if mine else None
        finally:
            await connection.close()

    async def policy(self) -> Policy:
        row = await (await self.connection.execute(_POLICY)).fetchone()
        return NOTHING if row is None else Policy(*row)

    async def queued(self) -> list[tuple[int, bool]]:
        """(id, dry run) of the runs that were asked for. Those that a dead process had begun are failed first."""
        await self.connection.execute(
            "UPDATE retention_runs SET state = 'failed', finished_at = now(),"
            " error = 'ingest ended meanwhile; what the report says was removed' WHERE state = 'running'"
        )
        query = "SELECT id, dry_run FROM retention_runs WHERE state = 'queued' ORDER BY id"
        return [(run, dry) for run, dry in await (await self.connection.execute(query)).fetchall()]

    async def scheduled(self) -> Report:
        """A run of the schedule's: noted when there is something to remove."""
        policy = await self.policy()
        planned, found = await self._plan(policy)
        if not planned.removes:
            await rows.drop_empty_days(self.connection, date.fromisoformat(planned.today), policy)
            return planned
        insert = (
            "INSERT INTO retention_runs (state, dry_run, requested_by, requested_at, report, error)"
            " VALUES ('running', false, %s, now(), '{}', '') RETURNING id"
        )
        (run,) = await fetch_one(await self.connection.execute(insert, [SCHEDULE]))
        return await self._noted(run, planned, found)

    async def asked(self, run: int, *, dry: bool) -> Report:
        """A run that was asked for. A dry one changes nothing but its own report."""
        await self.connection.execute("UPDATE retention_runs SET state = 'running' WHERE id = %s", [run])
        planned, found = await self._plan(await self.policy())
        if dry:
            await self._finish(run, planned)
            return planned
        return await self._noted(run, planned, found)

    async def failed(self, run: int, reason: str) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET state = 'failed', finished_at = now(), error = %s WHERE id = %s", [reason, run]
        )

    async def _plan(self, policy: Policy) -> tuple[Report, _Files]:
        report = await rows.plan(self.connection, policy, utc(self._clock.time_us()).date())
        logs = await asyncio.to_thread(files.plan_logs, self._places.log_root, policy)
        report.logs = files.logs_of(logs, logs.kept_bytes)
        bus = await asyncio.to_thread(files.plan_bus, self._places.data_dir) if self._places.data_dir else {}
        report.bus = files.bus_of(bus)
        return report, _Files(logs, bus)

    async def _noted(self, run: int, planned: Report, found: _Files) -> Report:
        try:
            return await self._carry_out(run, planned, found)
        except (psycopg.Error, OSError) as error:
            if not self.connection.closed:
                await self.failed(run, str(error).strip().partition("\n")[0])
            raise

    async def _carry_out(self, run: int, planned: Report, found: _Files) -> Report:
        done = Report(policy=planned.policy, today=planned.today, bytes_before=planned.bytes_before)
        await self._note(run, done)
        for day in planned.days:
            await rows.retire(self.connection, run, day)
            failpoints.reach("retention_after_day")
            done.days.append(day)
        done.tables = await rows.remove_aged(self.connection, rows.first_kept(planned))
        failpoints.reach("retention_after_rows")
        removed = await asyncio.to_thread(cleaning.remove, self._places.log_root, found.logs.units)
        done.logs = files.logs_of(removed, planned.logs.kept_bytes)
        failpoints.reach("retention_after_logs")
        done.bus = planned.bus
        await asyncio.to_thread(files.free_bus, found.bus)
        await rows.drop_empty_days(self.connection, date.fromisoformat(planned.today), planned.policy)
        done.bytes_after = await rows.database_bytes(self.connection)
        limit = planned.policy.max_bytes
        done.over_bytes = max(0, done.bytes_after - limit) if limit else 0
        await self._finish(run, done)
        if done.removes:
            _log.info("retention run %d removed %s", run, summary(done))
        return done

    async def _note(self, run: int, report: Report) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET report = %s WHERE id = %s", [Jsonb(to_json(report)), run]
        )

    async def _finish(self, run: int, report: Report) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET state = 'done', finished_at = now(), report = %s WHERE id = %s",
            [Jsonb(to_json(report)), run],
        )


def summary(report: Report) -> str:
    """One line of what went."""
    flows = sum(day.rows.get("flows", 0) for day in report.days)
    return (
        f"{len(report.days)} days with {flows} flows, {report.logs.files} log files, {report.bus.segments} segments; "
        f"the database has {report.bytes_after} bytes"
    )
