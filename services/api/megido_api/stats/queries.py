"""SQL of the statistics: sums over counters and rollups, never a scan of flows."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Select, cast, func, select, text, union_all
from sqlalchemy.dialects.postgresql import INTEGER
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared import ids
from megido_shared.db.rollups import DAY, Segment
from megido_shared.db.tables import TEXT_INDEX, auth_attempts, counters, feed, feed_cursors, rollups

TOP_HOSTS = 10
type Sums = dict[str, dict[str, int]]
"""Values by name and label."""

_r = rollups.c
_BY_NAME = (
    "requests", "responses", "responses_timed", "response_time_us", "request_bytes", "response_bytes", "messages",
    "auth_failures", "method", "protocol", "status", "error", "latency",
)  # fmt: skip

_FIRST_PARTITION = text(r"""
SELECT min(to_date(right(c.relname, 8), 'YYYYMMDD'))
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE c.relname ~ '_\d{8}$' AND i.inhparent IN (
    to_regclass('flows'), to_regclass('websocket_messages'), to_regclass('errors'), to_regclass('auth_attempts'))
""")
_OF_THEIR_OWN = ("requests", "messages", "error", "auth_failures")
"""Each may be counted where nothing else is; the others come with a request, in its bucket."""


async def sums(connection: AsyncConnection) -> Sums:
    """Counters by name and label, summed over the shards of the workers that keep them."""
    query = select(counters.c.name, counters.c.label, func.sum(counters.c.value).label("total")).group_by(
        counters.c.name, counters.c.label
    )
    return _by_name(await connection.execute(query))


async def auth_failures_since(connection: AsyncConnection, since: datetime) -> int:
    """The id's bound prunes partitions; it has a margin, since a clock may have jumped."""
    c = auth_attempts.c
    oldest = ids.floor_id(since - timedelta(days=1))
    query = select(func.count()).where(c.auth_id >= oldest, c.occurred_at >= since, c.success.is_(False))
    return await connection.scalar(query) or 0


async def extent(connection: AsyncConnection) -> tuple[datetime, datetime] | None:
    """The first and the last day that something was counted for; None before there is anything."""
    # By name, so that each is the end of an index.
    days = union_all(
        *(
            select(func.min(_r.bucket).label("first"), func.max(_r.bucket).label("last")).where(
                _r.minutes == DAY, _r.name == name
            )
            for name in _OF_THEIR_OWN
        )
    ).subquery()
    first, last = (await connection.execute(select(func.min(days.c.first), func.max(days.c.last)))).one()
    return None if first is None else (first, last)


async def first_partition(connection: AsyncConnection) -> datetime | None:
    """The first day that a table of events has a partition for."""
    day = await connection.scalar(_FIRST_PARTITION)
    return None if day is None else datetime(day.year, day.month, day.day, tzinfo=UTC)


async def ranged(connection: AsyncConnection, parts: Sequence[Segment]) -> Sums:
    """Everything but hosts, summed over the segments."""
    if not parts:
        return defaultdict(dict)
    found = union_all(*(_rows(part, _BY_NAME) for part in parts)).subquery()
    query = select(found.c.name, found.c.label, func.sum(found.c.value).label("total"))
    return _by_name(await connection.execute(query.group_by(found.c.name, found.c.label)))


async def top_hosts(connection: AsyncConnection, parts: Sequence[Segment]) -> list[tuple[str, int]]:
    """The hosts with the most requests, most first."""
    if not parts:
        return []
    found = union_all(*(_rows(part, ("host",)) for part in parts)).subquery()
    total = func.sum(found.c.value).label("total")
    query = select(found.c.label, total).group_by(found.c.label).having(total > 0)
    rows = await connection.execute(query.order_by(total.desc(), found.c.label).limit(TOP_HOSTS))
    return [(row.label, int(row.total)) for row in rows]


async def series(connection: AsyncConnection, part: Segment) -> dict[datetime, dict[str, int]]:
    """By bucket: requests, errors, responses_timed, response_time_us. A bucket without anything is left out."""
    names = ("requests", "responses_timed", "response_time_us", "error")
    found = _rows(part, names).add_columns(_r.bucket).subquery()
    query = select(found.c.bucket, found.c.name, func.sum(found.c.value).label("total"))
    by_bucket: dict[datetime, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for row in await connection.execute(query.group_by(found.c.bucket, found.c.name)):
        by_bucket[row.bucket][row.name] = int(row.total)
    return by_bucket


async def latency_series(connection: AsyncConnection, part: Segment) -> dict[datetime, dict[int, int]]:
    """The histogram of each bucket, as bins and counts."""
    bins = func.array_agg(cast(_r.label, INTEGER)).label("bins")
    counts = func.array_agg(_r.value).label("counts")
    where = (_r.minutes == part.minutes, _r.name == "latency", _r.bucket >= part.begin, _r.bucket < part.end)
    rows = await connection.execute(select(_r.bucket, bins, counts).where(*where).group_by(_r.bucket))
    found: dict[datetime, dict[int, int]] = {}
    for row in rows:
        histogram = found[row.bucket] = {}
        for number, count in zip(row.bins, row.counts, strict=True):  # a bin comes once a shard
            histogram[number] = histogram.get(number, 0) + int(count)
    return found


def _rows(part: Segment, names: Sequence[str]) -> Select[Any]:
    return select(_r.name, _r.label, _r.value).where(
        _r.minutes == part.minutes, _r.name.in_(names), _r.bucket >= part.begin, _r.bucket < part.end
    )


def _by_name(rows: Any) -> Sums:
    found: Sums = defaultdict(dict)
    for row in rows:
        found[row.name][row.label] = int(row.total)
    return found


class IndexLag(NamedTuple):
    """Batches that the text index does not hold yet, and the seconds since the oldest of them was stored."""

    batches: int
    seconds: float


async def index_lag(connection: AsyncConnection) -> IndexLag:
    position = select(func.coalesce(func.max(feed_cursors.c.seq), 0)).where(feed_cursors.c.reader == TEXT_INDEX)
    age = func.extract("epoch", text("clock_timestamp()") - func.min(feed.c.committed_at))
    query = select(func.count(), age).where(feed.c.seq > position.scalar_subquery())
    batches, seconds = (await connection.execute(query)).one()
    return IndexLag(batches, max(0.0, float(seconds or 0)))
