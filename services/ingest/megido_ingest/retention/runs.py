"""One run: a plan, and, unless it is a dry one, taking away what the plan says. Every step is noted as it is done.

Rows, log files and the bus are independent: what stands in the way of one is told, and the others go on.

Safe against a kill anywhere: a day goes in one transaction with its note, other rows in short ones, files one by one.
One run at a time: a session's advisory lock.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
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
        """A run of the schedule's: noted when there is something to remove, or something went wrong."""
        insert = (
            "INSERT INTO retention_runs (state, dry_run, requested_by, requested_at, report, error)"
            " VALUES ('running', false, %s, now(), '{}', '') RETURNING id"
        )
        (run,) = await fetch_one(await self.connection.execute(insert, [SCHEDULE]))
        return await self._noted(run, dry=False, quiet=True)

    async def asked(self, run: int, *, dry: bool) -> Report:
        """A run that was asked for. A dry one changes nothing but its own report."""
        await self.connection.execute("UPDATE retention_runs SET state = 'running' WHERE id = %s", [run])
        return await self._noted(run, dry=dry, quiet=False)

    async def failed(self, run: int, reason: str) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET state = 'failed', finished_at = now(), error = %s WHERE id = %s", [reason, run]
        )

    async def _noted(self, run: int, *, dry: bool, quiet: bool) -> Report:
        try:
            planned, found = await self._plan(await self.policy())
            if dry:
                await self._finish(run, planned)
                return planned
            if quiet and not planned.removes and not planned.errors:
                await self.connection.execute("DELETE FROM retention_runs WHERE id = %s", [run])
                await rows.drop_empty_days(self.connection, date.fromisoformat(planned.today), planned.policy)
                return planned
            return await self._carry_out(run, planned, found)
        except (psycopg.Error, OSError) as error:
            if not self.connection.closed:
                await self.failed(run, _line(error))
            raise

    async def _part[T](self, report: Report, name: str, work: Awaitable[T]) -> T | None:
        """What stands in the way of one part is told in the report, and holds up no other. Raises psycopg.Error when
        the connection is lost."""
        try:
            return await work
        except (psycopg.Error, OSError) as error:
            if self.connection.closed:
                raise
            report.errors.append(f"{name}: {_line(error)}")
            return None

    async def _plan(self, policy: Policy) -> tuple[Report, _Files]:
        today = utc(self._clock.time_us()).date()
        report = Report(policy=policy, today=today.isoformat())
        if planned := await self._part(report, "rows", rows.plan(self.connection, policy, today)):
            report = planned
        logs = await self._part(report, "log files", asyncio.to_thread(files.plan_logs, self._places.log_root, policy))
        logs = logs or Cleanup((), 0)
        report.logs = files.logs_of(logs, logs.kept_bytes)
        _tell_skipped(report, logs)
        where, bus = self._places.data_dir, None
        if where is not None:
            bus = await self._part(report, "bus", asyncio.to_thread(files.plan_bus, where))
        report.bus = files.bus_of(bus or {})
        return report, _Files(logs, bus or {})

    async def _carry_out(self, run: int, planned: Report, found: _Files) -> Report:
        done = Report(
            policy=planned.policy, today=planned.today, bytes_before=planned.bytes_before, errors=[*planned.errors]
        )
        await self._note(run, done)
        await self._remove_rows(run, planned, done)
        await self._note(run, done)
        failpoints.reach("retention_after_rows")
        root = self._places.log_root
        done.logs.kept_bytes = planned.logs.kept_bytes
        if removed := await self._part(done, "log files", asyncio.to_thread(cleaning.remove, root, found.logs.units)):
            done.logs = files.logs_of(removed, planned.logs.kept_bytes)
            _tell_skipped(done, removed)
        await self._note(run, done)
        failpoints.reach("retention_after_logs")
        before = len(done.errors)
        await self._part(done, "bus", asyncio.to_thread(files.free_bus, found.bus))
        if len(done.errors) == before:
            done.bus = planned.bus
        today = date.fromisoformat(planned.today)
        await self._part(done, "empty days", rows.drop_empty_days(self.connection, today, planned.policy))
        done.bytes_after = await rows.database_bytes(self.connection)
        limit = planned.policy.max_bytes
        done.over_bytes = max(0, done.bytes_after - limit) if limit else 0
        await self._finish(run, done)
        if done.removes:
            _log.info("retention run %d removed %s", run, summary(done))
        if done.errors:
            _log.warning("retention run %d could not do all: %s", run, "; ".join(done.errors))
        return done

    async def _remove_rows(self, run: int, planned: Report, done: Report) -> None:
        """A day that somebody would not let go of stays, with what is of its time in other tables; later days go."""
        first_kept = rows.first_kept(planned)
        for day in planned.days:
            if await self._part(done, day.day, rows.retire(self.connection, run, day)):
                failpoints.reach("retention_after_day")
                done.days.append(day)
            else:
                first_kept = min(first_kept, date.fromisoformat(day.day))
        if planned.days or any(planned.tables.values()):
            await self._part(done, "other rows", rows.remove_aged(self.connection, first_kept, done.tables))

    async def _note(self, run: int, report: Report) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET report = %s WHERE id = %s", [Jsonb(to_json(report)), run]
        )

    async def _finish(self, run: int, report: Report) -> None:
        await self.connection.execute(
            "UPDATE retention_runs SET state = %s, finished_at = now(), report = %s, error = %s WHERE id = %s",
            ["failed" if report.errors else "done", Jsonb(to_json(report)), "; ".join(report.errors), run],
        )


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _tell_skipped(report: Report, found: Cleanup) -> None:
    if found.skipped:
        report.errors.append(f"log files: {len(found.skipped)} folders were left, the first: {found.skipped[0]}")


def summary(report: Report) -> str:
    """One line of what went."""
    flows = sum(day.rows.get("flows", 0) for day in report.days)
    return (
        f"{len(report.days)} days with {flows} flows, {report.logs.files} log files, {report.bus.segments} segments; "
        f"the database has {report.bytes_after} bytes"
    )
