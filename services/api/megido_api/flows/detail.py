"""One flow as `GET requests/{id}/` answers it: stored, or posted and not stored yet."""

import uuid
from typing import Any

from megido_api.views import body_fields, header_fields, iso, text_of
from megido_shared import events
from megido_shared.db.read import StoredBody, StoredFlow

STATES = {
    events.Rank.STARTED: "started",
    events.Rank.INTERRUPTED: "interrupted",
    events.Rank.FAILED: "failed",
    events.Rank.COMPLETED: "completed",
}


async def of_stored(flow: StoredFlow, original_id: int | None) -> dict[str, Any]:
    """The shape of `schemas.RequestDetail`."""
    row = flow.row
    found = {
        "id": row.id,
        "method": row.method,
        "url": row.url,
        "timestamp": iso(row.started_at),
        "host": row.host,
        "port": row.port,
        "source_ip": row.source_ip,
        "protocol": row.protocol,
        "request_size": row.request_size,
        "user_agent": row.user_agent,
        "is_replay": row.is_replay,
        "original_request_id": original_id,
        "flow_id": row.flow_id,
        "state": STATES[row.rank],
        "source_app": row.source_app,
        "http_version": row.http_version,
        "replay_job_id": row.replay_job_id,
        "error": _error(flow),
    }
    found |= header_fields(flow.request_headers)
    found |= await stored_body(flow.request_body, flow.request_headers)
    if row.status is not None:
        found["response"] = await _response(flow)
    return found


async def stored_body(body: StoredBody, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return await body_fields(body.data, size=body.size, truncated=body.truncated, sha256=body.sha256, headers=headers)


async def _response(flow: StoredFlow) -> dict[str, Any]:
    row = flow.row
    found = {
        "status_code": row.status,
        "response_time": milliseconds(row.response_time_us),
        "response_size": row.response_size or 0,
        "cached": row.cached,
        "error_message": row.error_message or flow.detail.error_message or None,
        "reason": text_of(bytes(row.reason or b"")),
        "http_version": row.response_http_version or "",
    }
    return found | header_fields(flow.response_headers) | await stored_body(flow.response_body, flow.response_headers)


def _error(flow: StoredFlow) -> dict[str, Any] | None:
    row = flow.row
    if row.error_type is None:
        return None
    return {
        "error_type": row.error_type,
        "error_message": row.error_message or "",
        "stack_trace": row.error_stack or "",
    }


async def of_posted(event: events.FlowStarted) -> dict[str, Any]:
    """The same shape, from the event that is on its way to ingest."""
    request = event.request
    pairs = events.unpack_headers(request.headers)
    found = {
        "id": event.posted_id,
        "method": _stored_text(request.method),
        "url": posted_url(request),
        "timestamp": iso(event.time_us),
        "host": request.host,
        "port": request.port,
        "source_ip": event.client.ip,
        "protocol": request.scheme.upper(),
        "request_size": request.body.size,
        "user_agent": next((_stored_text(value) for name, value in pairs if name.lower() == b"user-agent"), ""),
        "is_replay": False,
        "original_request_id": None,
        "flow_id": uuid.UUID(bytes=event.flow_id),
        "state": "started",
        "source_app": event.source_app,
        "http_version": request.http_version,
        "replay_job_id": None,
        "error": None,
    }
    found |= header_fields(pairs)
    return found | await body_fields(
        request.body.data,
        size=request.body.size,
        truncated=request.body.truncated,
        sha256=request.body.sha256 or None,
        headers=pairs,
    )


def posted_url(request: events.Request) -> str:
    """The URL, without the scheme's own port."""
    usual = {"http": 80, "ws": 80, "https": 443, "wss": 443}
    host = f"[{request.host}]" if ":" in request.host else request.host
    port = "" if usual.get(request.scheme) == request.port else f":{request.port}"
    return f"{request.scheme}://{host}{port}{_stored_text(request.target)}"


def _stored_text(raw: bytes) -> str:
    """As ingest will store it: a text column holds no NUL."""
    return text_of(raw).replace("\0", "%00")


def milliseconds(us: int | None) -> float | None:
    return None if us is None or us < 0 else us / 1000
