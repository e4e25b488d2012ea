"""Waiting until a replay has its result, and that result as the founding document shows it."""

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.problems import Problem
from megido_api.replays import queries
from megido_api.state import State
from megido_api.views import body_fields, header_fields, iso
from megido_shared.db import read
from megido_shared.events import Rank

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.25
_GRACE_S = 5.0
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`replayed` is None when nothing was sent (refused by policy, original gone)."""

    item: Row[Any]
    original: read.StoredFlow
    replayed: read.StoredFlow | None


async def wait_for(state: State, job_id: uuid.UUID, timeout_s: float) -> Outcome | None:
    """The outcome of a job's first item; None when it takes longer than its timeout and a grace, or when this
    process is told to stop. The job goes on either way; Postgres being away for a moment is waited out."""
    deadline = state.clock.monotonic() + min(timeout_s + _GRACE_S, LONGEST_WAIT_S)
    pause = _FIRST_PAUSE_S
    while not state.stopping.is_set() and state.clock.monotonic() < deadline:
        try:
            found = await state.database.read(lambda connection: _outcome(connection, job_id))
        except Problem as problem:
            if problem.status != 503:
                raise
            found = None
        if found is not None:
            return found
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    return None


async def _outcome(connection: AsyncConnection, job_id: uuid.UUID) -> Outcome | None:
    """Complete only: the item in a final state, and its flow stored."""
    (item,) = await queries.items(connection, job_id, 1, 0)
    if item.state not in queries.FINAL:
        return None
    replayed = None
    if item.result_flow_id is not None and item.state != "unknown":
        replayed = await read.load_flow(connection, item.result_flow_id)
        if replayed is None or replayed.row.rank < Rank.FAILED:
            return None
    original = await read.load_flow(connection, item.original_flow_id)
    return None if original is None else Outcome(item, original, replayed)


async def result(outcome: Outcome, job_id: uuid.UUID) -> dict[str, Any]:
    """The shape of `schemas.ReplayResult`."""
    item = outcome.item
    sent = outcome.replayed or outcome.original
    success = item.state == "succeeded"
    error = None if success else item.error or f"the replay is {item.state}"
    return {
        "success": success,
        "request": {
            "url": sent.row.url,
            "original_url": outcome.original.row.url,
            "method": sent.row.method,
            **_headers(sent.request_headers),
            "body": (await _body(sent.request_body, sent.request_headers)),
        },
        "response": await _response(outcome.replayed) if success else {"success": False, "error": error},
        "timestamp": iso(sent.row.started_at if outcome.replayed else item.updated_at),
        "error_message": error,
        "replayed_request_id": outcome.replayed.id if outcome.replayed else None,
        "deviations": list(item.deviations),
        "job_id": job_id,
        "diff_url": None,
    }


async def _response(flow: read.StoredFlow | None) -> dict[str, Any]:
    assert flow is not None
    assert flow.row.status is not None
    us = flow.row.response_time_us
    return {
        "status_code": flow.row.status,
        **_headers(flow.response_headers),
        "body": await _body(flow.response_body, flow.response_headers),
        "response_time": None if us is None or us < 0 else us / 1000,
        "success": True,
    }


def _headers(pairs: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    shown = header_fields(pairs)
    return {name: shown[name] for name in ("headers", "raw_headers")}


async def _body(body: read.StoredBody, headers: list[tuple[bytes, bytes]]) -> str:
    shown = await body_fields(body.data, size=body.size, truncated=body.truncated, sha256=body.sha256, headers=headers)
    text: str = shown["body"]
    return text
