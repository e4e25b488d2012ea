"""SQL of the flows."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_shared import ids
from megido_shared.db import search
from megido_shared.db.tables import counters, flow_lines, flows, posted_requests

_c = flows.c
LISTED = (
    _c.id,
    _c.flow_id,
    _c.rank,
    _c.method,
    _c.url,
    _c.host,
    _c.protocol,
    _c.source_ip,
    _c.source_app,
    _c.started_at,
    _c.request_size,
    _c.is_replay,
    _c.status,
    _c.content_type,
    _c.response_size,
    _c.response_time_us,
    _c.cached,
    _c.error_type,
)
_APART = timedelta(seconds=2)
"""Between the time of a captured flow and that of its id; a wrong one costs time, not matches."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})


@dataclass(frozen=True, slots=True)
class Filters:
    """None does not filter. `before` and `after` are exclusive or times (`after` inclusive)."""

    method: str | None = None
    protocol: str | None = None
    source_ip: str | None = None
    is_replay: bool | None = None
    search: str | None = None
    before: uuid.UUID | datetime | None = None
    after: uuid.UUID | datetime | None = None

    @property
    def none(self) -> bool:
        return self == Filters()


def _conditions(filters: Filters) -> Sequence[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if filters.method:
        found.append(_method_is(filters.method))
    if filters.protocol:
        found.append(_c.scheme == filters.protocol.lower())  # the indexed column; the protocol in lower case
    if filters.source_ip:
        found.append(_c.source_ip == filters.source_ip)
    if filters.is_replay is not None:
        found.append(_c.is_replay == filters.is_replay)
    if filters.search:
        found.append(or_(*(_like(column, filters.search) for column in (_c.url, _c.host, _c.user_agent))))
    if isinstance(filters.before, datetime):
        found.append(_c.started_at < filters.before)
    if isinstance(filters.after, datetime):
        found.append(_c.started_at >= filters.after)
    return found


def _search(filters: Filters, cursor: uuid.UUID | None = None) -> search.Search:
    bounds = [bound for bound in (cursor, filters.before) if isinstance(bound, uuid.UUID)]
    return search.Search(
        where=_conditions(filters),
        # The URL holds the host.
        line=_like(flow_lines.c.line, filters.search) if filters.search else None,
        before=min(bounds, default=None),
        after=filters.after if isinstance(filters.after, uuid.UUID) else None,
        earlier=ids.floor_id(filters.before + _APART) if isinstance(filters.before, datetime) else None,
    )


def _like(column: ColumnElement[str], text: str) -> ColumnElement[bool]:
    return column.ilike(paging.contains(text), escape="\\")


def _method_is(method: str) -> ColumnElement[bool]:
    """By the index for the methods that everybody uses; in any case for others, which are rare anyway."""
    upper = method.upper()
    return _c.method == upper if upper in _METHODS else func.upper(_c.method) == upper


async def page(
    connection: AsyncConnection, filters: Filters, *, cursor: uuid.UUID | None, limit: int, offset: int
) -> paging.Page:
    """Newest first; with a cursor, what is older than it."""
    rows = await search.newest(connection, LISTED, _search(filters, cursor), limit + 1, offset)
    return paging.Page(rows[:limit], more=len(rows) > limit)


async def total(connection: AsyncConnection, filters: Filters) -> paging.Total:
    """Counted up to the cap; past it, without a filter, estimated from ingest's counter. What is searched for is
    counted in part while its index is far behind."""
    found = await search.count(connection, _search(filters), paging.COUNT_CAP + 1)
    counted = paging.Total(min(found.number, paging.COUNT_CAP), exact=found.exact)
    if counted.exact or not filters.none:
        return counted
    query = select(func.coalesce(func.sum(counters.c.value), 0)).where(counters.c.name == "requests")
    return paging.Total(max(counted.count, int(await connection.scalar(query) or 0)), exact=False)


async def integer_id(connection: AsyncConnection, flow_id: uuid.UUID) -> int | None:
    return await connection.scalar(select(_c.id).where(_c.flow_id == flow_id))


async def exists(connection: AsyncConnection, reference: int | uuid.UUID) -> bool:
    column = _c.id if isinstance(reference, int) else _c.flow_id
    return await connection.scalar(select(_c.flow_id).where(column == reference)) is not None


async def keep_posted(connection: AsyncConnection, number: int, flow_id: bytes, event: bytes, now: datetime) -> None:
    """What a posted response, and a reader who comes before ingest, need."""
    row = {"id": number, "flow_id": uuid.UUID(bytes=flow_id), "event": event, "created_at": now}
    await connection.execute(insert(posted_requests).values(row))


async def posted(connection: AsyncConnection, reference: int | uuid.UUID) -> bytes | None:
    """The kept event of a posted request, or None."""
    column = posted_requests.c.id if isinstance(reference, int) else posted_requests.c.flow_id
    found = await connection.scalar(select(posted_requests.c.event).where(column == reference))
    return None if found is None else bytes(found)
