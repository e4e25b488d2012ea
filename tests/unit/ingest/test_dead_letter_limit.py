"""When ingest must stop storing."""

import pytest

from megido_ingest.limit import WINDOW_S, DeadLetterLimit
from megido_shared.testing import FakeClock


def _limit(most: int = 1_000) -> tuple[DeadLetterLimit, FakeClock]:
    clock = FakeClock()
    return DeadLetterLimit(most, clock.monotonic), clock


@pytest.mark.parametrize(
    ("records", "letters", "stops"),
    [
        (2_000, 0, False),
        (5, 5, False),  # a few from one client, and nothing else comes
        (99, 99, False),
        (100, 100, True),
        (500, 100, False),  # a fifth is not more than a fifth
        (499, 100, True),
        (100_000, 1_000, False),
        (100_000, 1_001, True),
    ],
)
def test_by_number_and_by_share(records: int, letters: int, stops: bool) -> None:
    limit, _ = _limit()
    assert bool(limit.exceeded_by(records, letters)) == stops


def test_over_a_minute() -> None:
    limit, clock = _limit()
    limit.count(50_000, 600)
    clock.advance(WINDOW_S - 1)
    assert limit.exceeded_by(2_000, 401) == "1001 of 52000 records within 60 s would be dead letters"
    clock.advance(1)
    assert not limit.exceeded_by(2_000, 400)


def test_none() -> None:
    limit, _ = _limit(0)
    limit.count(10**6, 10**6)
    assert not limit.exceeded_by(10**6, 10**6)
