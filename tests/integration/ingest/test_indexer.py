"""The background indexer: every flow's texts once, up to the cursor, whoever else indexes at the same time."""

import asyncio
import gzip

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from megido_ingest import indexer as indexer_module
from megido_ingest.indexer import IndexMetrics, TextIndexer, bounded_engine
from megido_shared import events, ids
from megido_shared.db.connect import create_engine
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.support import Log, batches, ingest, rows
from tests.integration.ingest.traffic import an_event, mixed_traffic
from tests.support.waiting import until

_ALL = (
    "SELECT l.flow_id, l.line, t.headers, t.request_body, t.response_body, t.lossy"
    " FROM flow_lines l FULL JOIN flow_text t USING (flow_id) ORDER BY 1"
)


def _indexer(url: str, registry: CollectorRegistry | None = None) -> TextIndexer:
    return TextIndexer(url, IndexMetrics(registry or CollectorRegistry()))


async def index(url: str) -> None:
    """Everything that the feed holds."""
    engine = create_engine(url, pool_size=1)
    try:
        await _drain(_indexer(url), engine)
    finally:
        await engine.dispose()


async def _drain(indexer: TextIndexer, engine: AsyncEngine) -> None:
    while await indexer.lines(engine, 2):
        pass
    while await indexer.texts(engine):
        pass


async def test_what_is_searched_in(any_database: str) -> None:
    flow = a_completed_flow(
        request=a_request(
            host="api.example.com", target=b"/caf%C3%A9?q=\xff",
            headers=events.pack_headers([(b"User-Agent", b"curl/8"), (b"X-Odd", b"\xff\x00y")]),
            body=events.Body(data=b"name=value", size=10),
        ),
        response=a_response(
            headers=events.pack_headers([(b"Content-Type", b"text/plain"), (b"Content-Encoding", b"gzip")]),
            body=events.Body(data=(packed := gzip.compress("Größe".encode())), size=len(packed)),
        ),
    )  # fmt: skip
    log = Log()
    log.add(flow)
    await ingest(any_database, [log.records])
    await index(any_database)
    assert rows(any_database, _ALL) == [
        (
            ids.to_uuid(flow.flow_id), "https://api.example.com/caf%C3%A9?q=%FF\ncurl/8",
            "User-Agent: curl/8\nX-Odd: \xffy\nContent-Type: text/plain\nContent-Encoding: gzip\n",
            "name=value", "Größe", False,
        )
    ]  # fmt: skip


async def test_a_flow_that_is_raised_is_indexed_again(database: str) -> None:
    done = a_completed_flow(response=a_response(body=events.Body(data=b"the answer", size=10)))
    log = Log()
    log.add(an_event(events.FlowStarted, flow_id=done.flow_id, request=a_request(target=b"/before")))
    await ingest(database, [log.records])
    await index(database)
    assert [(row[1].split("\n")[0][-7:], row[4]) for row in rows(database, _ALL)] == [("/before", None)]
    await ingest(database, [log.add(done)])
    await index(database)
    assert [row[4] for row in rows(database, _ALL)] == ["the answer"]


async def test_indexers_at_once_and_again_from_the_start_change_nothing(database: str) -> None:
    log = Log()
    log.add(*mixed_traffic(2, 120))
    await ingest(database, batches(log.records, 11))
    await asyncio.gather(*(index(database) for _ in range(3)))
    first = rows(database, _ALL)
    assert [row[0] for row in first] == [row[0] for row in rows(database, "SELECT flow_id FROM flows ORDER BY 1")]
    assert all(row[2] is not None for row in first)
    newest = rows(database, "SELECT max(seq) FROM feed")[0][0]
    assert rows(database, "SELECT reader, seq FROM feed_cursors ORDER BY 1") == [
        ("line-index", newest), ("text-index", newest),
    ]  # fmt: skip
    engine = create_engine(database)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE feed_cursors SET seq = 0")
    await engine.dispose()
    await index(database)
    assert rows(database, _ALL) == first


async def test_what_was_not_committed_is_done_again(database: str) -> None:
    """An indexer that dies in its transaction: rows and cursor are as if it had never begun."""
    log = Log()
    log.add(*(a_completed_flow(seq=n + 1) for n in range(5)))
    await ingest(database, [log.records])
    engine = create_engine(database, pool_size=1)
    holder = create_engine(database, pool_size=1)
    async with holder.connect() as blocking:
        # It has written four rows when it waits for this one.
        await blocking.exec_driver_sql(
            "INSERT INTO flow_text SELECT flow_id, '', NULL, NULL, false FROM flows ORDER BY flow_id DESC LIMIT 1"
        )
        dying = asyncio.create_task(_indexer(database).texts(engine))
        waiting = (
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND strpos(query, 'INSERT INTO flow_text') > 0 AND datname = current_database()"
        )
        await asyncio.to_thread(until, lambda: rows(database, waiting), "the indexer waits")
        rows(database, f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS w")
        await asyncio.wait([dying])
        assert dying.exception() is not None
        await blocking.rollback()
    await engine.dispose()
    await holder.dispose()
    assert rows(database, "SELECT count(*) FROM flow_text") == [(0,)]
    await index(database)
    assert rows(database, "SELECT count(*) FROM flow_text") == [(5,)]


async def test_the_service_follows_the_feed_and_shows_its_lag(database: str) -> None:
    registry = CollectorRegistry()
    stop = asyncio.Event()
    running = asyncio.create_task(_indexer(database, registry).run(stop))
    log = Log()
    for n in range(3):
        await ingest(database, [log.add(a_completed_flow(seq=n + 1))])
    await asyncio.to_thread(
        until, lambda: rows(database, "SELECT count(*) FROM flow_text JOIN flow_lines USING (flow_id)") == [(3,)],
        "three flows are indexed",
    )  # fmt: skip
    stop.set()
    await running
    assert registry.get_sample_value("megido_ingest_text_index_lag_batches") == 0
    assert registry.get_sample_value("megido_ingest_text_index_lag_seconds") == 0


@pytest.mark.parametrize(
    "damage", ["UPDATE flows SET request_headers = '\\x01ff'", "UPDATE bodies SET data = '\\x01ff'"]
)
async def test_a_damaged_value_holds_up_nothing(database: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    log = Log()
    body = events.Body(data=b"the first", size=9)
    first = a_completed_flow(flow_id=ids.new_id(), seq=1, response=a_response(body=body))
    await ingest(database, [log.add(first)])
    rows(database, f"{damage} RETURNING 1")
    others = [
        a_completed_flow(seq=n, response=a_response(body=events.Body(data=b"number %d" % n, size=8))) for n in (2, 3)
    ]
    await ingest(database, [log.add(*others)])
    rows(database, "UPDATE flows SET batch_id = (SELECT max(batch_id) FROM feed) RETURNING 1")
    await index(database)
    assert rows(database, "SELECT response_body FROM flow_text ORDER BY 1") == [("number 2",), ("number 3",)]
    assert "cannot be decoded and is not searched in" in caplog.text


async def test_a_frozen_indexer_holds_the_cursor_for_a_while_only(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is stopped between two statements of its transaction loses it; the next one goes on."""
    log = Log()
    await ingest(database, [log.add(a_completed_flow())])
    monkeypatch.setattr(indexer_module, "_IDLE_IN_TRANSACTION_MS", 500)
    frozen, engine = bounded_engine(database), bounded_engine(database)
    lock = "SELECT * FROM feed_cursors FOR UPDATE"
    async with engine.begin() as connection:
        await connection.exec_driver_sql("INSERT INTO feed_cursors VALUES ('line-index', 0), ('text-index', 0)")
    connection = await frozen.connect()
    await connection.exec_driver_sql(lock)
    assert await _indexer(database).lines(engine)
    with pytest.raises(DBAPIError):
        await connection.exec_driver_sql(lock)
    await connection.close()
    await frozen.dispose()
    await engine.dispose()


async def test_its_engine_is_bounded(database: str) -> None:
    engine = bounded_engine(database)
    async with engine.connect() as connection:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        found = [await connection.scalar(text("SELECT current_setting(:name)"), {"name": name}) for name in names]
    await engine.dispose()
    assert found == ["5min", "2s", "1min"]


async def test_the_service_runs_on_it(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the running indexer's session waits for, it does not wait for long."""
    stop = asyncio.Event()
    holder = create_engine(database, pool_size=1)
    log = Log()
    await ingest(database, [log.add(a_completed_flow())])
    async with holder.begin() as connection:
        await connection.exec_driver_sql("INSERT INTO feed_cursors VALUES ('line-index', 0), ('text-index', 0)")
    async with holder.begin() as connection:
        await connection.exec_driver_sql("SELECT * FROM feed_cursors FOR UPDATE")
        running = asyncio.create_task(_indexer(database).run(stop))
        await asyncio.to_thread(until, lambda: "the text index waits" in caplog.text, "the wait for the lock has ended")
        assert "lock timeout" in caplog.text
    await asyncio.to_thread(
        until, lambda: rows(database, "SELECT count(*) FROM flow_text") == [(1,)], "the flow is indexed"
    )
    stop.set()
    await running
    await holder.dispose()
