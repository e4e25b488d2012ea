"""SQL of the dead letters."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, Select, String, cast, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_shared import redrive
from megido_shared.db.outbox import CHANNEL, MAX_RECORD_BYTES
from megido_shared.db.tables import dead_letters, outbox

MOST_REDRIVEN = 10_000
"""Of one call."""
MOST_REDRIVEN_BYTES = 64 << 20
"""Of one call, roughly: what the outbox holds twice for a while."""
_KEY_BYTES = 1_000
"""More than the key of a redrive has."""

_c = dead_letters.c
_size = func.octet_length(_c.value).label("size")
_fits = func.octet_length(_c.value) <= MAX_RECORD_BYTES - _KEY_BYTES
_listed = (
    _c.id, _c.topic, _c.partition, _c.offset, _c.source_id, _c.event_type, _c.reason, _size, _c.state, _c.attempts,
    _c.created_at, _c.changed_by, _c.changed_at,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filters:
    topic: str | None = None
    reason: str | None = None
    state: str | None = None
    after: int = 0
    """Only ids above it."""

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.topic:
            found.append(_c.topic == self.topic)
        if self.reason:
            found.append(_c.reason.ilike(paging.contains(self.reason), escape="\\"))
        if self.state:
            found.append(_c.state == self.state)
        if self.after:
            found.append(_c.id > self.after)
        return found


class Queued(NamedTuple):
    queued: int
    more: bool
    last_id: int | None
    too_large: int


async def page(connection: AsyncConnection, filters: Filters, *, cursor: int | None, limit: int) -> paging.Page:
    """Newest first; with a cursor, what is older than it."""
    query = _selection(filters).order_by(_c.id.desc())
    if cursor is not None:
        query = query.where(_c.id < cursor)
    return await paging.fetch(connection, query, limit)


async def total(connection: AsyncConnection, filters: Filters) -> paging.Total:
    return await paging.count(connection, _selection(filters))


async def one(connection: AsyncConnection, letter_id: int, *, lock: bool = False) -> Row[Any] | None:
    """`lock` is for a change in the same transaction, and leaves the bytes out."""
    columns = _listed if lock else (*_listed, _c.key, _c.value)
    query: Select[Any] = select(*columns).where(_c.id == letter_id)
    found: Row[Any] | None = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    return found


async def queue(connection: AsyncConnection, filters: Filters, by: str) -> Queued:
    """Puts the oldest that match through ingest again: as many as one call may."""
    running = func.sum(func.octet_length(_c.value)).over(order_by=_c.id)
    oldest = (
        select(_c.id, running.label("bytes"), func.row_number().over(order_by=_c.id).label("number"))
        .where(_fits, *filters.conditions())
        .order_by(_c.id)
        .limit(MOST_REDRIVEN + 1)
        .subquery()
    )
    some = select(oldest.c.id).where((oldest.c.bytes <= MOST_REDRIVEN_BYTES) | (oldest.c.number == 1))
    found = list(await connection.scalars(some.order_by(oldest.c.id).limit(MOST_REDRIVEN)))
    # Another call may have taken some of them meanwhile: then they are on their way.
    queued = await queue_these(connection, found, by, state=filters.state)
    last = found[-1] if found else None
    rest = replace(filters, after=last or filters.after)
    left = await connection.scalar(select(_c.id).where(_fits, *rest.conditions()).limit(1))
    unfit = select(func.count()).select_from(dead_letters).where(~_fits, *filters.conditions())
    return Queued(queued, left is not None, last, await connection.scalar(unfit) or 0)


async def queue_these(connection: AsyncConnection, letter_ids: list[int], by: str, state: str | None = None) -> int:
    """Marks them, and adds their records to the outbox, byte for byte. Returns how many."""
    marked = (
        update(dead_letters)
        .where(_c.id.in_(letter_ids), _c.state != "redriven", *([_c.state == state] if state else []))
        .values(state="queued", attempts=_c.attempts + 1, changed_by=by, changed_at=func.now())
        .returning(_c.id, _c.source_id, _c.topic, _c.partition, _c.offset, _c.attempts, _c.value)
        .cte("marked")
    )
    m = marked.c
    place = (m.attempts, m.offset, m.partition, m.topic, m.source_id)
    key = func.convert_to(literal(redrive.PREFIX.decode()) + func.concat_ws("/", *place), "UTF8")
    records = select(m.topic, key, m.value, cast(literal("{}", String), JSONB), func.now()).order_by(m.id)
    added = insert(outbox).from_select(["topic", "key", "value", "headers", "created_at"], records).add_cte(marked)
    queued = len((await connection.execute(added.returning(outbox.c.id))).all())
    if queued:
        await connection.execute(select(func.pg_notify(CHANNEL, "")))
    return queued


async def discard(connection: AsyncConnection, letter_id: int, by: str) -> None:
    values = {"state": "discarded", "changed_by": by, "changed_at": func.now()}
    await connection.execute(update(dead_letters).where(_c.id == letter_id).values(values))


def fits(row: Row[Any]) -> bool:
    """Whether a bus would take it."""
    return bool(row.size <= MAX_RECORD_BYTES - _KEY_BYTES)


def _selection(filters: Filters) -> Select[Any]:
    return select(*_listed).where(*filters.conditions())
