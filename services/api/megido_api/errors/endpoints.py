"""`/proxy/api/errors/`."""

import uuid
from typing import Any

from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.answers import Created
from megido_api.errors import queries
from megido_api.errors.schemas import ErrorList, PostedError
from megido_api.fields import Cursor, Filter, Limit
from megido_api.paging import Page, Total
from megido_api.parameters import ONLY_KNOWN
from megido_api.publishing import next_number, publish
from megido_api.state import StateDep
from megido_api.views import iso
from megido_shared import events, ids
from megido_shared.db import tables

router = APIRouter(prefix="/proxy/api/errors", tags=["errors"])


@router.get("/list/", summary="List errors, newest first", response_model=ErrorList, dependencies=ONLY_KNOWN)
async def list_errors(
    state: StateDep, error_type: Filter = None, source_ip: Filter = None, limit: Limit = 50, cursor: Cursor = None
) -> Any:
    filters = queries.Filters(error_type, source_ip)

    async def work(connection: AsyncConnection) -> tuple[Page, Total, dict[uuid.UUID, int]]:
        page = await queries.page(connection, filters, cursor=cursor, limit=limit)
        linked = await queries.request_ids(connection, {row.flow_id for row in page.rows if row.flow_id})
        if cursor is None and not page.more:
            return page, Total(len(page.rows), exact=True), linked
        return page, await queries.total(connection, filters), linked

    page, total, linked = await state.database.read(work)
    return {
        "errors": [_listed(row, linked) for row in page.rows],
        "total": total.count,
        "limit": limit,
        "total_is_exact": total.exact,
        "next_cursor": page.rows[-1].error_id if page.more else None,
    }


def _listed(row: Any, linked: dict[uuid.UUID, int]) -> dict[str, Any]:
    return {
        "id": row.id,
        "error_type": row.error_type,
        "error_message": row.error_message,
        "url": row.url,
        "source_ip": row.source_ip,
        "timestamp": iso(row.occurred_at),
        "request_id": linked.get(row.flow_id),
        "error_id": row.error_id,
        "stack_trace": row.stack_trace,
    }


@router.post("/", summary="Post an error", status_code=201, response_model=Created)
async def post_error(state: StateDep, posted: PostedError) -> Any:
    """For capture tools other than our own."""
    now_us = state.clock.time_us()
    identity = state.origin.identity(now_us if posted.timestamp is None else posted.timestamp)

    async def work(connection: AsyncConnection) -> int:
        number = await next_number(connection, tables.error_ids)
        event = events.ErrorRaised(
            **identity,
            error_id=ids.new_id(),
            failure=events.Failure(posted.error_type, posted.error_message, posted.stack_trace or ""),
            url=posted.url or "",
            client=events.Peer(ip=posted.source_ip or ""),
            posted_id=number,
        )
        await publish(connection, [event])
        return number

    return {"id": await state.publish(work)}
