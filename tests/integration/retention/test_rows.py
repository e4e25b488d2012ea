"""Rows: what is older or larger than the policy allows goes, whole days at a time; what is pinned stays, whole."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from megido_ingest.bodycache import BodyCache
from megido_ingest.prepare import prepare
from megido_ingest.retention import Places, Retention
from megido_ingest.store import Store
from megido_shared import events, ids
from megido_shared.bus.base import Batch
from megido_shared.clock import SystemClock
from megido_shared.db.connect import conninfo
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.support import Log, contents, ingest, rows, store_records, stream
from tests.integration.ingest.traffic import an_event
from tests.integration.retention.history import (
    SHARED,
    TABLES,
    History,
    an_id,
    ask,
    execute,
    moment,
    noted,
    retention,
    run_once,
    set_policy,
)

BODY = events.Body(data=b"asked" * 30, size=150)


def partitions(url: str, days_ago: int) -> list[str]:
    found = rows(url, "SELECT parent::text FROM day_leaves() WHERE day = %s", [moment(days_ago).date()])
    return [parent for (parent,) in found]


async def test_days_that_are_older_go_with_everything_in_them(any_database: str, tmp_path: Path) -> None:
    history = History(any_database)
    for days_ago in (9, 5, 4, 1, 0):
        await history.day(days_ago)
    history.age_the_rest(9)
    accounted = contents(any_database)["accounting"]
    counted = contents(any_database)["counters"]
    set_policy(any_database, days=4)
    report = await run_once(any_database, tmp_path)
    for table in TABLES:
        assert set(history.days_of(table)) == {4, 1, 0}, table
    assert [(day.day, day.reason) for day in report.days] == [
        (moment(9).date().isoformat(), "age"),
        (moment(5).date().isoformat(), "age"),
    ]
    assert report.days[0].rows == {
        "flows": 4, "bodies": 4, "body_chunks": 1, "websocket_messages": 3, "errors": 3, "auth_attempts": 1,
    }  # fmt: skip
    assert report.days[0].pinned == {}
    assert report.tables == {"feed": 5, "posted_requests": 3, "dead_letters": 3}
    assert rows(any_database, "SELECT state FROM dead_letters") == [("queued",)], "it is on its way through ingest"
    assert partitions(any_database, 9) == partitions(any_database, 5) == []
    assert set(TABLES) <= set(partitions(any_database, 4))
    # What was stored stays accounted for, and counted.
    assert contents(any_database)["accounting"] == accounted
    assert contents(any_database)["counters"] == counted


async def test_today_and_yesterday_never_go(database: str, tmp_path: Path) -> None:
    history = History(database)
    for days_ago in (2, 1, 0):
        await history.day(days_ago)
    set_policy(database, days=1, max_bytes=1)
    report = await run_once(database, tmp_path)
    assert set(history.days_of()) == {1, 0}
    assert report.over_bytes == report.bytes_after - 1 > 0
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.RaiseException, match="not over"):
            connection.execute("SELECT retire_day(%s, 1, '{}')", [moment(1).date()])
        assert connection.execute("SELECT drop_empty_day(%s)", [moment(0).date()]).fetchone() == (False,)


async def test_a_dry_run_says_exactly_what_goes_and_changes_nothing(any_database: str, tmp_path: Path) -> None:
    history = History(any_database)
    for days_ago in (6, 3, 0):
        await history.day(days_ago)
    history.age_the_rest(6)
    history.pin(history.flows[6][1])
    set_policy(any_database, days=2)
    before = contents(any_database)
    dry = await run_once(any_database, tmp_path, dry=True)
    assert contents(any_database) == before
    assert rows(any_database, "SELECT count(*) FROM feed") == [(3,)]
    wet = await run_once(any_database, tmp_path)
    assert (wet.days, wet.tables, wet.logs, wet.bus) == (dry.days, dry.tables, dry.logs, dry.bus)
    assert dry.removes
    again = await run_once(any_database, tmp_path, dry=True)
    assert not again.removes, "what was said is gone, and pinned rows are not told of again"


async def test_pinned_flows_stay_whole(any_database: str, tmp_path: Path) -> None:
    history = History(any_database)
    await history.day(5)
    await history.day(3)
    completed, failed = history.flows[5][0], history.flows[5][3]
    await history.message(3, completed)
    history.pin(completed, failed)
    bodies = rows(
        any_database,
        "SELECT b.sha256, b.data FROM bodies b JOIN flows f ON b.sha256 IN (f.request_body_key, f.response_body_key)"
        " WHERE f.flow_id = %s AND b.day = %s ORDER BY 1",
        [completed, moment(5).date()],
    )
    assert len(bodies) == 2, "its own and the one that all share"
    before = rows(
        any_database, "SELECT f::text FROM flows f WHERE flow_id = ANY (%s) ORDER BY 1", [[completed, failed]]
    )
    set_policy(any_database, days=1)
    report = await run_once(any_database, tmp_path)
    assert report.days[0].pinned == {"flows": 2, "bodies": 2, "websocket_messages": 1, "errors": 1}
    assert report.days[1].pinned == {"websocket_messages": 1}
    assert rows(any_database, "SELECT f::text FROM flows f ORDER BY 1") == before
    assert rows(any_database, "SELECT sha256, data FROM bodies ORDER BY 1") == bodies
    assert rows(any_database, "SELECT flow_id, count(*) FROM websocket_messages GROUP BY 1") == [(completed, 2)]
    assert rows(any_database, "SELECT flow_id FROM errors") == [(failed,)]
    assert rows(any_database, "SELECT count(*) FROM auth_attempts") == [(0,)]
    # Rollups count what was stored, once, whatever is put back.
    minutes = "SELECT sum(value)::int FROM rollups WHERE minutes = 1440 AND name = 'requests'"
    assert rows(any_database, minutes) == [(8,)]
    execute(any_database, "DELETE FROM flow_pins")
    await run_once(any_database, tmp_path)
    assert {table: history.days_of(table) for table in TABLES} == {table: {} for table in TABLES}


async def test_the_oldest_go_until_the_size_fits(any_database: str, tmp_path: Path) -> None:
    history = History(any_database)
    for days_ago in (8, 7, 6, 5):
        await history.day(days_ago, flows=40, body=_noise(days_ago))
    size = int(rows(any_database, "SELECT pg_database_size(current_database())")[0][0])
    of_day = {
        str(day): int(total)
        for day, total in rows(
            any_database, "SELECT day, sum(pg_total_relation_size(leaf_id)) FROM day_leaves() GROUP BY 1"
        )
    }
    # Room for all but one day and a half.
    limit = size - of_day[moment(8).date().isoformat()] - of_day[moment(7).date().isoformat()] // 2
    set_policy(any_database, max_bytes=limit)
    report = await run_once(any_database, tmp_path)
    assert [(day.day, day.reason) for day in report.days] == [
        (moment(8).date().isoformat(), "size"),
        (moment(7).date().isoformat(), "size"),
    ]
    assert set(history.days_of()) == {6, 5}
    after = int(rows(any_database, "SELECT pg_database_size(current_database())")[0][0])
    assert after <= limit
    assert report.over_bytes == 0
    assert not (await run_once(any_database, tmp_path)).removes


def _noise(seed: int) -> bytes:
    import random

    return random.Random(seed).randbytes(400_000)


async def test_a_reader_that_stays_is_waited_for_and_holds_nobody_up(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export in one transaction: it reads on; ingest stores meanwhile; the day goes when it has ended."""
    history = History(database)
    await history.day(5)
    set_policy(database, days=1)
    refused = asyncio.Event()
    plain = asyncio.sleep

    async def seen(seconds: float) -> None:
        refused.set()
        await plain(seconds)

    monkeypatch.setattr("megido_ingest.retention.rows.asyncio.sleep", seen)
    async with await psycopg.AsyncConnection.connect(conninfo(database)) as reader:
        cursor = await reader.execute("SELECT count(*) FROM flows")
        assert await cursor.fetchone() == (4,)
        run = asyncio.create_task(run_once(database, tmp_path))
        await asyncio.wait_for(refused.wait(), 30)
        await history.day(0)
        assert await (await reader.execute("SELECT count(*) FROM flows")).fetchone() == (8,)
        assert not run.done()
        await reader.commit()
        report = await asyncio.wait_for(run, 60)
    assert len(report.days) == 1
    assert set(history.days_of()) == {0}


async def test_who_pins_while_a_day_goes_is_too_late_or_in_time(database: str) -> None:
    history = History(database)
    await history.day(5)
    execute(
        database,
        "INSERT INTO retention_runs (state, dry_run, requested_by, requested_at, report, error)"
        """ VALUES ('running', false, '', now(), '{"days": []}', '')""",
    )
    with psycopg.connect(conninfo(database)) as pinning, psycopg.connect(conninfo(database), autocommit=True) as other:
        pinning.execute("INSERT INTO flow_pins VALUES (%s, 'me', now())", [history.flows[5][0]])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SELECT retire_day(%s, 1, '{}')", [moment(5).date()])
        pinning.commit()
        other.execute("SELECT retire_day(%s, 1, '{}')", [moment(5).date()])
    assert rows(database, "SELECT flow_id FROM flows") == [(history.flows[5][0],)]


async def test_a_late_record_of_a_day_that_went_is_stored_with_its_body(database: str, tmp_path: Path) -> None:
    history = History(database)
    await history.day(5)
    set_policy(database, days=1)
    await run_once(database, tmp_path)
    assert partitions(database, 5) == []
    await history.day(5)
    assert rows(database, "SELECT count(*) FROM flows") == [(4,)]
    assert rows(database, "SELECT count(*) FROM bodies WHERE size = %s", [len(SHARED)]) == [(1,)]


def test_no_body_of_a_day_that_may_go_is_believed_to_be_stored() -> None:
    noon = moment(0).timestamp()
    today = (moment(0).date() - date(2000, 1, 1)).days
    cache = BodyCache(now=lambda: noon)
    cache.add([(day, b"sha") for day in range(today - 3, today + 2)], today)
    assert [day - today for day in range(today - 3, today + 2) if (day, b"sha") in cache] == [-1, 0, 1]
    cache.add([(today - 2, b"sha")], today - 2)
    assert (today - 2, b"sha") not in cache, "a batch of nothing but late records"
    noon += 86_400  # and nothing was added since
    assert [day - today for day in range(today - 3, today + 2) if (day, b"sha") in cache] == [0, 1]


async def test_a_batch_of_before_midnight_is_prepared_anew(database: str, tmp_path: Path) -> None:
    """Its flow is of a day that retention took between preparing and storing; the body must come again."""
    history = History(database)
    await history.day(5)
    store, body = Store(database), events.Body(data=SHARED, size=len(SHARED))
    now = moment(4).timestamp()
    store.cache = BodyCache(now=lambda: now)
    log = Log(stream(partition=2))
    first, second = (
        log.add(a_completed_flow(flow_id=an_id(moment(5)), seq=seq, request=a_request(body=body))) for seq in (1, 2)
    )
    await store.claim([log.stream])
    await store_records(store, first)
    waiting = prepare(Batch(second), dict(store.generations), store.cache)
    assert not waiting.body_keys, "known to be stored"
    set_policy(database, days=1)
    await run_once(database, tmp_path)
    now = moment(0).timestamp()
    await store.store(waiting)
    await store.close()
    assert rows(database, "SELECT size FROM bodies WHERE size = %s", [len(SHARED)]) == [(len(SHARED),)]


async def test_one_run_at_a_time(database: str, tmp_path: Path) -> None:
    async with retention(database, tmp_path), Retention.opened(database, Places(tmp_path), SystemClock()) as second:
        assert second is None


async def test_a_run_that_a_dead_process_had_begun_is_told_as_failed(database: str, tmp_path: Path) -> None:
    history = History(database)
    await history.day(5)
    run = ask(database, dry=False)
    execute(database, "UPDATE retention_runs SET state = 'running', report = '{\"days\": []}'")
    execute(database, "SELECT retire_day(%s, %s, '{\"day\": \"x\", \"reason\": \"age\", \"rows\": {\"flows\": 4},"
            " \"pinned\": {}, \"bytes\": 1}')", [moment(5).date(), run])  # fmt: skip
    async with retention(database, tmp_path) as found:
        assert await found.queued() == []
    state, report = noted(database, run)
    assert state == "failed"
    assert report.days[0].rows == {"flows": 4}, "the day and its note are one transaction"


async def test_the_schedule_notes_only_what_it_removed(database: str, tmp_path: Path) -> None:
    history = History(database)
    await history.day(0)
    set_policy(database, days=1)
    async with retention(database, tmp_path) as found:
        await found.scheduled()
        assert rows(database, "SELECT count(*) FROM retention_runs") == [(0,)]
        await history.day(3)
        await found.scheduled()
    (row,) = rows(
        database, "SELECT state, requested_by, report -> 'days' -> 0 -> 'rows' -> 'flows' FROM retention_runs"
    )
    assert row == ("done", "schedule", 4)
    assert datetime.now(UTC) - rows(database, "SELECT finished_at FROM retention_runs")[0][0] < timedelta(minutes=5)


async def test_ingest_again_after_retention_changes_no_account(database: str, tmp_path: Path) -> None:
    """What is delivered once more below the stored offset comes back neither as a row nor as a number."""
    history = History(database)
    await history.day(5)
    accounted = contents(database)["accounting"]
    set_policy(database, days=1)
    await run_once(database, tmp_path)
    await ingest(database, [history.log.records])
    assert contents(database)["accounting"] == accounted
    assert rows(database, "SELECT count(*) FROM flows") == [(0,)]


async def test_open_flows_stay_and_are_counted_once_when_they_end(any_database: str, tmp_path: Path) -> None:
    history = History(any_database)
    await history.day(5)
    flow_id, log = an_id(moment(5)), Log(stream(partition=1))
    head = a_response(body=events.Body())
    started = an_event(events.FlowStarted, flow_id=flow_id, request=a_request(body=BODY), response=head)
    piece = an_event(events.BodyChunk, flow_id=flow_id, side="response", index=0, data=b"so far")
    await ingest(any_database, [log.add(started, piece)])
    counted = contents(any_database)["counters"]
    set_policy(any_database, days=1)
    report = await run_once(any_database, tmp_path)
    assert report.days[0].open == {"flows": 1, "bodies": 1, "body_chunks": 1}
    assert report.days[0].pinned == {}
    assert rows(any_database, "SELECT flow_id, rank FROM flows") == [(ids.to_uuid(flow_id), 1)]
    assert rows(any_database, "SELECT flow_id FROM body_chunks") == [(ids.to_uuid(flow_id),)]
    assert rows(any_database, "SELECT size FROM bodies") == [(BODY.size,)]
    assert contents(any_database)["counters"] == counted
    minutes = "SELECT sum(value)::int FROM rollups WHERE minutes = 1440 AND name = 'requests'"
    before = rows(any_database, minutes)
    ended = a_completed_flow(flow_id=flow_id, seq=1, request=a_request(body=BODY))
    await ingest(any_database, [log.add(ended)])
    assert rows(any_database, "SELECT rank > 1 FROM flows") == [(True,)]
    assert rows(any_database, minutes) == before
    await run_once(any_database, tmp_path)
    assert history.days_of() == {}


async def test_an_attempt_waits_for_all_its_locks_together(database: str) -> None:
    await History(database).day(5)
    leaf = rows(database, "SELECT leaf FROM day_leaves() WHERE day = %s AND parent = 'flows'", [moment(5).date()])[0][0]
    late = "SELECT lock_leaf(%s, clock_timestamp() - interval '1 s')"
    with psycopg.connect(conninfo(database)) as reader, psycopg.connect(conninfo(database)) as other:
        other.execute("SET lock_timeout = '1h'; SET statement_timeout = '20s'")
        other.execute(late, [leaf])
        other.rollback()
        reader.execute("SELECT count(*) FROM flows")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute(late, [leaf])


async def test_parents_are_not_waited_for(database: str, tmp_path: Path) -> None:
    await History(database).day(5)
    execute(database, "TRUNCATE " + ", ".join(TABLES))
    execute(database, "ALTER FUNCTION drop_empty_day(date) SET lock_timeout = '1h'")
    with psycopg.connect(conninfo(database)) as reader, psycopg.connect(conninfo(database), autocommit=True) as other:
        reader.execute("LOCK TABLE ONLY websocket_messages IN ACCESS SHARE MODE")
        other.execute("SET statement_timeout = '20s'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SELECT drop_empty_day(%s)", [moment(5).date()])
        reader.rollback()
        assert other.execute("SELECT drop_empty_day(%s)", [moment(5).date()]).fetchone() == (True,)
