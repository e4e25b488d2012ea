"""The figures of `megido_shared.accounting`, for the API and for ingest's metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.accounting import Balance, Counted, Heartbeat, Spots, Waiting, balance, total
from megido_shared.bus.base import Backlog, Bus, Stream
from megido_shared.bus.topics import COUNTED, INGESTED, NODES
from megido_shared.db.tables import UNCOUNTED
from megido_shared.errors import Unavailable

BUS_SECONDS = 10.0

_DROPPED = "dropped_terminal"
_SPOTS = {
    "dead_lettered": "dead_lettered",
    "corrupt": "corrupt",
    "torn": "corrupt",  # a kill's was never given a number for good; a power failure's may have been
    "expired": "expired",
    f"corrupt{UNCOUNTED}": "corrupt_unknown",
    f"torn{UNCOUNTED}": "corrupt_unknown",
    f"expired{UNCOUNTED}": "expired_unknown",
}

# One statement, so that all of it is of one moment.
_FIGURES = text("""
SELECT
    (SELECT coalesce(jsonb_agg(to_jsonb(n)), '[]') FROM (
        SELECT node, epoch, service, state, counters, captured, seen_at FROM nodes
    ) AS n) AS nodes,
    (SELECT coalesce(jsonb_agg(to_jsonb(a)), '[]') FROM (
        SELECT node, epoch, kind, sum(value)::bigint AS value, max(max_seq) AS max_seq
        FROM accounting GROUP BY node, epoch, kind
    ) AS a) AS accounting,
    (SELECT coalesce(jsonb_agg(to_jsonb(o)), '[]') FROM (
        SELECT source_id, topic, partition, "offset" FROM ingest_offsets
    ) AS o) AS positions,
    (SELECT count(*) FROM outbox WHERE topic = ANY (:topics)) AS outbox
""")

type Key = tuple[str, UUID]


@dataclass(frozen=True, slots=True)
class Account:
    """One node, that is one slot of one data directory. `exact`: nothing in it is inferred, or still to be told.
    `others` are records that end nothing (starts, chunks) or that nobody could read."""

    node: str
    epoch: UUID
    heartbeat: Heartbeat | None
    balance: Balance
    exact: bool
    others: Spots


@dataclass(frozen=True, slots=True)
class Accounts:
    """`unattributed` is what no node can be named for. `outbox` records wait in Postgres to be published: posted
    events, and those that forwarders brought over HTTP. `bus` says why the bus could not be asked."""

    nodes: list[Account]
    total: Balance
    unattributed: Spots
    outbox: int
    bus: str

    @property
    def balanced(self) -> bool:
        return self.total.unexplained == 0

    @property
    def exact(self) -> bool:
        return all(account.exact for account in self.nodes)


@dataclass(slots=True)
class Figures:
    """What Postgres knew at one moment."""

    heartbeats: dict[Key, Heartbeat] = field(default_factory=dict)
    counted: dict[Key, Counted] = field(default_factory=dict)
    spots: dict[UUID, Spots] = field(default_factory=dict)
    positions: dict[Stream, int] = field(default_factory=dict)
    outbox: int = 0


async def look(
    read: Callable[[Callable[[AsyncConnection], Awaitable[Figures]]], Awaitable[Figures]],
    bus: Bus,
    now: datetime,
    *,
    read_bytes: int,
) -> Accounts:
    """`read` runs a piece of work on a connection, and may raise. A bus that is away makes figures inexact, no error.

    The bus is asked after Postgres: what a node had handed on by its heartbeat is then stored, or in its answer.
    """
    figures = await read(lambda connection: figures_of(connection, now))
    try:
        async with asyncio.timeout(BUS_SECONDS):
            backlog = await bus.backlog(figures.positions, read_bytes=read_bytes)
    except (Unavailable, TimeoutError) as error:
        return accounts(figures, None, str(error) or "the bus does not answer")
    return accounts(figures, backlog)


async def figures_of(connection: AsyncConnection, now: datetime) -> Figures:
    row = (await connection.execute(_FIGURES, {"topics": [topic.name for topic in INGESTED]})).one()
    found = Figures(outbox=row.outbox)
    for node in row.nodes:
        found.heartbeats[node["node"], UUID(node["epoch"])] = _heartbeat(node, now)
    for one in row.accounting:
        epoch = UUID(one["epoch"])
        if not one["node"]:
            spots = found.spots.setdefault(epoch, Spots())
            name = _SPOTS[one["kind"]]
            setattr(spots, name, getattr(spots, name) + one["value"])
            continue
        key = (one["node"], epoch)
        known = found.counted.get(key, Counted())
        found.counted[key] = Counted(
            known.stored + (one["value"] if one["kind"] == "stored" else 0),
            known.dead_lettered + (one["value"] if one["kind"] == "dead_lettered" else 0),
            max(known.max_seq, one["max_seq"]),
        )
    for one in row.positions:
        found.positions[Stream(one["source_id"], one["topic"], one["partition"])] = one["offset"]
    return found


def _heartbeat(node: Mapping[str, Any], now: datetime) -> Heartbeat:
    counters: Mapping[str, int] = node["counters"]
    dropped = {
        name.removeprefix(f"{_DROPPED}:"): value for name, value in counters.items() if name.startswith(f"{_DROPPED}:")
    }
    if other := counters.get(_DROPPED, 0) - sum(dropped.values()):  # a node of before says no reasons
        dropped["unknown"] = other
    age = (now - datetime.fromisoformat(node["seen_at"])).total_seconds()
    journal = counters.get("journal_waiting")
    return Heartbeat(node["service"], node["state"], max(0.0, age), node["captured"], dropped, journal)


def accounts(figures: Figures, backlog: Mapping[Stream, Backlog] | None, bus: str = "") -> Accounts:
    """Pure. `backlog` None: the bus cannot be asked."""
    keys = sorted(figures.heartbeats.keys() | figures.counted.keys(), key=lambda key: (key[0], key[1].hex))
    spots = figures.spots
    found = [_account(key, figures, backlog, spots.setdefault(key[1], Spots())) for key in keys]
    named = {epoch for _, epoch in keys}
    unattributed = Spots()
    for epoch, one in spots.items():
        for name in Spots.__slots__ if epoch not in named else ():
            setattr(unattributed, name, getattr(unattributed, name) + getattr(one, name))
    return Accounts(found, total((one.balance for one in found), unattributed), unattributed, figures.outbox, bus)


def _account(key: Key, figures: Figures, backlog: Mapping[Stream, Backlog] | None, spots: Spots) -> Account:
    heartbeat = figures.heartbeats.get(key)
    waiting = _waiting(key[1], heartbeat, figures.outbox, backlog)
    result = balance(figures.counted.get(key, Counted()), heartbeat, waiting, spots)
    exact = (waiting.counted is not None or waiting.drained) and not result.since_heartbeat
    return Account(*key, heartbeat, result, exact, spots)


def _waiting(
    epoch: UUID, heartbeat: Heartbeat | None, outbox: int, backlog: Mapping[Stream, Backlog] | None
) -> Waiting:
    if backlog is None:
        return Waiting(heartbeats_behind=True)
    heartbeats_behind = any(held.behind for stream, held in backlog.items() if stream.topic == NODES.name)
    own = {stream.topic: held for stream, held in backlog.items() if stream.source_id == epoch.hex}
    if own:  # its journal lies on this bus
        counts = [held.counted for topic, held in own.items() if topic in COUNTED]
        seq = max((held.last_seq for held in own.values()), default=0)
        known = [count for count in counts if count is not None]
        return Waiting(sum(known) if len(known) == len(counts) else None, seq, False, heartbeats_behind)
    handed_on = heartbeat is not None and heartbeat.journal_bytes == 0
    behind = any(held.behind for held in backlog.values())
    return Waiting(drained=handed_on and not outbox and not behind, heartbeats_behind=heartbeats_behind)
