"""The independent check at the end of every fault: what a load client sent and got, against what became of it.

    captured = stored + waiting + dead-lettered + dropped, for each node; lost 0, duplicated 0

`stored` is what is found where records end up: in a journal, on a topic, in Postgres. Nothing here asks Megido for its
own accounting but for what it announces as dropped. MEGIDO_SEED is the seed of all fault tests, which print theirs.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megido_shared import events
from megido_shared.events import NodeStatus
from tests.integration.ingest.support import rows

SEED = int(os.environ.get("MEGIDO_SEED", "0")) or random.SystemRandom().randrange(1 << 30)

_DROPPED = "dropped_terminal:"


@dataclass
class Account:
    """One node's terminal records. `captured`: the highest number that anybody has seen."""

    node: str
    captured: int
    stored: int
    waiting: int = 0
    dead_lettered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def drops(self) -> int:
        return sum(self.dropped.values())

    def __str__(self) -> str:
        reasons = f" ({', '.join(f'{name} {count}' for name, count in sorted(self.dropped.items()))})"
        return (
            f"{self.node}: captured {self.captured} = stored {self.stored} + waiting {self.waiting} + dead-lettered "
            f"{self.dead_lettered} + dropped {self.drops}{reasons if self.dropped else ''}"
        )

    @property
    def balanced(self) -> bool:
        return self.captured == self.stored + self.waiting + self.dead_lettered + self.drops


def settle(
    got: Iterable[str],
    found: Iterable[str],
    accounts: Sequence[Account],
    *,
    failed: int = 0,
    elsewhere: Iterable[str] = (),
    seed: int = SEED,
) -> None:
    """`got`: what the client was answered whole, by the id that each of its requests carries once. `found`: the same
    of what is stored. `failed` requests may or may not be there. `elsewhere`: what is there in another form, which the
    caller has looked at. Prints the figures; fails on anything lost or doubled beyond what the nodes announced as
    dropped."""
    wanted, counted = set(got), Counter(found)
    lost = wanted - counted.keys() - set(elsewhere)
    doubled = [name for name, count in counted.items() if count > 1]
    for account in accounts:
        print(f"balance, {account}")
    print(
        f"balance, seed {seed}: client got {len(wanted)}, failed {failed}; stored {counted.total()}; "
        f"lost {len(lost)}, duplicated {len(doubled)}"
    )
    unbalanced = [str(account) for account in accounts if not account.balanced]
    assert not unbalanced, unbalanced
    assert not doubled, f"{len(doubled)} duplicated, {sorted(doubled)[:3]} and others"
    drops = sum(account.drops for account in accounts)
    assert len(lost) <= drops, f"{len(lost)} lost, {drops} announced; {sorted(lost)[:3]} and others"
    assert failed or len(lost) == drops, f"{drops} announced as dropped, {len(lost)} are not there"


def accounts_of_events(found: Iterable[Any]) -> list[Account]:
    """From all records of the nodes, each once: journals or topics read to their ends. Fails on a number that was
    given twice."""
    numbers: dict[str, Counter[int]] = {}
    captured: Counter[str] = Counter()
    dropped: dict[str, Mapping[str, int]] = {}
    for event in found:
        if event.seq:
            numbers.setdefault(event.node, Counter())[event.seq] += 1
        elif isinstance(event, NodeStatus):
            captured[event.node] = max(captured[event.node], event.captured)
            dropped[event.node] = _dropped(event.counters)
    for node, seqs in numbers.items():
        twice = [seq for seq, count in seqs.items() if count > 1]
        assert not twice, f"{node} gave numbers twice: {twice[:3]}"
        captured[node] = max(captured[node], *seqs)
    return [
        Account(node, captured[node], len(numbers.get(node, ())), dropped=dropped.get(node, {}))
        for node in sorted(captured)
    ]


def accounts_of_database(url: str) -> list[Account]:
    """From what ingest counted in its transactions, and the nodes' last heartbeats."""
    said = {node: (captured, counters) for node, captured, counters in rows(url, _NODES)}
    counted = {node: figures for node, *figures in rows(url, _ACCOUNTING)}
    made = []
    for node in sorted(said.keys() | counted.keys()):
        captured, counters = said.get(node, (0, {}))
        stored, dead_lettered, last = counted.get(node, (0, 0, 0))
        made.append(Account(node, max(captured, last), stored, dead_lettered=dead_lettered, dropped=_dropped(counters)))
    return made


def targets(url: str) -> list[str]:
    """Of all stored flows that have ended."""
    return [bytes(target).decode() for (target,) in rows(url, "SELECT target FROM flows WHERE seq > 0")]


def ending(items: Iterable[events.AnyEvent | bytes]) -> int:
    """How many of these must be stored or dead-lettered: events that end something, and what nobody can read."""
    return sum(isinstance(item, bytes) or bool(item.seq) for item in items)


def settle_items(items: Sequence[events.AnyEvent | bytes], url: str) -> None:
    """The same where no client sent anything and a test published `items`, which are its ledger: their flows by id."""
    sent = {item.flow_id.hex() for item in items if isinstance(item, events.FlowCompleted | events.FlowFailed)}
    found = [flow_id.hex for (flow_id,) in rows(url, "SELECT flow_id FROM flows WHERE seq > 0")]
    [[stored, dead_lettered]] = rows(url, _COUNTED)
    settle(sent, found, [Account("what was published", ending(items), stored, dead_lettered=dead_lettered)])


def _dropped(counters: Mapping[str, int]) -> dict[str, int]:
    named = {name.removeprefix(_DROPPED): count for name, count in counters.items() if name.startswith(_DROPPED)}
    return {name: count for name, count in named.items() if count}


_COUNTED = """
    SELECT coalesce(sum(value) FILTER (WHERE kind = 'stored'), 0)::bigint,
        coalesce(sum(value) FILTER (WHERE kind = 'dead_lettered'), 0)::bigint
    FROM accounting
"""
_NODES = "SELECT node, captured, counters FROM nodes WHERE service = 'capture'"
_ACCOUNTING = """
    SELECT node, coalesce(sum(value) FILTER (WHERE kind = 'stored'), 0)::bigint,
        coalesce(sum(value) FILTER (WHERE kind = 'dead_lettered'), 0)::bigint, max(max_seq)
    FROM accounting WHERE node <> '' GROUP BY node
"""
