"""Which rollups cover a range, and percentiles from a histogram."""

import math
import random
from datetime import UTC, datetime, timedelta

from megido_shared.db import rollups

NOW = datetime(2026, 11, 24, 12, 34, 56, tzinfo=UTC)


def test_segments_cover_every_minute_once_and_are_few() -> None:
    rng = random.Random(5)
    for _ in range(300):
        begin = rollups.floor(NOW - timedelta(minutes=rng.randrange(20_000)), 1)
        end = begin + timedelta(minutes=rng.choice((0, 1, 59, 60, 61, 1440, rng.randrange(10_000))))
        parts = rollups.segments(begin, end)
        assert len(parts) <= 5
        covered = begin
        for part in parts:
            assert part.begin == covered
            assert part.begin == rollups.floor(part.begin, part.minutes)
            assert part.end == rollups.floor(part.end, part.minutes)
            covered = part.end
        assert covered == end
        rows = sum((part.end - part.begin) / timedelta(minutes=part.minutes) for part in parts)
        assert rows <= 2 * 59 + 2 * 23 + (end - begin) / timedelta(days=1) + 1


def test_a_range_is_widened_to_what_is_kept() -> None:
    recent = NOW - timedelta(hours=1)
    assert rollups.widened(recent, NOW, NOW) == (recent.replace(second=0), NOW.replace(minute=35, second=0))
    week = NOW - timedelta(days=7)
    assert rollups.widened(week, NOW, NOW)[0] == week.replace(minute=0, second=0)
    years = NOW - timedelta(days=800)
    assert rollups.widened(years, week, NOW) == (
        years.replace(hour=0, minute=0, second=0),
        week.replace(hour=13, minute=0, second=0),
    )


def test_percentiles_are_within_a_bin_of_the_exact_ones() -> None:
    rng = random.Random(6)
    times = sorted(int(rng.lognormvariate(10, 1.5)) + 1 for _ in range(5000))
    histogram: dict[int, int] = {}
    for time in times:
        number = math.floor(4 * math.log2(time))
        histogram[number] = histogram.get(number, 0) + 1
    shares = (0.01, 0.5, 0.9, 0.99)
    found = rollups.percentiles(histogram, shares)
    assert found is not None
    for share, value in zip(shares, found, strict=True):
        exact = times[int(share * len(times))]
        assert exact / 1.19 <= value <= exact * 1.19
    assert rollups.percentiles({}, shares) is None
    assert rollups.percentiles({3: 0}, shares) is None
    assert rollups.percentiles({0: 1}, (1.0,)) == [rollups.time_us(1)]
