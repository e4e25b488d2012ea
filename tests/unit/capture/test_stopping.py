"""The budget of a stop: whatever its parts take, it is kept, and the later ones get what is kept for them."""

import pytest

from megido_capture.stopping import (
    DRAIN,
    DRAIN_SECONDS,
    LAST_RESORT,
    PROMISE,
    RESERVED,
    STOP,
    WORKER_END,
    Budget,
    of_group,
    of_worker,
)

PARTS = (DRAIN, *RESERVED)


class Hands:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("before", [0.0, 2.0])
def test_parts_that_take_all_they_get_end_within_the_budget(before: float) -> None:
    """`before` the drain, closing the listeners took so long."""
    clock = Hands()
    budget = Budget(clock=clock)
    clock.now += before
    for name in PARTS:
        with budget.part(name) as deadline:
            clock.now = deadline
    assert budget.used == pytest.approx(STOP)
    assert budget.spent == pytest.approx({DRAIN: STOP - sum(RESERVED.values()) - before, **RESERVED})
    assert str(budget).startswith("14.0 of 14 s (drain ")


def test_what_is_not_used_is_there_for_nobody_else() -> None:
    """A part has its own most: nothing waits longer because nothing else did."""
    clock = Hands()
    budget = Budget(clock=clock)
    for name, most in RESERVED.items():
        with budget.part(name) as deadline:
            assert deadline == clock.now + most
    assert budget.used == 0


def test_a_part_that_overran_leaves_the_later_ones_what_is_kept_for_them() -> None:
    clock = Hands()
    budget = Budget(clock=clock)
    with budget.part(DRAIN) as deadline:
        clock.now = deadline + 0.7
    with budget.part("websockets") as deadline:
        assert deadline - clock.now == pytest.approx(0.3)
    clock.now += 50
    assert budget.deadline("forwarder") < clock.now, "it has to give up at once"


def test_a_stop_without_a_forwarder_drains_no_longer_than_is_said() -> None:
    clock = Hands()
    budget = Budget(without=("forwarder",), clock=clock)
    assert budget.deadline(DRAIN) == clock.now + DRAIN_SECONDS


@pytest.mark.parametrize("forwarder", [True, False])
def test_no_worker_is_killed_before_its_own_last_resort(forwarder: bool) -> None:
    clock = Hands()
    group = of_group(forwarder=forwarder, clock=clock)
    killed_after = group.deadline("workers") - clock.now
    worker = of_worker(forwarder=forwarder)
    assert worker + LAST_RESORT < killed_after
    assert worker + WORKER_END == pytest.approx(killed_after)
    assert STOP + LAST_RESORT < PROMISE
