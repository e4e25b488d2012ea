"""What an answer of the statistics needs, read from counters and rollups."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.problems import bad_field
from megido_api.stats import queries
from megido_api.stats.summary import Found
from megido_shared.db import rollups

_RECENT = timedelta(hours=24)
_DAY = timedelta(days=1)
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
    part = _part(span, wanted, now)
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
    """The range that is answered: what was asked for, no wider than from what was counted to now; None where nothing
    ever was. Where it is open, it does not reach to what was posted with a time of long ago, or to come."""
    extent = await queries.extent(connection)
    if extent is None:
        return None
    midnight = rollups.ceil(now, rollups.DAY)
    first, last = extent[0], max(extent[1] + _DAY, midnight)
    oldest = await queries.first_partition(connection)
    # A day more: clocks differ, and midnight passes between a flow's time and its id.
    usual_first = first if oldest is None else min(max(first, oldest - _DAY), midnight)
    usual_last = min(last, midnight + _DAY)
    if wanted.begin is None and wanted.end is None:
        return usual_first, usual_last
    begin = wanted.begin or (usual_first if wanted.end is None or wanted.end > usual_first else first)
    end = wanted.end or (usual_last if begin < usual_last else last)
    begin = min(max(begin, first), last)
    return rollups.widened(begin, max(min(end, last), begin), now)


def _part(span: Span | None, wanted: Wanted, now: datetime) -> rollups.Segment | None:
    """In the width that was asked for, or the finest one above it of which there still are rows at the beginning."""
    if span is None or wanted.bucket is None:
        return None
    least = _WIDTHS[wanted.bucket]
    for width in (width for width in _WIDTHS.values() if width >= least):
        part = _in_width(span, width, wanted, now)
        if rollups.finest(part.begin, now) <= width:
            break
    if _points(part) > _MOST_BUCKETS:
        raise bad_field("bucket", f"makes more than {_MOST_BUCKETS} points of this range; take a wider one")
    return part


def _in_width(span: Span, width: int, wanted: Wanted, now: datetime) -> rollups.Segment:
    """Too many points of a range that is open to the past are cut to the newest, without those to come."""
    part = rollups.Segment(width, rollups.floor(span[0], width), rollups.ceil(span[1], width))
    if wanted.begin is not None or _points(part) <= _MOST_BUCKETS:
        return part
    end = part.end if wanted.end else max(min(part.end, rollups.ceil(now, width)), part.begin)
    return rollups.Segment(width, max(part.begin, end - _MOST_BUCKETS * timedelta(minutes=width)), end)


def _points(part: rollups.Segment) -> float:
    return (part.end - part.begin) / timedelta(minutes=part.minutes)
