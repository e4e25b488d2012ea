"""`/proxy/api/events/`."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from megido_api.access import require_token
from megido_api.events.batches import parse
from megido_api.events.schemas import Accepted
from megido_api.problems import ErrorAnswer, Problem
from megido_api.state import StateDep
from megido_shared.db import outbox

router = APIRouter(prefix="/proxy/api", tags=["events"])

_MEDIA_TYPES = {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/msgpack": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/events/",
    summary="Post a batch of events",
    response_model=Accepted,
    responses={401: {"model": ErrorAnswer}, 415: {"model": ErrorAnswer}},
    openapi_extra=_BODY,
)
async def post_events(state: StateDep, request: Request, _: Annotated[None, Depends(require_token)]) -> Any:
    """For forwarders of nodes without a bus: a MessagePack list of `[topic, key, value]`.

    All or nothing; the answer comes once the batch is durable. Sending it again does no harm, because events
    keep their identity. Needs the bearer token when MEGIDO_API_TOKEN is set.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES:
        raise Problem(415, "unsupported_media_type", "send application/msgpack")
    records = await asyncio.to_thread(parse, await request.body())
    await state.publish(lambda connection: outbox.add(connection, records))
    return {"accepted": len(records)}
