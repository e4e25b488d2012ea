"""`/proxy/api/auth-attempt/`."""

from typing import Any

from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.answers import Created
from megido_api.auth.schemas import PostedAttempt
from megido_api.publishing import next_number, publish
from megido_api.state import StateDep
from megido_shared import events, ids
from megido_shared.db import tables

router = APIRouter(prefix="/proxy/api", tags=["authentication"])


@router.post("/auth-attempt/", summary="Post an authentication attempt", status_code=201, response_model=Created)
async def post_auth_attempt(state: StateDep, posted: PostedAttempt) -> Any:
    """For capture tools other than our own. A failed one shows up among the errors too, as AUTH_FAILURE."""
    now_us = state.clock.time_us()
    identity = state.origin.identity(now_us if posted.timestamp is None else posted.timestamp)

    async def work(connection: AsyncConnection) -> int:
        number = await next_number(connection, tables.auth_ids)
        event = events.AuthAttempted(
            **identity,
            auth_id=ids.new_id(),
            success=posted.success,
            username=posted.username or "",
            failure_reason=posted.failure_reason or "",
            client=events.Peer(ip=posted.source_ip),
            posted_id=number,
        )
        await publish(connection, [event])
        return number

    return {"id": await state.publish(work)}
