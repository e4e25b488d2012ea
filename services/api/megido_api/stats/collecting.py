"""What an answer of the statistics needs, read from counters and rollups."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.problems import bad_field
from megido_api.stats import queries
from megido_api.stats.summary import Found
from megido_shared.db import rollups

_RECENT = timedelta(hours=24)
_MOST_BUCKETS = 1500
_WIDTHS = {"minute": rollups.MINUTE, "hour": rollups.HOUR, "day": rollups.DAY}

type Span = tuple[datetime, datetime]


@dataclass(frozen=True, slots=True)
class Wanted:
    """From (inclusive) to (exclusive), open where None; `bucket` is a key of the widths, or None for no series."""

    begin: datetime | None = None
    end: datetime | None = None
    bucket: str | None = None


async def collect(connection: AsyncConnection, wanted: Wanted, now: datetime) -> Found:
    """Raises Problem (400) when the buckets would be too many."""
    span = await _span(connection, wanted, now)
    part = _part(span, wanted.bucket)
    parts = rollups.segments(*span) if span else []
    everything = wanted.begin is None and wanted.end is None
    return Found(
        span=span,
        counted=await queries.sums(connection) if everything else None,
        ranged=await queries.ranged(connection, parts),
        hosts=await queries.top_hosts(connection, parts),
        failures=await queries.auth_failures_since(connection, now - _RECENT),
        lag=await queries.index_lag(connection),
        part=part,
        series=await queries.series(connection, part) if part else {},
        latencies=await queries.latency_series(connection, part) if part else {},
    )


async def _span(connection: AsyncConnection, wanted: Wanted, now: datetime) -> Span | None:
    """The range that is answered: what was asked for, no wider than what was counted; None where nothing ever was."""
    extent = await queries.extent(connection)
    if extent is None:
        return None
    first, last = extent[0], extent[1] + timedelta(days=1)
    if wanted.begin is None and wanted.end is None:
        return first, last
    begin = min(max(wanted.begin or first, first), last)
    end = max(min(wanted.end or last, last), begin)
    return rollups.widened(begin, end, now)


def _part(span: Span | None, bucket: str | None) -> rollups.Segment | None:
    if span is None or bucket is None:
        return None
    width = _WIDTHS[bucket]
    part = rollups.Segment(width, rollups.floor(span[0], width), rollups.ceil(span[1], width))
    if (part.end - part.begin) / timedelta(minutes=width) > _MOST_BUCKETS:
        raise bad_field("bucket", f"makes more than {_MOST_BUCKETS} points of this range; take a wider one")
    return part
