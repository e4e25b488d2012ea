"""Hits of payload rules reach Postgres once a flow, in whatever order and however often its records come."""

import asyncio
import itertools
from datetime import datetime
from typing import Any

import psycopg
import pytest

from megido_ingest.store import Store
from megido_shared import events, ids
from megido_shared.clock import utc
from megido_shared.db.connect import conninfo
from megido_shared.testing import a_request, a_response
from tests.integration.ingest.support import Log, ingest, store_records, stream
from tests.integration.ingest.traffic import TIME, an_event


def a_rule(url: str) -> int:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        row = connection.execute(
            "INSERT INTO payload_rules (name, target_url_pattern, injection_type, injection_point, payload_content,"
            " active, target_apps, created_by, created_at, updated_at, hits)"
            " VALUES ('r', '.', 'header', 'X', '1', true, '{}', '', now(), now(), 0) RETURNING id"
        ).fetchone()
    assert row is not None
    return int(row[0])


def hits(url: str) -> dict[int, tuple[int, datetime | None]]:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        rows = connection.execute("SELECT id, hits, last_hit_at FROM payload_rules").fetchall()
    return {number: (count, at) for number, count, at in rows}


def states(rules: tuple[int, ...], **more: Any) -> list[events.AnyEvent]:
    """One flow, started with the first of its rules, then cut, failed and completed with all of them."""
    common: dict[str, Any] = {"flow_id": ids.new_id(), "request": a_request()} | more
    failure = events.Failure(events.ErrorType.OTHER, "x")
    return [
        an_event(events.FlowStarted, **common, rules=rules[:1]),
        an_event(events.FlowInterrupted, **common, rules=rules, seq=1),
        an_event(events.FlowFailed, **common, rules=rules, seq=2, failure=failure),
        an_event(events.FlowCompleted, **common, rules=rules, seq=3, response=a_response()),
    ]


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_each_flow_counts_once_in_any_order(database: str, size: int) -> None:
    first, second, unused = (a_rule(database) for _ in range(3))
    log = Log()
    count = 0
    for order in itertools.permutations(range(4)):
        made = states((first, second), time_us=TIME + count)
        log.add(*(made[index] for index in order))
        count += 1
    batches = [list(batch) for batch in itertools.batched(log.records, size, strict=False)]
    await ingest(database, batches)
    await ingest(database, batches)  # once more, from the beginning
    expected = (count, utc(TIME + count - 1))
    assert hits(database) == {first: expected, second: expected, unused: (0, None)}


async def test_an_open_flow_and_an_unknown_rule_count_nothing(database: str) -> None:
    rule = a_rule(database)
    log = Log()
    log.add(states((rule,))[0], *states((rule + 1000, -1, (1 << 63) + 5))[3:], *states(())[3:])
    await ingest(database, [log.records])
    assert hits(database) == {rule: (0, None)}


async def test_a_rule_named_twice_counts_once(database: str) -> None:
    rule = a_rule(database)
    log = Log()
    log.add(states((rule, rule))[3])
    await ingest(database, [log.records])
    assert hits(database)[rule][0] == 1


async def test_workers_side_by_side(database: str) -> None:
    """The same flows from several streams at once, as after a rebalance that nobody noticed."""
    rules = [a_rule(database) for _ in range(3)]
    made = [states(tuple(rules))[3] for _ in range(60)]
    stores = [Store(database) for _ in range(3)]
    try:
        logs = [Log(stream(partition=number)) for number in range(3)]
        for log in logs:
            log.add(*made)

        async def work(store: Store, log: Log) -> None:
            await store.claim({log.stream})
            for batch in itertools.batched(log.records, 10, strict=False):
                await store_records(store, list(batch))

        await asyncio.gather(*(work(store, log) for store, log in zip(stores, logs, strict=True)))
    finally:
        for store in stores:
            await store.close()
    assert {rule: count for rule, (count, _) in hits(database).items()} == dict.fromkeys(rules, 60)
