"""`/proxy/api/retention/`."""

import asyncio
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.fields import Limit
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import ErrorAnswer, not_found
from megido_api.retention import queries
from megido_api.retention.schemas import (
    Pin,
    PinList,
    PolicyChange,
    PolicyHistory,
    RetentionState,
    Run,
    RunInput,
    RunList,
)
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_api.who import who

router = APIRouter(prefix="/proxy/api/retention", tags=["retention"])

WAIT_S = 20.0
"""For a run's end; longer ones are answered 202."""
_LOOK_S = 0.1
_VIEWER = {"x-role": "viewer"}
_OPERATOR = {"x-role": "operator"}
_ADMIN = {"x-role": "admin"}
Reference = Annotated[str, Path(description="an id or a flow_id", examples=["123"])]
RunId = Annotated[int, Path(ge=0, lt=2**63)]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}
_LATER: dict[int | str, dict[str, Any]] = {202: {"model": Run, "description": "Not done yet; `Location` will tell"}}


@router.get(
    "/", summary="What is kept for how long, and what is stored", response_model=RetentionState,
    dependencies=ONLY_KNOWN, openapi_extra=_VIEWER,
)  # fmt: skip
async def get_retention(state: StateDep) -> Any:
    return await state.database.read(_state)


@router.patch("/", summary="Change the policy", response_model=RetentionState, openapi_extra=_ADMIN)
async def change_retention(state: StateDep, request: Request, wanted: PolicyChange) -> Any:
    """In force at the next run. What was there before, and who changed it, is in the history."""
    fields = wanted.model_dump(exclude_none=True)

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        await queries.change_policy(connection, fields, who(request))
        return await _state(connection)

    return await state.database.write(work)


@router.post(
    "/", summary="Run retention now, or say what it would remove", response_model=Run, responses=_LATER,
    openapi_extra=_ADMIN,
)  # fmt: skip
async def run_retention(state: StateDep, request: Request, response: Response, wanted: RunInput) -> Any:
    """Ingest's leader does it. Answers once it is done, 202 when that takes long or no ingest runs."""
    number = await state.database.write(
        lambda connection: queries.ask(connection, dry_run=wanted.dry_run, by=who(request))
    )
    row = await _ended(state, number)
    if row.state in ("queued", "running"):
        response.status_code = 202
        response.headers["Location"] = f"/proxy/api/retention/runs/{number}/"
    return _run(row)


@router.get("/history/", summary="Changes of the policy", response_model=PolicyHistory, openapi_extra=_VIEWER)
async def list_retention_changes(state: StateDep) -> Any:
    rows = await state.database.read(lambda connection: queries.changes(connection, 1000))
    return {"changes": [row._asdict() | {"changed_at": iso(row.changed_at)} for row in rows]}


@router.get(
    "/runs/", summary="Runs, newest first", response_model=RunList, dependencies=ONLY_KNOWN, openapi_extra=_VIEWER
)
async def list_retention_runs(
    state: StateDep, limit: Limit = 50, cursor: Annotated[int | None, Query(ge=0, lt=2**63)] = None
) -> Any:
    """Those that somebody asked for, and those of the schedule that removed something or failed."""
    rows = await state.database.read(lambda connection: queries.runs(connection, limit=limit, cursor=cursor))
    more = len(rows) > limit
    return {
        "runs": [_run(row) for row in rows[:limit]],
        "limit": limit,
        "next_cursor": rows[limit - 1].id if more else None,
    }


@router.get("/runs/{run_id}/", summary="One run", response_model=Run, responses=_NOT_FOUND, openapi_extra=_VIEWER)
async def get_retention_run(state: StateDep, run_id: RunId) -> Any:
    row = await state.database.read(lambda connection: queries.run(connection, run_id))
    if row is None:
        raise not_found("retention run", run_id)
    return _run(row)


@router.get("/pins/", summary="Pinned flows", response_model=PinList, dependencies=ONLY_KNOWN, openapi_extra=_VIEWER)
async def list_pins(state: StateDep, limit: Limit = 100, cursor: uuid.UUID | None = None) -> Any:
    rows = await state.database.read(lambda connection: queries.pins(connection, limit=limit, cursor=cursor))
    more = len(rows) > limit
    return {
        "pins": [_pin(row) for row in rows[:limit]],
        "limit": limit,
        "next_cursor": rows[limit - 1].flow_id.hex if more else None,
    }


@router.put(
    "/pins/{reference}/", summary="Pin a flow", response_model=Pin, responses=_NOT_FOUND, openapi_extra=_OPERATOR
)
async def pin_flow(state: StateDep, request: Request, reference: Reference) -> Any:
    """Retention leaves it alone, with its bodies, WebSocket messages and errors. Pinning again changes nothing."""
    wanted = _parse(reference)
    row = await state.database.write(lambda connection: queries.pin(connection, wanted, who(request)))
    if row is None:
        raise not_found("request", reference)
    return _pin(row)


@router.delete(
    "/pins/{reference}/", summary="Unpin a flow", status_code=204, responses=_NOT_FOUND, openapi_extra=_OPERATOR
)
async def unpin_flow(state: StateDep, reference: Reference) -> Response:
    wanted = _parse(reference)
    if not await state.database.write(lambda connection: queries.unpin(connection, wanted)):
        raise not_found("request", reference)
    return Response(status_code=204)


async def _state(connection: AsyncConnection) -> dict[str, Any]:
    row = await queries.policy_row(connection)
    last = await queries.last_run(connection)
    policy = queries.policy_of(row)
    return {
        "policy": {name: getattr(policy, name) for name in policy.__struct_fields__},
        "changed_by": row.changed_by if row else None,
        "changed_at": iso(row.changed_at) if row else None,
        "database_bytes": await queries.database_bytes(connection),
        "days": [{"day": day.day.isoformat(), "bytes": day.bytes} for day in await queries.days(connection)],
        "pinned_flows": await queries.count_pins(connection),
        "last_run": None if last is None else _run(last),
    }


async def _ended(state: State, number: int) -> Row[Any]:
    """The run once it has ended, or as it is after `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while True:
        row = await state.database.read(lambda connection: queries.run(connection, number))
        assert row is not None
        if row.state in ("done", "failed") or time.monotonic() > deadline or state.stopping.is_set():
            return row
        await asyncio.sleep(_LOOK_S)


def _run(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "state": row.state,
        "dry_run": row.dry_run,
        "requested_by": row.requested_by,
        "requested_at": iso(row.requested_at),
        "finished_at": iso(row.finished_at) if row.finished_at else None,
        "error": row.error or None,
        "report": row.report or None,
    }


def _pin(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "flow_id": row.flow_id.hex,
        "url": row.url,
        "pinned_by": row.pinned_by,
        "pinned_at": iso(row.pinned_at),
    }


def _parse(reference: str) -> int | uuid.UUID:
    if reference.isascii() and reference.isdigit() and len(reference) < 19:
        return int(reference)
    try:
        return uuid.UUID(reference)
    except ValueError:
        raise not_found("request", reference) from None
