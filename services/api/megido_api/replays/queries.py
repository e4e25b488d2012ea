"""SQL of the replay jobs."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Row, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import flows, posted_requests, replay_items, replay_jobs
from megido_shared.replay import ReplayOptions

FINAL = frozenset({"succeeded", "failed", "timed_out", "skipped", "cancelled", "unknown"})
"""States that an item keeps."""


async def original(connection: AsyncConnection, reference: int | uuid.UUID) -> Row[int, uuid.UUID] | None:
    """(id, flow_id) of the stored flow."""
    column = flows.c.id if isinstance(reference, int) else flows.c.flow_id
    return (await connection.execute(select(flows.c.id, flows.c.flow_id).where(column == reference))).first()


async def is_posted(connection: AsyncConnection, reference: int | uuid.UUID) -> bool:
    column = posted_requests.c.id if isinstance(reference, int) else posted_requests.c.flow_id
    return await connection.scalar(select(posted_requests.c.id).where(column == reference)) is not None


async def create(
    connection: AsyncConnection, job_id: uuid.UUID, flow: Row[int, uuid.UUID], options: ReplayOptions, now: datetime
) -> None:
    """A queued job of one item."""
    job = {
        "job_id": job_id,
        "state": "queued",
        "options": msgspec.to_builtins(options),
        "created_by": "api",
        "created_at": now,
        "updated_at": now,
    }
    item = {
        "job_id": job_id,
        "position": 0,
        "original_flow_id": flow.flow_id,
        "original_id": flow.id,
        "state": "queued",
        "attempt": 0,
        "updated_at": now,
    }
    await connection.execute(insert(replay_jobs).values(job))
    await connection.execute(insert(replay_items).values(item))


async def job(connection: AsyncConnection, job_id: uuid.UUID) -> Row[Any] | None:
    return (await connection.execute(select(replay_jobs).where(replay_jobs.c.job_id == job_id))).first()


async def items(connection: AsyncConnection, job_id: uuid.UUID, limit: int, offset: int) -> Sequence[Row[Any]]:
    query = select(replay_items).where(replay_items.c.job_id == job_id).order_by(replay_items.c.position)
    return (await connection.execute(query.limit(limit).offset(offset))).all()


async def counts(connection: AsyncConnection, job_id: uuid.UUID) -> dict[str, int]:
    """Items by state."""
    query = (
        select(replay_items.c.state, func.count().label("number"))
        .where(replay_items.c.job_id == job_id)
        .group_by(replay_items.c.state)
    )
    return {row.state: row.number for row in await connection.execute(query)}


async def request_ids(connection: AsyncConnection, flow_ids: set[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Integer ids of the flows that are stored."""
    if not flow_ids:
        return {}
    query = select(flows.c.flow_id, flows.c.id).where(flows.c.flow_id.in_(flow_ids))
    return {row.flow_id: row.id for row in await connection.execute(query)}
