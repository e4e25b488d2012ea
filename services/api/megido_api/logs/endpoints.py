"""`/proxy/api/logs/`. The files are read where the API runs, below its --log-dir; nothing outside of it is."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy import select

from megido_api import removals
from megido_api.logs.schemas import Cleaned, CleanupInput, GeneralLog, LogList, LogType
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import ErrorAnswer, unavailable
from megido_api.state import State, StateDep
from megido_api.who import who
from megido_shared.db.tables import config_snapshots
from megido_shared.logfiles import below, cleaning, reading
from megido_shared.retention import Logs, Policy, Report

router = APIRouter(prefix="/proxy/api/logs", tags=["logs"])

LogLimit = Annotated[int, Query(ge=1, le=1000)]
_VIEWER = {"x-role": "viewer"}
_ADMIN = {"x-role": "admin"}
_UNREADABLE: dict[int | str, dict[str, Any]] = {503: {"model": ErrorAnswer, "description": "The disk refuses"}}

_MOST_BYTES = 32_000_000
_READERS = ThreadPoolExecutor(2, "log files")
"""So many read at a time: each may hold what it has read several times over."""

_log = logging.getLogger(__name__)


@router.get(
    "/", summary="The newest entries of the JSON log files", response_model=LogList, dependencies=ONLY_KNOWN,
    responses=_UNREADABLE, openapi_extra=_VIEWER,
)  # fmt: skip
async def list_logs(
    state: StateDep, log_type: Annotated[LogType, Query(alias="type")] = "requests", limit: LogLimit = 100
) -> Any:
    """Of both layouts. What is being written is left out. Reads 32 MB at most, and says so with `truncated`."""
    directory, budget = await _directory(state), reading.Budget(_MOST_BYTES)
    try:
        found = await _read(reading.recent, directory, log_type, limit, budget)
    except OSError as error:
        raise _unreadable(error) from error
    return {"logs": found, "type": log_type, "limit": limit, "truncated": budget.truncated, **_where(directory)}


@router.get(
    "/general/", summary="The last lines of proxy_general.log", response_model=GeneralLog, dependencies=ONLY_KNOWN,
    responses=_UNREADABLE, openapi_extra=_VIEWER,
)  # fmt: skip
async def list_general_log(state: StateDep, limit: LogLimit = 100) -> Any:
    directory = await _directory(state)
    try:
        found = await _read(reading.general, directory, limit)
    except OSError as error:
        raise _unreadable(error) from error
    return {"lines": found, "limit": limit, **_where(directory)}


@router.post(
    "/cleanup/", summary="Remove log files of old days", response_model=Cleaned, responses=_UNREADABLE,
    openapi_extra=_ADMIN,
)  # fmt: skip
async def clean_logs(state: StateDep, request: Request, wanted: CleanupInput) -> Any:
    """Days that ended more than `days_to_keep` days ago, below the whole of --log-dir. Postgres keeps its rows.
    Noted among the runs of retention."""
    root, days, dry = state.settings.log_dir, wanted.days_to_keep, wanted.dry_run
    report = Report(policy=Policy(log_days=days), today=datetime.now(UTC).date().isoformat())

    def work() -> cleaning.Cleanup:
        planned = cleaning.plan(root, days=days)
        found = planned if dry else cleaning.remove(root, planned.units)
        report.errors += sorted({*planned.skipped, *found.skipped})
        report.logs = _told(found, planned.kept_bytes)
        return found

    number = await state.database.write(
        lambda connection: removals.begin(connection, report, dry_run=dry, by=who(request))
    )
    try:
        found = await asyncio.to_thread(work)
    except OSError as error:
        report.errors.append(str(error))
        raise _unreadable(error) from error
    finally:
        await state.database.write(lambda connection: removals.ended(connection, number, report))
    if found.files and not dry:
        _log.info("%s removed %d log files older than %d days", who(request), found.files, days)
    return {
        "removed": found.files,
        "bytes": found.bytes,
        "dry_run": wanted.dry_run,
        "hours": sorted({unit.hour for unit in found.units}),
        "directory": str(root),
    }


def _told(found: cleaning.Cleanup, kept_bytes: int) -> Logs:
    hours = [unit.hour for unit in found.units]
    return Logs(found.files, found.bytes, kept_bytes, min(hours, default=""), max(hours, default=""))


async def _read[**P, T](work: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
    return await asyncio.get_running_loop().run_in_executor(_READERS, partial(work, *values, **named))


async def _directory(state: State) -> Path:
    """Where ingest writes now; the root for a place that it would refuse too."""
    named = select(config_snapshots.c.settings["log_directory"].astext).where(config_snapshots.c.scope == "global")
    wanted = await state.database.read(lambda connection: connection.scalar(named))
    try:
        return await asyncio.to_thread(below, state.settings.log_dir, wanted or "")
    except (ValueError, OSError):
        return state.settings.log_dir


def _where(directory: Path) -> dict[str, Any]:
    return {"directory": str(directory), "readable": directory.is_dir()}


def _unreadable(error: OSError) -> Exception:
    return unavailable(f"the log files cannot be read or removed: {error.strerror}", "logs_unreadable")
