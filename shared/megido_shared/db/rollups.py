"""Reading `rollups`: which rows cover a range of time, and percentiles from the latency histogram. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

MINUTE, HOUR, DAY = 1, 60, 1440
KEPT = {MINUTE: timedelta(days=3), HOUR: timedelta(days=400)}
"""How long rows of a width (in minutes) are kept, at least. Days are kept for ever."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BINS_A_DOUBLING = 4


class Segment(NamedTuple):
    """Rows of one width whose bucket is in [begin, end)."""

    minutes: int
    begin: datetime
    end: datetime


def floor(moment: datetime, minutes: int) -> datetime:
    """The beginning of the bucket that a moment is in."""
    width = timedelta(minutes=minutes)
    return _EPOCH + (moment - _EPOCH) // width * width


def ceil(moment: datetime, minutes: int) -> datetime:
    return floor(moment + timedelta(minutes=minutes) - timedelta(microseconds=1), minutes)


def widened(begin: datetime, end: datetime, now: datetime) -> tuple[datetime, datetime]:
    """The range in whole buckets of the finest width that is still kept at each end."""
    return floor(begin, finest(begin, now)), ceil(end, finest(end, now))


def finest(moment: datetime, now: datetime) -> int:
    """The least width whose rows of a moment are still kept."""
    # Upkeep is not to the minute.
    return next((width for width, kept in KEPT.items() if moment > now - kept + timedelta(hours=1)), DAY)


def segments(begin: datetime, end: datetime) -> list[Segment]:
    """The fewest rows that cover a range of whole minutes: days inside, hours and minutes at the edges."""
    return [segment for segment in _cover(begin, end, (DAY, HOUR, MINUTE)) if segment.begin < segment.end]


def _cover(begin: datetime, end: datetime, widths: tuple[int, ...]) -> list[Segment]:
    width, *finer = widths
    if not finer:
        return [Segment(width, begin, end)]
    first, last = ceil(begin, width), floor(end, width)
    if first >= last:
        return _cover(begin, end, tuple(finer))
    return [
        *_cover(begin, first, tuple(finer)), Segment(width, first, last), *_cover(last, end, tuple(finer))
    ]  # fmt: skip


def time_us(bin_number: float) -> float:
    """The shortest time of a bin; between two bins, geometrically between them."""
    return float(2 ** (bin_number / _BINS_A_DOUBLING))


def percentiles(histogram: Mapping[int, int], shares: tuple[float, ...]) -> list[float] | None:
    """Times in µs below which the shares (0 to 1) of what was counted by bin lie; within a bin's width (19 %) of the
    exact ones. None of nothing."""
    bins = sorted((number, count) for number, count in histogram.items() if count > 0)
    total = sum(count for _, count in bins)
    if not total:
        return None
    return [_percentile(bins, share * total) for share in shares]


def _percentile(bins: list[tuple[int, int]], wanted: float) -> float:
    below = 0
    for number, count in bins:
        if below + count >= wanted:
            return time_us(number + max(0.0, wanted - below) / count)
        below += count
    return time_us(bins[-1][0] + 1)
