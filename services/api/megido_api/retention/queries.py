"""SQL of retention."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import flow_pins, flows, retention_changes, retention_policy, retention_runs
from megido_shared.retention import FIELDS, Policy
from megido_shared.retention.policy import CHANNEL

# A partition without rows has some pages all the same.
_DAYS = text("""
SELECT day, sum(pg_total_relation_size(leaf_id))::bigint AS bytes
FROM day_leaves() GROUP BY day HAVING sum(pg_relation_size(leaf_id)) > 0 ORDER BY day
""")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtext('megido.retention.policy'))")


async def policy_row(connection: AsyncConnection) -> Row[Any] | None:
    found: Row[Any] | None = (await connection.execute(select(retention_policy))).one_or_none()
    return found


def policy_of(row: Row[Any] | None) -> Policy:
    return Policy() if row is None else Policy(**{name: getattr(row, name) for name in FIELDS})


async def change_policy(connection: AsyncConnection, wanted: Mapping[str, int], by: str) -> None:
    """Sets the fields and notes what changed, unless nothing does."""
    await connection.execute(_LOCK)
    before = policy_of(await policy_row(connection))
    changes = {
        name: {"old": getattr(before, name), "new": value}
        for name, value in wanted.items()
        if getattr(before, name) != value
    }
    if not changes:
        return
    values = {name: wanted.get(name, getattr(before, name)) for name in FIELDS}
    row = {"only_row": True, **values, "changed_by": by, "changed_at": func.now()}
    statement = upsert(retention_policy).values(row)
    await connection.execute(statement.on_conflict_do_update(index_elements=["only_row"], set_=row))
    noted = insert(retention_changes).values(changes=changes, changed_by=by, changed_at=func.now())
    await connection.execute(noted)


async def changes(connection: AsyncConnection, limit: int) -> Sequence[Row[Any]]:
    query = select(retention_changes).order_by(retention_changes.c.id.desc()).limit(limit)
    return (await connection.execute(query)).all()


async def database_bytes(connection: AsyncConnection) -> int:
    return int(await connection.scalar(select(func.pg_database_size(func.current_database()))) or 0)


async def days(connection: AsyncConnection) -> Sequence[Row[Any]]:
    return (await connection.execute(_DAYS)).all()


async def ask(connection: AsyncConnection, *, dry_run: bool, by: str) -> int:
    """Queues a run, and wakes who does it."""
    values = {
        "state": "queued",
        "dry_run": dry_run,
        "requested_by": by,
        "requested_at": func.now(),
        "report": {},
        "error": "",
    }
    number = await connection.scalar(insert(retention_runs).values(values).returning(retention_runs.c.id))
    await connection.execute(select(func.pg_notify(CHANNEL, "")))
    return int(number or 0)


async def run(connection: AsyncConnection, number: int) -> Row[Any] | None:
    query = select(retention_runs).where(retention_runs.c.id == number)
    found: Row[Any] | None = (await connection.execute(query)).one_or_none()
    return found


async def runs(connection: AsyncConnection, *, limit: int, cursor: int | None) -> Sequence[Row[Any]]:
    """Newest first; one more than `limit` when there are more."""
    query = select(retention_runs).order_by(retention_runs.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(retention_runs.c.id < cursor)
    return (await connection.execute(query)).all()


async def last_run(connection: AsyncConnection) -> Row[Any] | None:
    query = select(retention_runs).where(~retention_runs.c.dry_run).order_by(retention_runs.c.id.desc()).limit(1)
    found: Row[Any] | None = (await connection.execute(query)).one_or_none()
    return found


async def count_pins(connection: AsyncConnection) -> int:
    return int(await connection.scalar(select(func.count()).select_from(flow_pins)) or 0)


async def pin(connection: AsyncConnection, reference: int | uuid.UUID, by: str) -> Row[Any] | None:
    """None when no such flow is stored. The pin is taken before the flow is looked at for good: a day that retention
    takes away meanwhile either keeps the flow, or is gone by then."""
    flow_id = await _flow_id(connection, reference)
    if flow_id is None:
        return None
    values = {"flow_id": flow_id, "pinned_by": by, "pinned_at": func.now()}
    await connection.execute(upsert(flow_pins).values(values).on_conflict_do_nothing())
    if await _flow_id(connection, flow_id) is None:
        await connection.execute(flow_pins.delete().where(flow_pins.c.flow_id == flow_id))
        return None
    found: Row[Any] = (await connection.execute(_pins().where(flow_pins.c.flow_id == flow_id))).one()
    return found


async def unpin(connection: AsyncConnection, reference: int | uuid.UUID) -> bool:
    """Whether there is such a flow, or a pin."""
    flow_id = await _flow_id(connection, reference)
    if flow_id is None and isinstance(reference, int):
        return False
    gone = await connection.execute(flow_pins.delete().where(flow_pins.c.flow_id == (flow_id or reference)))
    return bool(flow_id or gone.rowcount)


async def pins(connection: AsyncConnection, *, limit: int, cursor: uuid.UUID | None) -> Sequence[Row[Any]]:
    """Newest flows first; one more than `limit` when there are more."""
    query = _pins().order_by(flow_pins.c.flow_id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(flow_pins.c.flow_id < cursor)
    return (await connection.execute(query)).all()


def _pins() -> Any:
    joined = flow_pins.outerjoin(flows, flows.c.flow_id == flow_pins.c.flow_id)
    return select(flow_pins, flows.c.id, flows.c.url).select_from(joined)


async def _flow_id(connection: AsyncConnection, reference: int | uuid.UUID) -> uuid.UUID | None:
    column = flows.c.id if isinstance(reference, int) else flows.c.flow_id
    found: uuid.UUID | None = await connection.scalar(select(flows.c.flow_id).where(column == reference).limit(1))
    return found
