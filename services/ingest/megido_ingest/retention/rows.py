"""Rows: what would go, and taking it away. Whole days, oldest first; today and yesterday never.

Yesterday stays because records of it still arrive (clocks differ, a journal waits), and because ingest remembers which
of its bodies are stored.
"""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from megido_ingest import failures
from megido_ingest.session import fetch_one
from megido_shared.retention import Day, Policy, Report
from megido_shared.retention.report import to_json

DAYS_KEPT = 2
"""Today and yesterday."""
_ATTEMPTS = 100
_PAUSE_S = 0.2
_DROP_ATTEMPTS = 10
_DROP_PAUSE_S = 0.02
_PIECE = 5_000

_LEAVES = """
SELECT day, parent, leaf, kept, pinned, pg_total_relation_size(leaf_id)
FROM day_leaves() WHERE day < %s ORDER BY day, parent
"""
_AGED = {
    # Without rows of that time there is nothing that a reader of the feed could miss.
    "feed": ("seq", sql.SQL("committed_at < %s")),
    "posted_requests": ("id", sql.SQL("created_at < %s")),
    # One that is on its way through ingest again is counted by it.
    "dead_letters": ("id", sql.SQL("created_at < %s AND state <> 'queued'")),
}
"""By table: its key, and which of its rows go with the days before a moment."""

_MEASURE = sql.SQL("SELECT count(*), count(*) FILTER (WHERE {kept}), count(*) FILTER (WHERE {pinned}) FROM {leaf} AS t")
_COUNT = sql.SQL("SELECT count(*) FROM {table} WHERE {condition}")
_DELETE = sql.SQL(
    "DELETE FROM {table} WHERE {key} IN"
    " (SELECT {key} FROM {table} WHERE {condition} ORDER BY {key} LIMIT {piece} FOR UPDATE SKIP LOCKED)"
)

type Connection = psycopg.AsyncConnection[TupleRow]


@dataclass(frozen=True, slots=True)
class Leaf:
    table: str
    name: str
    rows: int
    kept: int
    pinned: int
    bytes: int


async def plan(connection: Connection, policy: Policy, today: date) -> Report:
    """What would go now, without any lock. Raises psycopg.Error."""
    report = Report(policy=policy, today=today.isoformat())
    report.bytes_before = report.bytes_after = await database_bytes(connection)
    aged = today - timedelta(days=policy.days) if policy.days else date.min
    first_kept = min(aged, _closed(today))
    for day, leaves in await _days(connection, today):
        large = bool(policy.max_bytes) and report.bytes_after > policy.max_bytes
        if day >= aged and not large:
            break
        measured = [await _measured(connection, leaf) for leaf in leaves]
        found = _day(day, "age" if day < aged else "size", measured)
        if found.rows:
            report.days.append(found)
            report.bytes_after -= found.bytes
            first_kept = max(first_kept, day + timedelta(days=1))
    if policy.max_bytes:
        report.over_bytes = max(0, report.bytes_after - policy.max_bytes)
    report.tables = await _count_aged(connection, first_kept)
    return report


async def retire(connection: Connection, run: int, day: Day) -> bool:
    """Removes what a plan says of a day and notes it in the run, in one transaction; True. Raises psycopg.Error, of
    which `failures.is_retry` is a reader that would not let go."""
    for attempt in range(_ATTEMPTS):
        try:
            await connection.execute("SELECT retire_day(%s, %s, %s)", [day.day, run, Jsonb(to_json(day))])
            return True
        except psycopg.Error as error:
            if not failures.is_retry(error) or attempt == _ATTEMPTS - 1:
                raise
            # Whoever queued behind us goes first.
            await asyncio.sleep(_PAUSE_S * (1 + random.random()))
    return False


async def drop_empty_days(connection: Connection, today: date, policy: Policy) -> int:
    """Drops the partitions of days that are over, have no rows and will be given none; answers of how many days. Those
    that somebody uses at every attempt are left for the next run."""
    aged = min(today - timedelta(days=policy.days), _closed(today)) if policy.days else _closed(today)
    left = sorted({day for day, *_ in await _leaves(connection, today) if day < aged})
    dropped = 0
    for attempt in range(_DROP_ATTEMPTS):
        if attempt and left:
            await asyncio.sleep(_DROP_PAUSE_S * (1 + random.random()))
        used = []
        for day in left:
            try:
                dropped += (await fetch_one(await connection.execute("SELECT drop_empty_day(%s)", [day])))[0]
            except psycopg.Error as error:
                if not failures.is_retry(error):
                    raise
                used.append(day)
        left = used
    return dropped


async def remove_aged(connection: Connection, first_kept: date, removed: dict[str, int]) -> None:
    """Removes the rows of tables without days in short transactions; counts them in `removed`, by table."""
    for table, (key, condition) in _AGED.items():
        removed[table] = 0
        statement = _DELETE.format(
            table=sql.Identifier(table), key=sql.Identifier(key), piece=sql.Literal(_PIECE), condition=condition
        )
        while count := (await connection.execute(statement, [_start(first_kept)])).rowcount:
            removed[table] += count


def first_kept(report: Report) -> date:
    """The first day of which a plan keeps rows that are not pinned."""
    today = date.fromisoformat(report.today)
    aged = today - timedelta(days=report.policy.days) if report.policy.days else date.min
    retired = [date.fromisoformat(day.day) + timedelta(days=1) for day in report.days]
    return max([min(aged, _closed(today)), *retired])


async def database_bytes(connection: Connection) -> int:
    found: int = (await fetch_one(await connection.execute("SELECT pg_database_size(current_database())")))[0]
    return found


def _closed(today: date) -> date:
    """The first day that never goes."""
    return today - timedelta(days=DAYS_KEPT - 1)


def _start(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


async def _leaves(connection: Connection, today: date) -> list[tuple[Any, ...]]:
    return await (await connection.execute(_LEAVES, [_closed(today)])).fetchall()


async def _days(connection: Connection, today: date) -> Iterable[tuple[date, list[tuple[Any, ...]]]]:
    days: dict[date, list[tuple[Any, ...]]] = {}
    for day, *leaf in await _leaves(connection, today):
        days.setdefault(day, []).append(tuple(leaf))
    return days.items()


async def _measured(connection: Connection, leaf: tuple[Any, ...]) -> Leaf:
    table, name, kept, pinned, size = leaf
    query = _MEASURE.format(kept=sql.SQL(kept), pinned=sql.SQL(pinned), leaf=sql.Identifier(name))
    rows, stay, because_pinned = await fetch_one(await connection.execute(query))
    return Leaf(table, name, rows, stay, because_pinned, size)


def _day(day: date, reason: str, leaves: list[Leaf]) -> Day:
    rows = {leaf.table: leaf.rows - leaf.kept for leaf in leaves if leaf.rows > leaf.kept}
    pinned = {leaf.table: leaf.pinned for leaf in leaves if leaf.pinned}
    still_open = {leaf.table: leaf.kept - leaf.pinned for leaf in leaves if leaf.kept > leaf.pinned}
    size = sum(leaf.bytes * (leaf.rows - leaf.kept) // leaf.rows for leaf in leaves if leaf.rows)
    return Day(day.isoformat(), reason, rows, pinned, size, still_open)


async def _count_aged(connection: Connection, first: date) -> dict[str, int]:
    found: dict[str, int] = {}
    for table, (_, condition) in _AGED.items():
        query = _COUNT.format(table=sql.Identifier(table), condition=condition)
        found[table] = (await fetch_one(await connection.execute(query, [_start(first)])))[0]
    return found
