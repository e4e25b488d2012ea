"""`/proxy/api/stats/`."""

import uuid
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.fields import Bound
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import bad_field
from megido_api.state import StateDep
from megido_api.stats import queries, summary
from megido_api.stats.schemas import Stats
from megido_shared import ids
from megido_shared.clock import utc
from megido_shared.db import rollups

router = APIRouter(prefix="/proxy/api", tags=["statistics"])

_RECENT = timedelta(hours=24)
_MOST_BUCKETS = 1500
_WIDTHS = {"minute": rollups.MINUTE, "hour": rollups.HOUR, "day": rollups.DAY}


@router.get("/stats/", summary="Statistics, of everything or of a range", response_model=Stats, dependencies=ONLY_KNOWN)
async def get_stats(
    state: StateDep,
    from_: Annotated[Bound, Query(alias="from")] = None,
    to: Bound = None,
    bucket: Annotated[Literal["minute", "hour", "day"] | None, Query(description="makes `series`")] = None,
) -> Any:
    """Counted as flows are stored, so what retention removes stays counted. A range is in whole minutes, of more than
    three days ago in whole hours, of more than 400 days ago in whole days; `since` and `until` say which."""
    now = utc(state.clock.time_us())

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        span = await _span(connection, _moment(from_), _moment(to), now)
        part = _part(span, bucket)
        found = summary.Found(
            span=span,
            counted=await queries.sums(connection) if from_ is None and to is None else None,
            ranged=await queries.ranged(connection, rollups.segments(*span) if span else []),
            hosts=await queries.top_hosts(connection, rollups.segments(*span) if span else []),
            failures=await queries.auth_failures_since(connection, now - _RECENT),
            lag=await queries.index_lag(connection),
            part=part,
            series=await queries.series(connection, part) if part else {},
            latencies=await queries.latency_series(connection, part) if part else {},
        )
        return summary.answer(found, bucket, now)

    return await state.database.read(work)


async def _span(
    connection: AsyncConnection, begin: datetime | None, end: datetime | None, now: datetime
) -> tuple[datetime, datetime] | None:
    """The range that is answered; None where nothing was ever counted."""
    extent = await queries.extent(connection)
    if extent is None:
        return None
    first, last = extent
    if begin is None and end is None:
        return first, last + timedelta(days=1)
    after_all = last + timedelta(days=1)
    begin, end = max(begin or first, first), min(end or after_all, after_all)
    return rollups.widened(begin, max(begin, end), now)


def _part(span: tuple[datetime, datetime] | None, bucket: str | None) -> rollups.Segment | None:
    if span is None or bucket is None:
        return None
    width = _WIDTHS[bucket]
    part = rollups.Segment(width, rollups.floor(span[0], width), rollups.ceil(span[1], width))
    if (part.end - part.begin) / timedelta(minutes=width) > _MOST_BUCKETS:
        raise bad_field(
            "bucket", f"makes more than {_MOST_BUCKETS} of this range; take a wider one, or a shorter range"
        )
    return part


def _moment(bound: uuid.UUID | datetime | None) -> datetime | None:
    """A flow's id stands for the time that it carries."""
    return utc(ids.time_ms(bound.bytes) * 1000) if isinstance(bound, uuid.UUID) else bound
