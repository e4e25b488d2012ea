"""`/proxy/api/requests/{id}/replay/` and `/proxy/api/replays/`."""

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.fields import Offset
from megido_api.problems import ErrorAnswer, Problem, not_found
from megido_api.publishing import publish
from megido_api.replays import queries
from megido_api.replays.schemas import Job, ReplayAccepted, ReplayRequest, ReplayResult
from megido_api.replays.waiting import result, wait_for
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_shared import events, ids
from megido_shared.db import read
from megido_shared.replay import ReplayOptions

router = APIRouter(prefix="/proxy/api", tags=["replays"])

_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}
_ANSWERS = _NOT_FOUND | {
    202: {"model": ReplayAccepted, "description": "The job is queued, or takes longer than a request may"},
    409: {"model": ErrorAnswer, "description": "The request was posted a moment ago and is not stored yet"},
}


@router.post(
    "/requests/{reference}/replay/",
    summary="Send a request again",
    response_model=ReplayResult,
    response_model_exclude_unset=True,
    responses=_ANSWERS,
)
async def replay_request(
    state: StateDep,
    request: Request,
    reference: Annotated[str, Path(description="an id or a flow_id", examples=["123"])],
    options: ReplayRequest | None = None,
) -> Any:
    """To its original target or to another one. The answer is stored as a request of its own, linked to this one."""
    given = options or ReplayRequest()
    job_id = await _queue(state, reference, given, _own_endpoint(request))
    if given.wait:
        outcome = await wait_for(state, job_id, given.timeout)
        if outcome is not None:
            return await result(outcome, job_id)
    job_url = f"/proxy/api/replays/{job_id}/"
    content = {"job_id": str(job_id), "state": "queued" if not given.wait else "running", "job_url": job_url}
    return JSONResponse(content, 202, {"Location": job_url})


def _own_endpoint(request: Request) -> tuple[str, ...]:
    """Where this API listens, as the connection that the request came on says: nobody else can tell the replayer."""
    server = request.scope.get("server")
    if server is None or server[1] is None:  # a unix socket
        return ()
    host, port = server
    return (f"[{host}]:{port}" if ":" in host else f"{host}:{port}",)


async def _queue(state: State, reference: str, given: ReplayRequest, own: tuple[str, ...]) -> uuid.UUID:
    """The job, its item and the command on its way, all or nothing."""
    parsed = read.parse_reference(reference)
    if parsed is None:
        raise not_found("request", reference)
    raw_id = ids.new_id()
    job_id = ids.to_uuid(raw_id)
    settings = ReplayOptions(
        target_url=given.target_url or "",
        verify_tls=given.verify_tls,
        timeout_s=given.timeout,
        allow_loopback=state.settings.on_loopback,
        protect=own,
    )

    async def work(connection: AsyncConnection) -> None:
        flow = await queries.original(connection, parsed)
        if flow is None:
            if await queries.is_posted(connection, parsed):
                raise Problem(409, "not_stored_yet", "not stored yet; try again", headers={"Retry-After": "1"})
            raise not_found("request", reference)
        await queries.create(connection, job_id, flow, settings, datetime.now(UTC))
        command = events.ReplayFlows(**state.origin.identity(state.clock.time_us()), job_id=raw_id)
        await publish(connection, [command])

    await state.publish(work)
    return job_id


@router.get("/replays/{job_id}/", summary="A replay job and its items", response_model=Job, responses=_NOT_FOUND)
async def get_replay(
    state: StateDep, job_id: str, limit: Annotated[int, Query(ge=1, le=1000)] = 100, offset: Offset = 0
) -> Any:
    try:
        parsed = uuid.UUID(job_id)
    except ValueError:
        raise not_found("replay job", job_id) from None

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        job = await queries.job(connection, parsed)
        if job is None:
            raise not_found("replay job", job_id)
        items = await queries.items(connection, parsed, limit, offset)
        linked = await queries.request_ids(connection, {item.result_flow_id for item in items if item.result_flow_id})
        counts = await queries.counts(connection, parsed)
        return {
            "job_id": job.job_id,
            "state": job.state,
            "options": job.options,
            "created_by": job.created_by,
            "created_at": iso(job.created_at),
            "updated_at": iso(job.updated_at),
            "total_items": sum(counts.values()),
            "items_by_state": counts,
            "items": [_item(item, linked) for item in items],
        }

    return await state.database.read(work)


def _item(item: Any, linked: dict[uuid.UUID, int]) -> dict[str, Any]:
    return {
        "position": item.position,
        "state": item.state,
        "attempt": item.attempt,
        "original_request_id": item.original_id,
        "original_flow_id": item.original_flow_id,
        "replayed_request_id": linked.get(item.result_flow_id),
        "result_flow_id": item.result_flow_id,
        "status_code": item.status,
        "error": item.error,
        "deviations": list(item.deviations),
        "updated_at": iso(item.updated_at),
    }
