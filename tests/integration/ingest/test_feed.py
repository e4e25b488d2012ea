"""One order for everything downstream: a reader that follows the feed misses nothing, whoever writes."""

import asyncio

import psycopg

from megido_ingest.session import FEED_CHANNEL
from megido_shared.db.connect import conninfo
from megido_shared.testing import a_completed_flow, a_response
from tests.integration.ingest.support import Log, batches, ingest, rows, stream

WRITERS = 3
FLOWS = 120


async def _follow(url: str, expected: int) -> list[str]:
    """As a reader does: woken by NOTIFY, reads on in `seq` order from its cursor, never looks back."""
    seen: list[str] = []
    cursor = 0
    async with await psycopg.AsyncConnection.connect(conninfo(url), autocommit=True) as connection:
        await connection.execute(f"LISTEN {FEED_CHANNEL}")
        while len(seen) < expected:
            found = await (
                await connection.execute(
                    "SELECT f.seq, l.flow_id::text FROM feed f LEFT JOIN flows l USING (batch_id)"
                    " WHERE f.seq > %s ORDER BY f.seq, l.flow_id",
                    [cursor],
                )
            ).fetchall()
            seen += [flow_id for _, flow_id in found if flow_id]
            cursor = found[-1][0] if found else cursor
            if not found:
                async for _ in connection.notifies(timeout=1, stop_after=1):
                    pass
    return seen


async def test_a_reader_of_the_feed_misses_nothing_of_concurrent_writers(any_database: str) -> None:
    logs = [Log(stream(partition=n)) for n in range(WRITERS)]
    for number, log in enumerate(logs):
        log.add(*(a_completed_flow(response=a_response(body=b"%d-%d" % (number, n))) for n in range(FLOWS)))
    reader = asyncio.create_task(_follow(any_database, WRITERS * FLOWS))
    await asyncio.gather(*(ingest(any_database, batches(log.records, 1 + n)) for n, log in enumerate(logs)))
    seen = await asyncio.wait_for(reader, 30)
    assert len(seen) == len(set(seen)) == WRITERS * FLOWS
    stored = {flow_id for (flow_id,) in rows(any_database, "SELECT flow_id::text FROM flows")}
    assert set(seen) == stored


async def test_each_batch_that_changed_something_has_one_place_in_the_feed(database: str) -> None:
    log = Log()
    log.add(*(a_completed_flow() for _ in range(10)), b"junk")
    await ingest(database, batches(log.records, 5))
    assert rows(database, "SELECT count(*), count(DISTINCT batch_id) FROM feed") == [(2, 2)]
    assert rows(database, "SELECT count(*) FROM flows WHERE batch_id IN (SELECT batch_id FROM feed)") == [(10,)]
