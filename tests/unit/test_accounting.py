"""The balance, where real services would need luck to come to it."""

from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from megido_shared.accounting import Counted, Heartbeat, Spots, Waiting, balance, total
from megido_shared.bus.base import Backlog, Stream
from megido_shared.bus.topics import FLOWS, NODES
from megido_shared.db.accounting import Figures, accounts

HEARD = Heartbeat("capture", "running", age_s=3.0, captured=10, dropped={"cap": 1}, journal_bytes=0)
NONE = Waiting(counted=0)
FLOW_STREAM = Stream("kafka", FLOWS.name, 0)


def test_what_a_stream_is_read_again_for_is_stored_not_doubled() -> None:
    found = balance(Counted(stored=9, max_seq=10), HEARD, Waiting(counted=6, last_seq=10), Spots())
    assert (found.waiting, found.unexplained) == (0, 0)
    assert balance(Counted(stored=11, max_seq=10), HEARD, Waiting(counted=1), Spots()).unexplained == -2


def test_a_heartbeat_that_is_old_excuses_nothing_any_more() -> None:
    stored = Counted(stored=10, max_seq=13)
    assert balance(stored, HEARD, NONE, Spots()).since_heartbeat == 2
    late = balance(stored, replace(HEARD, age_s=60.0), NONE, Spots())
    assert (late.since_heartbeat, late.unexplained) == (0, 2)
    held_up = balance(stored, replace(HEARD, age_s=60.0), replace(NONE, heartbeats_behind=True), Spots())
    assert (held_up.since_heartbeat, held_up.unexplained) == (2, 0)


def test_damage_explains_no_more_than_is_missing_and_no_more_than_was_seen() -> None:
    spots = Spots(corrupt=3)
    assert balance(Counted(stored=7, max_seq=10), HEARD, NONE, spots).corrupt == 2
    assert spots.corrupt == 1
    found = balance(Counted(stored=4, max_seq=10), HEARD, NONE, Spots(corrupt=3))
    assert (found.corrupt, found.unexplained, found.lost) == (3, 2, 6)


def test_what_has_no_node_explains_what_is_missing_in_the_total() -> None:
    missing = balance(Counted(stored=5, max_seq=10), HEARD, NONE, Spots())
    assert missing.unexplained == 4
    spots = Spots(expired=7)
    found = total([missing, missing], spots)
    assert (found.captured, found.dropped, found.expired, found.unexplained) == (20, {"cap": 2}, 7, 1)
    assert spots.expired == 0


def test_one_lost_and_one_doubled_are_two_faults() -> None:
    lost = balance(Counted(stored=8, max_seq=10), HEARD, NONE, Spots())
    doubled = balance(Counted(stored=10, max_seq=10), HEARD, NONE, Spots())
    assert (lost.unexplained, doubled.unexplained) == (1, -1)
    assert total([lost, doubled], Spots()).unexplained == 1
    assert total([doubled], Spots()).unexplained == -1


def figures(epoch: UUID, journal_bytes: int | None = 0, outbox: int = 0) -> Figures:
    key = ("capture-0", epoch)
    heard = replace(HEARD, journal_bytes=journal_bytes)
    return Figures(heartbeats={key: heard}, counted={key: Counted(stored=6, max_seq=10)}, outbox=outbox)


@pytest.mark.parametrize(
    ("journal_bytes", "outbox", "behind", "waits"),
    [(0, 0, 0, False), (1, 0, 0, True), (None, 0, 0, True), (0, 1, 0, True), (0, 0, 1, True)],
)
def test_what_cannot_be_counted_waits_until_all_ways_are_empty(
    journal_bytes: int | None, outbox: int, behind: int, waits: bool
) -> None:
    backlog = {FLOW_STREAM: Backlog(behind, counted=None if behind else 0)}
    (account,) = accounts(figures(uuid4(), journal_bytes, outbox), backlog).nodes
    assert (account.balance.waiting, account.balance.unexplained) == ((3, 0) if waits else (0, 3))
    assert account.exact != waits


def test_without_the_bus_nothing_is_called_lost() -> None:
    found = accounts(figures(uuid4()), None, "away")
    assert (found.balanced, found.exact, found.total.waiting, found.bus) == (True, False, 3, "away")


def test_a_journal_that_cannot_be_read_whole_is_inferred() -> None:
    epoch = uuid4()
    flows, nodes = (Stream(epoch.hex, topic.name, 0) for topic in (FLOWS, NODES))
    backlog = {flows: Backlog(900, counted=None), nodes: Backlog(0)}
    (account,) = accounts(figures(epoch), backlog).nodes
    assert (account.balance.waiting, account.balance.unexplained, account.exact) == (3, 0, False)
