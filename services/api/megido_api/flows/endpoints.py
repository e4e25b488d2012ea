"""`/proxy/api/requests/` and `/proxy/api/responses/`."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.answers import Created
from megido_api.fields import Bound, Cursor, Filter, Flag, Limit, Offset
from megido_api.flows import detail, posting, queries
from megido_api.flows.schemas import PostedRequest, PostedResponse, RequestDetail, RequestList
from megido_api.paging import Page, Total
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import ErrorAnswer, Problem, not_found
from megido_api.publishing import next_number, publish, split
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_shared import events, ids
from megido_shared.db import read, tables

router = APIRouter(prefix="/proxy/api", tags=["requests"])

Reference = Annotated[str, Path(description="an id or a flow_id", examples=["123"])]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}
_BYTES: dict[int | str, dict[str, Any]] = _NOT_FOUND | {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get("/requests/", summary="List requests, newest first", response_model=RequestList, dependencies=ONLY_KNOWN)
async def list_requests(  # noqa: PLR0917 - query parameters, by name
    state: StateDep,
    method: Filter = None,
    protocol: Filter = None,
    source_ip: Filter = None,
    is_replay: Flag = None,
    search: Annotated[Filter, Query(description="substring of URL, host or user agent, in any case")] = None,
    limit: Limit = 100,
    offset: Offset = 0,
    cursor: Cursor = None,
    before: Bound = None,
    after: Bound = None,
) -> Any:
    """Pages by `limit` and `offset`, or, equally fast at any depth, by `cursor`."""
    filters = queries.Filters(method, protocol, source_ip, is_replay, search, before, after)

    async def work(connection: AsyncConnection) -> tuple[Page, Total]:
        page = await queries.page(connection, filters, cursor=cursor, limit=limit, offset=offset)
        if cursor is None and not page.more and (page.rows or not offset):
            return page, Total(offset + len(page.rows), exact=True)
        total = await queries.total(connection, filters)
        if not total.exact and page.rows:  # counted in part, perhaps of less than was found here
            total = replace(total, count=max(total.count, offset + len(page.rows)))
        return page, total

    page, total = await state.database.read(work)
    return {
        "requests": [_listed(row) for row in page.rows],
        "total": total.count,
        "limit": limit,
        "offset": offset,
        "total_is_exact": total.exact,
        "next_cursor": page.rows[-1].flow_id if page.more else None,
    }


def _listed(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "method": row.method,
        "url": row.url,
        "host": row.host,
        "protocol": row.protocol,
        "source_ip": row.source_ip,
        "timestamp": iso(row.started_at),
        "request_size": row.request_size,
        "is_replay": row.is_replay,
        "status_code": row.status,
        "response_time": None if row.status is None else detail.milliseconds(row.response_time_us),
        "flow_id": row.flow_id,
        "state": detail.STATES[row.rank],
        "source_app": row.source_app,
        "content_type": row.content_type,
        "response_size": row.response_size,
        "cached": row.cached,
        "error_type": row.error_type,
    }


@router.get(
    "/requests/{reference}/",
    summary="One request with its response",
    response_model=RequestDetail,
    response_model_exclude_unset=True,
    responses=_NOT_FOUND,
)
async def get_request(state: StateDep, reference: Reference) -> Any:
    """A request that was posted a moment ago is answered before ingest has stored it."""
    found, original_id = await _load(state, reference)
    if isinstance(found, read.StoredFlow):
        return await detail.of_stored(found, original_id)
    return await detail.of_posted(found)


async def _load(state: State, reference: str) -> tuple[read.StoredFlow | events.FlowStarted, int | None]:
    parsed = _parse(reference)

    async def work(connection: AsyncConnection) -> tuple[read.StoredFlow | events.FlowStarted, int | None]:
        flow = await read.load_flow(connection, parsed)
        if flow is not None:
            original = flow.row.original_flow_id
            return flow, None if original is None else await queries.integer_id(connection, original)
        kept = await queries.posted(connection, parsed)
        if kept is None:
            raise not_found("request", reference)
        return _kept(kept), None

    return await state.database.read(work)


def _parse(reference: str) -> int | uuid.UUID:
    parsed = read.parse_reference(reference)
    if parsed is None:
        raise not_found("request", reference)
    return parsed


def _kept(raw: bytes) -> events.FlowStarted:
    event = events.decode(raw)
    assert isinstance(event, events.FlowStarted)
    return event


@router.get(
    "/requests/{reference}/body", summary="The request's body, byte for byte", response_class=Response, responses=_BYTES
)
async def get_request_body(state: StateDep, reference: Reference) -> Response:
    """As it crossed the wire, content coding kept, as an attachment."""
    found, _ = await _load(state, reference)
    if isinstance(found, read.StoredFlow):
        return _download(f"request-{found.id}.bin", found.request_body.data, found.request_body.state)
    body = found.request.body
    return _download(
        f"request-{found.posted_id}.bin", body.data, tables.BODY_TRUNCATED if body.truncated else tables.BODY_STORED
    )


@router.get(
    "/requests/{reference}/response/body",
    summary="The response's body, byte for byte",
    response_class=Response,
    responses=_BYTES,
)
async def get_response_body(state: StateDep, reference: Reference) -> Response:
    """As it crossed the wire, content coding kept, as an attachment."""
    found, _ = await _load(state, reference)
    if not isinstance(found, read.StoredFlow) or found.row.status is None:
        raise Problem(404, "no_response", f"request {reference} has no response")
    return _download(f"response-{found.id}.bin", found.response_body.data, found.response_body.state)


def _download(name: str, data: bytes, body_state: int) -> Response:
    """Captured content is hostile: never rendered, never sniffed, and the file's name is ours."""
    if body_state == tables.BODY_NOT_STORED:
        raise Problem(404, "body_not_stored", "only the size of this body was recorded")
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "X-Megido-Truncated": "true" if body_state in (tables.BODY_TRUNCATED, tables.BODY_INCOMPLETE) else "false",
    }
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.post("/requests/", summary="Post a request", status_code=201, response_model=Created)
async def post_request(state: StateDep, posted: PostedRequest) -> Any:
    """For capture tools other than our own. The answer's id is what its response is posted for."""
    now_us = state.clock.time_us()
    identity = state.origin.identity(now_us if posted.timestamp is None else posted.timestamp)
    flow_id = ids.new_id()

    async def work(connection: AsyncConnection) -> int:
        number = await next_number(connection, tables.flow_ids)
        event = posting.started(posted, number, flow_id, identity)
        await queries.keep_posted(connection, number, flow_id, events.encode(event), datetime.now(UTC))
        await publish(connection, split(event))
        return number

    return {"id": await state.publish(work)}


@router.post("/responses/", summary="Post a response", status_code=201, response_model=Created, responses=_NOT_FOUND)
async def post_response(state: StateDep, posted: PostedResponse) -> Any:
    """Ends a posted request. Posted again (a retry), nothing changes: the first one stays."""
    identity = state.origin.identity(state.clock.time_us())

    async def work(connection: AsyncConnection) -> int:
        kept = await queries.posted(connection, posted.request)
        if kept is None:
            if await queries.exists(connection, posted.request):
                raise Problem(409, "not_posted", f"request {posted.request} was captured, not posted")
            raise not_found("request", posted.request)
        start = _kept(kept)
        await publish(connection, split(posting.completed(posted, start, identity)))
        return start.posted_id

    return {"id": await state.publish(work)}
