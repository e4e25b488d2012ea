"""The audit of a flood: few events, and every attempt in exactly one of them."""

from collections import Counter

from megido_capture.access.attempts import (
    ADDRESS_BURST,
    EVERY,
    MAX_SUMS,
    OTHERS,
    REMEMBERED_ADDRESSES,
    TOTAL_BURST,
    Attempts,
)
from megido_shared.events import AuthAttempted, Peer
from tests.unit.capture.fakes import Parts

PEER = Peer(ip="192.0.2.1", port=5000, tls="TLSv1.3")


class Audit:
    def __init__(self) -> None:
        self.now = 100.0
        self.parts = Parts()
        self.attempts = Attempts(self.parts.emitter, self.parts.clock, lambda: self.now)

    def refuse(self, times: int, ip: str = "192.0.2.1", reason: str = "wrong token", username: str = "") -> None:
        for _ in range(times):
            self.attempts.refused(Peer(ip=ip, port=5000), username, reason)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.attempts.tick(self.now)

    @property
    def events(self) -> list[AuthAttempted]:
        return self.parts.journal.records

    @property
    def counted(self) -> int:
        return sum(event.attempts for event in self.events)


def test_the_first_are_written_one_by_one_and_the_rest_in_a_sum() -> None:
    audit = Audit()
    audit.refuse(9_000)
    assert [event.attempts for event in audit.events] == [1] * int(ADDRESS_BURST)
    assert audit.events[0].client.port == 5000
    audit.wait(EVERY / 2)
    assert audit.counted == ADDRESS_BURST
    audit.wait(EVERY / 2)
    [summed] = audit.events[int(ADDRESS_BURST) :]
    assert summed.attempts == 9_000 - ADDRESS_BURST and audit.counted == 9_000
    assert (summed.success, summed.failure_reason, summed.client) == (False, "wrong token", Peer(ip="192.0.2.1"))
    assert len({event.seq for event in audit.events}) == len(audit.events)


def test_a_flood_that_goes_on_is_a_few_events_a_second() -> None:
    audit = Audit()
    for _ in range(600):
        audit.refuse(150)
        audit.wait(0.1)
    audit.wait(EVERY)
    assert audit.counted == 90_000
    assert len(audit.events) <= ADDRESS_BURST + 60 * (2 + 1) + 1


def test_sums_are_by_address_and_reason() -> None:
    audit = Audit()
    for ip in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"):
        for reason in ("wrong token", "no credentials"):
            audit.refuse(20, ip, reason)
    audit.wait(EVERY)
    found = Counter[tuple[str, str]]()
    for event in audit.events:
        found[event.client.ip, event.failure_reason] += event.attempts
    assert found.total() == 160
    assert {key: count for key, count in found.items() if ":" not in key[0]} == {
        (ip, reason): 20 for ip in ("192.0.2.1", "192.0.2.2") for reason in ("wrong token", "no credentials")
    }
    # An IPv6 client has as many addresses as it likes: one event stands for its /64.
    assert len([event for event in audit.events if ":" in event.client.ip]) == ADDRESS_BURST + 2


def test_a_name_is_shown_where_it_is_everybodys() -> None:
    audit = Audit()
    audit.refuse(int(ADDRESS_BURST))
    audit.refuse(3, username="anna")
    audit.refuse(2, reason="no password", username="anna")
    audit.refuse(1, reason="no password", username="otto")
    audit.wait(EVERY)
    assert [(event.username, event.attempts) for event in audit.events[-2:]] == [("anna", 3), ("", 3)]


def test_more_addresses_than_can_be_told_apart_are_counted_still() -> None:
    audit = Audit()
    many = REMEMBERED_ADDRESSES * 2
    for number in range(many):
        audit.refuse(7, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    audit.wait(EVERY)
    assert audit.counted == many * 7
    assert len(audit.events) == TOTAL_BURST + MAX_SUMS + 1
    assert audit.events[-1].failure_reason == OTHERS and audit.events[-1].client == Peer()
    assert len(audit.attempts._buckets) == REMEMBERED_ADDRESSES
    assert not audit.attempts._sums


def test_who_was_let_in_is_written_at_once_and_in_any_number() -> None:
    audit = Audit()
    for _ in range(1_000):
        audit.attempts.accepted(PEER, "anna")
    assert len(audit.events) == 1_000 and all(event.success and event.client == PEER for event in audit.events)


def test_the_end_loses_none() -> None:
    audit = Audit()
    audit.refuse(50)
    audit.attempts.close()
    assert audit.counted == 50
    audit.refuse(50)  # of connections that end later
    assert audit.counted == 100 and [event.attempts for event in audit.events[-50:]] == [1] * 50
