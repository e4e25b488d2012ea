"""Whose credentials are looked at, and who is hashed next: whoever has guessed least, and of those the newest.

Wrong guesses of an address, compared or hashed, draw on one bucket. While it is empty nothing of that address is looked
at. Whoever guesses at full speed would be the first each time that it gets one more; so while others have just been
turned away it is for those who show again what was turned away, as a user does and somebody who tries one word after
the other does not.

An address is charged for each of its credentials that waits here, and let off when one turned out to be right. So the
first of an address goes ahead of whoever is guessing, however many addresses that is. The newest goes first because
under a flood the oldest has gone away, or is part of it; first come, first served would make everybody wait as long as
the flood does.
"""

import asyncio
import math
import time
from collections.abc import Callable

from megido_capture.access.buckets import Bucket, Kept, Lately
from megido_capture.access.credentials import Accepted, Given

MAX_WAITING = 128
"""Credentials that wait for the thread, each for a few hundred milliseconds of hashing. More than ten of one address
never do: its bucket has no more for as long as one waits."""

PATIENCE = 10.0
"""Seconds that one waits."""

REMEMBERED_ADDRESSES = 4096

ADDRESS_BURST, ADDRESS_RATE = 5.0, 0.5
TOTAL_BURST, TOTAL_RATE = 10.0, 1.0
"""Wrong guesses at once, and a second after that: those of one address that are looked at, and those that are hashed in
total of those that have guessed before (about a third of a core). The same wrong guess again costs nothing, and the
right one is given back."""

REMEMBERED_TURNED_AWAY = 32_768
RETURN_WITHIN = 30.0
"""Seconds in which somebody shows again what was turned away. In that time a flood may turn away more than are
remembered, but not in the two seconds for which a client is told to wait: the proxy answers far fewer."""

SUSPECT_FOR = 600.0
"""Seconds after its last guess in which an address is one that has guessed before."""


class _Address:
    __slots__ = ("bucket", "charges", "last", "turned_away")

    def __init__(self, now: float) -> None:
        self.bucket = Bucket(ADDRESS_BURST, ADDRESS_RATE, now)
        self.charges = 0
        self.last = now
        self.turned_away = -math.inf
        """When it last was."""

    def charge(self, now: float) -> int:
        """How often it had guessed before."""
        before = self.charges if now - self.last <= SUSPECT_FOR else 0
        self.charges, self.last = before + 1, now
        return before


class Ticket:
    """Credentials that wait. `identity`: empty when they are wrong, None when nobody has looked at them."""

    __slots__ = ("accepted", "addresses", "drawn", "given", "identity", "key", "number", "rank", "since")

    def __init__(self, accepted: Accepted, given: Given, key: bytes) -> None:
        self.accepted, self.given, self.key = accepted, given, key
        self.identity: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self.addresses: list[str] = []
        self.rank = 0
        """How often whoever shows them had guessed before."""
        self.drawn = False
        """From the bucket of those who have guessed before."""
        self.number = 0
        self.since = 0.0


class Line:
    """Bounded in all: of `MAX_WAITING` tickets those with the highest rank are turned away, the oldest first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = Bucket(TOTAL_BURST, TOTAL_RATE, clock())
        self._addresses = Kept[_Address](REMEMBERED_ADDRESSES)
        self._turned_away = Lately(RETURN_WITHIN, REMEMBERED_TURNED_AWAY, clock())
        self._waiting: list[Ticket] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def admits(self, address: str, key: bytes) -> bool:
        """Whether that credential of the address may be looked at. It costs nothing until it turns out to be wrong."""
        found = self._addresses.asked_for(address)
        if found is None:
            return True
        now = self._clock()
        has_one = found.bucket.fill(now) >= 1
        if has_one and now - found.turned_away >= 1 / ADDRESS_RATE:
            return True
        again = self._turned_away.again((address, key), now)
        if has_one and again:
            return True
        found.turned_away = now
        return False

    def guessed(self, address: str) -> None:
        """It was wrong, and nothing had to be hashed to see that."""
        now, found = self._clock(), self._address(address)
        found.bucket.take(now)
        found.charge(now)

    def enter(self, ticket: Ticket, address: str) -> bool:
        """Whether the credentials wait from now on. No: that address has to wait until it may guess again."""
        now, found = self._clock(), self._address(address)
        if not found.bucket.take(now):
            return False
        ticket.addresses.append(address)
        ticket.rank = found.charge(now)
        self._number += 1
        ticket.number, ticket.since = self._number, now
        self._waiting.append(ticket)
        if len(self._waiting) > MAX_WAITING:
            self._turn_away(max(self._waiting, key=lambda waiting: (waiting.rank, -waiting.number)))
        return not ticket.identity.done()

    def join(self, ticket: Ticket, address: str) -> None:
        """The same credentials come from one more address, which may have guessed less: they wait no longer than if
        it had come alone. It is charged as if it had; the guess was taken from the bucket of who came first."""
        found = self._addresses.get(address)
        charges = found.charges if found is not None else 0
        if charges < ticket.rank and address not in ticket.addresses:
            ticket.rank = self._address(address).charge(self._clock())
            ticket.addresses.append(address)

    def next(self) -> Ticket | None:
        """Whose turn it is. None: nobody's, `pause` says for how long."""
        now = self._clock()
        for late in [ticket for ticket in self._waiting if now - ticket.since > PATIENCE]:
            self._turn_away(late)
        if not self._waiting:
            return None
        found = min(self._waiting, key=lambda waiting: (waiting.rank, -waiting.number))
        if found.rank > 0:
            if not self._total.take(now):
                return None
            found.drawn = True
        self._waiting.remove(found)
        return found

    def pause(self) -> float:
        """Seconds until one that has guessed before may be hashed; at most one of them."""
        return max(0.0, 1 - self._total.fill(self._clock())) / TOTAL_RATE

    def settle(self, ticket: Ticket) -> None:
        """It was no guess: what was taken for it is given back, and its addresses are none that guess."""
        for address in ticket.addresses:
            if (found := self._addresses.get(address)) is not None:
                found.charges = 0
                found.bucket.give_back()
        if ticket.drawn:
            self._total.give_back()

    def clear(self) -> None:
        """Turns everybody away, who may come again as if nothing had been."""
        for ticket in list(self._waiting):
            self._turn_away(ticket)
            for address in ticket.addresses:
                if (found := self._addresses.get(address)) is not None:
                    found.charges = max(0, found.charges - 1)  # `settle` may have taken it already

    def _turn_away(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        found = self._addresses.get(ticket.addresses[0])
        # Where there are plain secrets too it has been compared with them, and the answer says that it is none.
        if found is not None and not ticket.accepted.compares:
            found.bucket.give_back()  # the charge stays: who is turned away and comes back at once only waits longer
        if not ticket.identity.done():
            ticket.identity.set_result(None)

    def _address(self, name: str) -> _Address:
        return self._addresses.asked_for(name) or self._addresses.keep(name, _Address(self._clock()))
