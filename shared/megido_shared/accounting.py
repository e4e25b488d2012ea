"""Provable accounting: what a node has captured is stored, waiting, dead-lettered, dropped, expired or corrupt; what is
none of these is unexplained.

A node numbers its terminal records without gaps, so the highest number that anybody has seen is what it captured.
Stored and dead-lettered are counted in ingest's transaction, dropped by the node, waiting in the journal's own records
where they can be read. Pure: `megido_shared.db.accounting` brings the figures.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FRESH_S = 20.0
"""A heartbeat comes every 5 s: while the last is no older, what a node dropped since may still be told."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node said last. `journal_bytes` are not taken over by all readers of its journal; None: not said."""

    service: str
    state: str
    age_s: float
    captured: int
    dropped: Mapping[str, int]
    journal_bytes: int | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Between a node and the store. `counted` records in the node's journal, the highest of number `last_seq`.
    None: they cannot be counted from here; then `drained` says whether it is proved that there are none."""

    counted: int | None = None
    last_seq: int = 0
    drained: bool = False
    heartbeats_behind: bool = False


@dataclass(slots=True)
class Spots:
    """What cannot be told to have ended something: unreadable dead letters, damaged places, what retention removed.
    The `*_unknown` are places of unknown numbers of records."""

    dead_lettered: int = 0
    corrupt: int = 0
    expired: int = 0
    corrupt_unknown: int = 0
    expired_unknown: int = 0

    def take(self, name: str, wanted: int) -> int:
        """So much of it as is wanted and there."""
        taken: int = max(0, min(wanted, getattr(self, name)))
        setattr(self, name, getattr(self, name) - taken)
        return taken


@dataclass(frozen=True, slots=True)
class Counted:
    """By ingest, under the node's own name."""

    stored: int = 0
    dead_lettered: int = 0
    max_seq: int = 0


@dataclass(slots=True)
class Balance:
    """One node's, or of all. captured = the sum of stored to unexplained; `unexplained` below 0: counted twice."""

    captured: int = 0
    stored: int = 0
    waiting: int = 0
    since_heartbeat: int = 0
    """Written or dropped after the last heartbeat: the next one will tell."""
    dead_lettered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    expired: int = 0
    corrupt: int = 0
    unexplained: int = 0

    @property
    def lost(self) -> int:
        """What will not be stored. Dead letters are kept, and can be put through again."""
        return sum(self.dropped.values()) + self.expired + self.corrupt + max(0, self.unexplained)


def balance(counted: Counted, heartbeat: Heartbeat | None, waiting: Waiting, spots: Spots) -> Balance:
    """What `spots` explain is taken off them: what they keep was no terminal record of this node."""
    told = heartbeat.captured if heartbeat else 0
    found = Balance(
        captured=max(told, counted.max_seq, waiting.last_seq),
        stored=counted.stored,
        dead_lettered=counted.dead_lettered,
        waiting=waiting.counted or 0,
        dropped={reason: count for reason, count in (heartbeat.dropped if heartbeat else {}).items() if count},
    )
    rest = found.captured - found.stored - found.dead_lettered - found.waiting - sum(found.dropped.values())
    if rest < 0:  # a stream that is read again from an earlier place: what waits there has been stored
        again = min(found.waiting, -rest)
        found.waiting, rest = found.waiting - again, rest + again
    for name in ("dead_lettered", "corrupt", "expired"):
        taken = spots.take(name, rest)
        setattr(found, name, getattr(found, name) + taken)
        rest -= taken
    if waiting.counted is None and not waiting.drained:
        found.waiting, rest = max(0, rest), min(0, rest)
    if waiting.heartbeats_behind or (heartbeat is not None and heartbeat.age_s < FRESH_S):
        found.since_heartbeat = max(0, min(rest, found.captured - told))
        rest -= found.since_heartbeat
    if rest > 0 and spots.expired_unknown:
        found.expired, rest = found.expired + rest, 0
    if rest > 0 and spots.corrupt_unknown:
        found.corrupt, rest = found.corrupt + rest, 0
    found.unexplained = rest
    return found


def total(balances: Iterable[Balance], unattributed: Spots) -> Balance:
    """Of all nodes. What nobody can say whose it was explains what is missing somewhere."""
    found = Balance()
    doubled = 0
    for one in balances:
        for name in ("captured", "stored", "waiting", "since_heartbeat", "dead_lettered", "expired", "corrupt"):
            setattr(found, name, getattr(found, name) + getattr(one, name))
        for reason, count in one.dropped.items():
            found.dropped[reason] = found.dropped.get(reason, 0) + count
        found.unexplained += max(0, one.unexplained)
        doubled += min(0, one.unexplained)
    for name in ("dead_lettered", "corrupt", "expired"):
        taken = unattributed.take(name, found.unexplained)
        setattr(found, name, getattr(found, name) + taken)
        found.unexplained -= taken
    # One lost and one counted twice are two faults, not none.
    found.unexplained = found.unexplained or doubled
    return found
