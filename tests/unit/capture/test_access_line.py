"""Who is hashed next: guesses are counted by address, the least guilty goes first, and all of it is bounded."""

import argon2
import pytest

from megido_capture.access.buckets import Lately
from megido_capture.access.credentials import Accepted, parse
from megido_capture.access.line import (
    ADDRESS_BURST,
    ADDRESS_RATE,
    MAX_WAITING,
    PATIENCE,
    REMEMBERED_ADDRESSES,
    REMEMBERED_TURNED_AWAY,
    RETURN_WITHIN,
    SUSPECT_FOR,
    TOTAL_BURST,
    Line,
    Ticket,
)
from megido_capture.configuration.settings import CaptureSettings

ACCEPTED = Accepted(CaptureSettings(auth_token_hash=argon2.PasswordHasher(1, 8, 1).hash("right")))


class Hall:
    """A line under a clock of its own; tickets are known by what they say."""

    def __init__(self) -> None:
        self.now = 0.0
        self.line = Line(lambda: self.now)

    def enter(self, address: str, name: str = "guess", accepted: Accepted = ACCEPTED) -> Ticket | None:
        given = parse(f"Bearer {name}")
        ticket = Ticket(accepted, given, accepted.memory_key(given))
        return ticket if self.line.enter(ticket, address) else None

    def next(self) -> str:
        ticket = self.line.next()
        return ticket.given.secret.decode() if ticket is not None else ""

    def guess(self, address: str) -> bool:
        """Waits and is found wrong."""
        return self.enter(address) is not None and self.next() == "guess"


@pytest.fixture
async def hall() -> Hall:
    return Hall()


async def test_an_address_has_a_burst_and_then_one_every_other_second(hall: Hall) -> None:
    assert [hall.guess("a") for _ in range(6)] == [True] * int(ADDRESS_BURST) + [False]
    assert hall.guess("b")
    hall.now = 2.0
    assert hall.guess("a") and not hall.guess("a")
    hall.now = 1e6
    assert sum(hall.guess("a") for _ in range(20)) == ADDRESS_BURST


async def test_all_that_have_guessed_before_share_what_is_hashed(hall: Hall) -> None:
    for number in range(40):
        assert hall.guess(str(number))  # the first of each is not held up by how many they are
    assert sum(hall.guess(str(number)) for number in range(40)) == TOTAL_BURST
    assert hall.line.pause() == pytest.approx(1)
    hall.now += 1
    assert hall.next() == "guess" and hall.next() == ""


async def test_a_right_one_is_no_guess(hall: Hall) -> None:
    for _ in range(20):
        ticket = hall.enter("a")
        assert ticket is not None and hall.line.next() is ticket and ticket.rank == 0
        hall.line.settle(ticket)


async def test_whoever_has_guessed_least_goes_first_and_of_those_the_newest(hall: Hall) -> None:
    for address, times in (("bad", 3), ("worse", 4), ("once", 1)):
        for _ in range(times):
            assert hall.guess(address)
    for address in ("bad", "once", "worse", "clean", "fresh"):
        assert hall.enter(address, address)
    assert [hall.next() for _ in range(6)] == ["fresh", "clean", "once", "bad", "worse", ""]


async def test_guesses_are_forgotten_after_a_while(hall: Hall) -> None:
    assert hall.guess("a")
    hall.now = SUSPECT_FOR
    late = hall.enter("a")
    hall.now += SUSPECT_FOR + 1
    again = hall.enter("a")
    assert late is not None and again is not None and (late.rank, again.rank) == (1, 0)


async def test_of_too_many_those_are_turned_away_that_have_guessed(hall: Hall) -> None:
    for _ in range(2):
        assert hall.guess("suspect")
    suspect = hall.enter("suspect")
    first = hall.enter("first")
    for number in range(MAX_WAITING - 2):
        assert hall.enter(str(number))
    assert suspect is not None and not suspect.identity.done() and first is not None
    assert hall.enter("one more") and suspect.identity.result() is None and not first.identity.done()
    assert hall.enter("and one", "newest") and first.identity.result() is None
    assert len(hall.line) == MAX_WAITING and hall.next() == "newest"
    assert hall.enter("last")
    assert hall.enter("suspect") is None  # the place is for others


async def test_to_be_turned_away_costs_the_place_and_not_the_guess(hall: Hall) -> None:
    for number in range(MAX_WAITING):
        assert hall.enter(str(number))
    for _ in range(20):  # twenty times its burst of five
        ticket = hall.enter("again")
    assert hall.enter("0") is None and ticket is None
    while hall.next():
        pass
    assert hall.enter("again")


async def test_who_is_turned_away_has_been_compared_with_plain_secrets(hall: Hall) -> None:
    both = Accepted(CaptureSettings(auth_token="plain", auth_password_hash="x", auth_token_hash="y"))
    for number in range(MAX_WAITING):
        assert hall.enter(str(number))
    hall.line.guessed("again")
    looks = 1
    while hall.line.admits("again", b"key"):
        assert hall.enter("again", accepted=both) is None
        looks += 1
    assert looks == ADDRESS_BURST


async def test_what_was_turned_away_goes_before_what_is_new(hall: Hall) -> None:
    for _ in range(int(ADDRESS_BURST)):
        assert hall.line.admits("a", b"wrong")
        hall.line.guessed("a")
    assert not hall.line.admits("a", b"user") and not hall.line.admits("a", b"user")
    hall.now += 0.9 / ADDRESS_RATE
    assert not hall.line.admits("a", b"guess 0")
    hall.now += 0.2 / ADDRESS_RATE
    assert not any(hall.line.admits("a", b"guess %d" % number) for number in range(1, 100))
    assert hall.line.admits("a", b"user") and hall.line.admits("b", b"guess 100")
    hall.line.guessed("a")
    assert not hall.line.admits("a", b"user")
    hall.now += 1 / ADDRESS_RATE
    assert hall.line.admits("a", b"new")


async def test_looking_at_right_ones_costs_nothing_and_remembers_nobody(hall: Hall) -> None:
    assert all(hall.line.admits(str(number % 3), b"key") for number in range(100))
    assert not hall.line._addresses


async def test_what_was_turned_away_is_bounded_and_forgotten() -> None:
    lately = Lately(RETURN_WITHIN, 10, 0.0)
    assert not lately.again("first", 0.0) and lately.again("first", RETURN_WITHIN)
    assert not any(lately.again(number, 1.0) for number in range(1000)) and len(lately) <= 20
    assert lately.again(999, 1.0) and not lately.again(0, 1.0)
    assert not lately.again(0, 1.0 + 2 * RETURN_WITHIN + 1)
    assert not lately.again("other", 1e6) and len(lately) == 1


async def test_a_flood_does_not_make_it_forget_before_the_user_is_back(hall: Hall) -> None:
    for _ in range(int(ADDRESS_BURST)):
        hall.line.guessed("a")
    assert not hall.line.admits("a", b"user")
    for number in range(REMEMBERED_TURNED_AWAY - 1):
        hall.now += 1 / ADDRESS_RATE / REMEMBERED_TURNED_AWAY
        assert not hall.line.admits("a", b"%d" % number)
    hall.now += 1 / ADDRESS_RATE / REMEMBERED_TURNED_AWAY
    assert hall.line.admits("a", b"user")


async def test_nobody_waits_for_ever(hall: Hall) -> None:
    while hall.guess("a") or hall.guess("b") or hall.guess("c"):
        pass
    hall.now += 2.0
    ticket = hall.enter("a")
    while hall.next():
        pass
    waiting = hall.enter("b")
    assert ticket is not None and waiting is not None and not waiting.identity.done()
    hall.line._total.level = hall.line._total.rate = 0.0
    hall.now += PATIENCE + 1
    assert hall.next() == "" and waiting.identity.result() is None and not len(hall.line)


async def test_the_same_from_a_cleaner_address_waits_no_longer_than_alone(hall: Hall) -> None:
    assert hall.guess("suspect")
    shared = hall.enter("suspect", "shared")
    assert shared is not None and shared.rank == 1
    hall.line.join(shared, "clean")
    hall.line.join(shared, "clean")
    assert shared.rank == 0 and shared.addresses == ["suspect", "clean"]
    # It has its price: what a clean address lifts counts as its own.
    later = hall.enter("clean", "own")
    assert later is not None and later.rank == 1
    hall.line.settle(shared)
    again = hall.enter("clean", "own again")
    assert again is not None and again.rank == 0


async def test_other_credentials_from_now_on_leave_no_charge(hall: Hall) -> None:
    ticket = hall.enter("a")
    hall.line.clear()
    again = hall.enter("a")
    assert ticket is not None and ticket.identity.result() is None and again is not None and again.rank == 0


async def test_a_right_one_and_other_credentials_together_take_no_charge_twice(hall: Hall) -> None:
    right, waiting = hall.enter("a", "right"), hall.enter("a")
    assert right is not None and waiting is not None and hall.line.next() is right
    hall.line.settle(right)
    hall.line.clear()
    again = hall.enter("a")
    assert again is not None and again.rank == 0


async def test_addresses_fill_no_memory(hall: Hall) -> None:
    for number in range(REMEMBERED_ADDRESSES + 100):
        hall.enter(str(number))
    assert len(hall.line._addresses) == REMEMBERED_ADDRESSES and len(hall.line) == MAX_WAITING
