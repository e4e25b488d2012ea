"""Statistics by time equal a count of the rows, whatever was delivered how often, by whom and in which order."""

import asyncio
import random
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command

from megido_ingest.rollups import prune
from megido_ingest.store import Store
from megido_shared import events, ids
from megido_shared.db import migrate
from megido_shared.db.connect import connect, conninfo, parse_url
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.counting import expected, stored
from tests.integration.ingest.support import Log, batches, ingest, rows, store_records, stream
from tests.integration.ingest.traffic import TIME, an_event, mixed_traffic

HOUR_US = 3_600_000_000


def _traffic(seed: int, count: int) -> list[Any]:
    """Mixed traffic, and flows of many times, hosts and durations."""
    rng = random.Random(seed)
    made: list[Any] = [
        a_completed_flow(
            seq=n + 1, time_us=TIME + rng.randrange(60 * HOUR_US),
            request=a_request(host=f"h{rng.randrange(5)}.example", method=rng.choice((b"GET", b"PUT"))),
            response=a_response(status=rng.choice((200, 404))),
            timing=events.Timing(response_us=rng.choice((-1, 0, 1, rng.randrange(10**7)))),
        )
        for n in range(count)
    ]  # fmt: skip
    return made + mixed_traffic(seed, count)


async def test_they_equal_a_count_of_the_rows(any_database: str) -> None:
    log = Log()
    log.add(*_traffic(1, 80))
    await ingest(any_database, batches(log.records, 37))
    counted = expected(any_database)
    assert {name for _, name, _, _ in counted} >= {"requests", "host", "error", "latency", "messages", "auth_failures"}
    assert stored(any_database) == counted


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_redelivery_and_workers_at_once_count_once(database: str, seed: int) -> None:
    rng = random.Random(seed)
    items = _traffic(seed, 40)
    logs = [Log(stream(partition=n)) for n in range(3)]
    for log in logs:  # each worker gets all of it, in an order of its own
        log.add(*rng.sample(items, len(items)))

    async def work(log: Log) -> None:
        store = Store(database)
        try:
            await store.claim([log.stream])
            for part in batches(log.records, rng.randrange(5, 60)):
                await store_records(store, part)
        finally:
            await store.close()

    await asyncio.gather(*(work(log) for log in logs))
    assert stored(database) == expected(database)
    shards = rows(database, "SELECT count(DISTINCT shard) FROM rollups")
    assert shards[0][0] > 1


async def test_a_transaction_that_is_rolled_back_counts_nothing(database: str) -> None:
    log = Log()
    log.add(*_traffic(3, 10))
    await ingest(database, [log.records])
    before = stored(database)
    with psycopg.connect(conninfo(database)) as connection:
        connection.execute("UPDATE flows SET method = 'OTHER', rank = 4")
        connection.rollback()
    assert stored(database) == before == expected(database)


async def test_what_retention_does_to_a_partition_counts_nothing(database: str) -> None:
    log = Log()
    log.add(*_traffic(4, 20))
    await ingest(database, [log.records])
    before = stored(database)
    (leaf,) = rows(database, "SELECT DISTINCT tableoid::regclass::text FROM flows")
    with psycopg.connect(conninfo(database)) as connection:
        connection.execute(f"CREATE TEMPORARY TABLE kept AS SELECT * FROM {leaf[0]} LIMIT 3")
        connection.execute(f"TRUNCATE {leaf[0]}")
        connection.execute(f"INSERT INTO {leaf[0]} SELECT * FROM kept")
    assert rows(database, "SELECT count(*) FROM flows") == [(3,)]
    assert stored(database) == before


async def test_a_database_of_before_is_counted_when_it_is_migrated(empty_database: str) -> None:
    _upgrade(empty_database, "0005")
    log = Log()
    log.add(*_traffic(5, 40))
    await ingest(empty_database, [log.records[:100]])
    migrate.migrate(empty_database)
    assert stored(empty_database) == expected(empty_database)
    log.add(*_traffic(6, 10))
    await ingest(empty_database, [log.records[60:]])
    assert stored(empty_database) == expected(empty_database)


def _upgrade(url: str, revision: str) -> None:
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.exec_driver_sql(migrate.PARTITIONS_AHEAD)
        connection.commit()
    engine.dispose()


async def test_finer_ones_are_removed_first_and_the_days_stay(database: str) -> None:
    log = Log()
    now_us = ids.time_ms(ids.new_id()) * 1000
    for days in (0, 1, 5, 500):
        log.add(a_completed_flow(seq=days + 1, time_us=now_us - days * 24 * HOUR_US))
    log.add(an_event(events.NodeStatus, state="running"))
    await ingest(database, [log.records])
    connection = await connect(database)
    try:
        assert await prune(connection) > 0
        assert await prune(connection) == 0
    finally:
        await connection.close()
    counts = "SELECT minutes, count(*) FROM rollups WHERE name = 'requests' GROUP BY 1 ORDER BY 1"
    assert rows(database, counts) == [(1, 2), (60, 3), (1440, 4)]
