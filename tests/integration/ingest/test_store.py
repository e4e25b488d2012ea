"""The store on each Postgres: order of arrival, redelivery, overlap, bad records, exact bytes."""

import asyncio
import itertools
import random
from datetime import UTC, datetime

import psycopg
import pytest

from megido_ingest import rows as row_types
from megido_ingest.failures import StaleClaim
from megido_ingest.store import Store
from megido_shared import events, ids
from megido_shared.bus.base import Gap
from megido_shared.db import codecs, tables
from megido_shared.db.connect import conninfo, create_engine
from megido_shared.db.detail import decode_detail
from megido_shared.db.read import load_flow
from megido_shared.errors import Unavailable
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.support import (
    Log,
    batches,
    contents,
    counters,
    empty,
    ingest,
    rows,
    store_records,
    stream,
)
from tests.integration.ingest.traffic import an_event, mixed_traffic, states_of_a_flow


async def test_any_order_of_arrival_gives_the_same_contents(any_database: str) -> None:
    states = states_of_a_flow(ids.new_id())
    # Every order of all six would be 720 runs a server: all orders of the states, the chunks at each place.
    orders = [*itertools.permutations(range(4))]
    expected = None
    for number, order in enumerate(orders):
        arrival = [states[n] for n in order]
        arrival.insert(number % 5, states[4])
        arrival.insert(number % 6, states[5])
        empty(any_database)
        log = Log()
        log.add(*arrival)
        # One record a batch, then pairs, then all at once.
        size = (1, 2, 6)[number % 3]
        await ingest(any_database, batches(log.records, size))
        found = contents(any_database)
        expected = expected or found
        assert found == expected, (order, number, size)
    assert expected is not None
    assert len(expected["flows"]) == 1
    assert {(n, lb): v for n, lb, v in expected["counters"]} == {
        ("requests", ""): 1,
        ("requests_by_method", "GET"): 1,
        ("requests_by_protocol", "HTTPS"): 1,
        ("responses", ""): 1,
        ("responses_timed", ""): 1,
        ("response_time_us", ""): 900,
    }
    row = rows(any_database, "SELECT rank, response_body_state, response_size, response_chunks FROM flows")
    assert row == [(4, tables.BODY_STORED, 3000, None)]
    assert rows(any_database, "SELECT count(*) FROM body_chunks") == [(0,)]
    assert len(expected["bodies"]) == 1


async def test_every_order_of_a_failed_flow_and_its_chunks(any_database: str) -> None:
    flow_id = ids.new_id()
    _, interrupted, failed, _, *chunks = states_of_a_flow(flow_id)
    expected = None
    for order in itertools.permutations([interrupted, failed, *chunks]):
        empty(any_database)
        log = Log()
        log.add(*order)
        await ingest(any_database, batches(log.records, 1))
        found = contents(any_database)
        expected = expected or found
        assert found == expected
    assert counters(any_database)[("errors_by_type", "TIMEOUT")] == 1
    assert rows(any_database, "SELECT error_id = flow_id, error_message FROM errors") == [(True, "too slow")]


async def test_redelivery_changes_nothing(any_database: str) -> None:
    log = Log()
    log.add(*mixed_traffic(3, 120))
    await ingest(any_database, batches(log.records, 50))
    first = contents(any_database)
    feed = rows(any_database, "SELECT * FROM feed")
    numbers = rows(any_database, "SELECT flow_id, id, batch_id FROM flows ORDER BY 1")
    assert first["dead_letters"]
    for round_ in range(3):
        # The same log again as a rewound stream, and once more under other batch borders.
        with psycopg.connect(any_database, autocommit=True) as connection:
            connection.execute('UPDATE ingest_offsets SET "offset" = 0')
        await ingest(any_database, batches(log.records, 30 + round_))
        assert contents(any_database) == first
    assert rows(any_database, "SELECT * FROM feed") == feed
    assert rows(any_database, "SELECT flow_id, id, batch_id FROM flows ORDER BY 1") == numbers
    outbox = rows(any_database, "SELECT count(*) FROM outbox WHERE topic = 'megido.dead-letters'")
    assert outbox == [(len(first["dead_letters"]),)]


async def test_a_batch_whose_commit_was_not_confirmed_is_stored_once(database: str) -> None:
    log = Log()
    log.add(*mixed_traffic(5, 40))
    store = Store(database)
    await store.claim({log.stream})
    await store_records(store, log.records, [Gap(log.stream, 0, 10_000, "corrupt", 3)])
    first = contents(database)
    assert (await store_records(store, log.records, [Gap(log.stream, 0, 10_000, "corrupt", 3)])).repeated
    assert contents(database) == first
    assert [value for _, _, kind, value, _ in first["accounting"] if kind == "corrupt"] == [3]
    await store.close()


async def test_overlapping_workers_store_once_and_the_stale_one_is_fenced(any_database: str) -> None:
    log = Log()
    log.add(*mixed_traffic(11, 200))
    former, latter = Store(any_database), Store(any_database)
    await former.claim({log.stream})
    await store_records(former, log.records[:100])
    position = (await latter.claim({log.stream}))[log.stream]
    assert position.offset == 100
    await store_records(latter, log.records[100:200])
    before = contents(any_database)
    with pytest.raises(StaleClaim) as caught:
        await store_records(former, log.records[100:])
    assert log.stream.topic in caught.value.detail
    assert contents(any_database) == before
    await store_records(latter, log.records[200:])
    undisturbed = contents(any_database)
    await former.close()
    await latter.close()
    empty(any_database)
    await ingest(any_database, [log.records])
    assert contents(any_database) == undisturbed


async def test_workers_at_once_on_the_same_flows_neither_lose_nor_double(any_database: str) -> None:
    """Three streams hold the same records, as after a change of the partition count."""
    events_ = mixed_traffic(17, 150)
    logs = [Log(stream(partition=n)) for n in range(3)]
    rng = random.Random(1)
    for log in logs:
        shuffled = [e for e in events_ if not isinstance(e, bytes)]
        rng.shuffle(shuffled)
        log.add(*shuffled)

    async def work(log: Log) -> None:
        await ingest(any_database, batches(log.records, 37))

    await asyncio.gather(*(work(log) for log in logs))
    together = contents(any_database)
    empty(any_database)
    await ingest(any_database, [logs[0].records])
    assert contents(any_database) == together


async def _waiting_for_locks(url: str, count: int) -> None:
    async with asyncio.timeout(20):
        while rows(url, "SELECT count(*) FROM pg_locks WHERE NOT granted") != [(count,)]:
            await asyncio.sleep(0.01)


async def test_a_state_that_overtakes_another_worker_s_is_counted_as_if_one_after_the_other(database: str) -> None:
    """Two records of a flow in different partitions (their number changed). The second worker's statement begins
    before the first one's commit: its snapshot does not have the row that it raises."""
    whole = a_completed_flow(seq=5)
    cut = events.FlowInterrupted(
        event_id=ids.new_id(), node=whole.node, epoch=whole.epoch, seq=3, time_us=whole.time_us,
        flow_id=whole.flow_id, request=whole.request,
    )  # fmt: skip
    one, two = Log(stream(partition=1)), Log(stream(partition=2))
    one.add(cut)
    two.add(whole)
    first, second = Store(database), Store(database)
    await first.claim({one.stream})
    await second.claim({two.stream})
    with psycopg.connect(conninfo(database)) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(hashtext('megido.feed'))")
        storing = [asyncio.create_task(store_records(first, one.records))]
        await _waiting_for_locks(database, 1)
        storing.append(asyncio.create_task(store_records(second, two.records)))
        await _waiting_for_locks(database, 2)
    assert [stored.flows for stored in await asyncio.gather(*storing)] == [1, 1]
    await first.close()
    await second.close()
    assert rows(database, "SELECT rank, prev_rank, seq FROM flows") == [(4, 2, 5)]
    assert rows(database, "SELECT kind, sum(value)::integer FROM accounting GROUP BY kind") == [("stored", 1)]
    assert counters(database)["requests", ""] == counters(database)["requests_by_method", "GET"] == 1


async def test_bad_records_become_dead_letters_and_their_neighbours_are_stored(any_database: str) -> None:
    good = [a_completed_flow(seq=n + 1) for n in range(9)]
    newer = events.encode(good[0]).replace(b"FlowCompleted", b"FlowPerfected")
    # Fine for us, refused by Postgres: found by bisection.
    with psycopg.connect(any_database, autocommit=True) as connection:
        connection.execute("ALTER TABLE flows ADD CONSTRAINT for_the_test CHECK (host <> 'refused.example')")
    beyond = a_completed_flow(seq=90, request=a_request(host="refused.example"))
    later = a_completed_flow(seq=93, time_us=9_200_000_000_000_000_000)
    wide = a_completed_flow(seq=91, request=a_request(port=1 << 40))
    not_v7 = a_completed_flow(seq=92, flow_id=bytes(16))
    log = Log()
    log.add(*good[:3], b"\xc1 no MessagePack", newer, *good[3:6], beyond, wide, not_v7, *good[6:], later)
    (stored,) = await ingest(any_database, [log.records])
    assert (stored.flows, stored.letters) == (9, 6)
    letters = {
        offset: (kind, reason)
        for offset, kind, reason in rows(any_database, 'SELECT "offset", event_type, reason FROM dead_letters')
    }
    assert set(letters) == {3, 4, 8, 9, 10, 14}
    assert letters[4][0] == "FlowPerfected"
    assert letters[8][0] == "FlowCompleted"
    assert "for_the_test" in letters[8][1]
    assert all(reason for _, reason in letters.values())
    accounting = {(kind, node): value for node, _, kind, value, _ in contents(any_database)["accounting"]}
    assert accounting == {("stored", "test-0"): 9, ("dead_lettered", "test-0"): 5, ("dead_lettered", ""): 1}
    assert rows(any_database, 'SELECT "offset" FROM ingest_offsets') == [(15,)]


async def test_bytes_come_back_exactly(any_database: str) -> None:
    every = bytes(range(256))
    request = a_request(
        method=b"GE\x00T\xff",
        host="h\0ost.example",
        target=b"/" + every,
        authority=every,
        headers=events.pack_headers([(b"X-" + every, every), (b"User-Agent", b"a\x00b\xff")]),
        body=events.Body(data=every * 20, size=5120),
    )
    response = a_response(
        reason=every, headers=events.pack_headers([(b"Content-Type", b"Text/\xff\x00; x")]), body=every[::-1]
    )
    flow = a_completed_flow(request=request, response=response, source_app="a\0pp", node="n\0ode")
    message = an_event(
        events.WebSocketMessage, message_id=ids.new_id(), flow_id=flow.flow_id, connection_id="ws\0_1", url="wss://\0",
        direction="RECEIVE", message_type="BINARY", payload=every, size=256, seq=1,
    )  # fmt: skip
    log = Log()
    log.add(flow, message)
    (stored,) = await ingest(any_database, [log.records])
    assert (stored.flows, stored.messages, stored.letters) == (1, 1, 0)
    engine = create_engine(any_database)
    async with engine.connect() as connection:
        found = await load_flow(connection, ids.to_uuid(flow.flow_id))
    await engine.dispose()
    assert found is not None
    assert found.row.target == b"/" + every
    assert found.row.authority == every
    assert found.request_headers == [(b"X-" + every, every), (b"User-Agent", b"a\x00b\xff")]
    assert found.request_body.data == every * 20
    assert found.response_body.data == every[::-1]
    assert found.row.reason == every
    assert found.row.user_agent == "a%00b%FF"
    assert found.row.url.startswith("https://host.example/%00\x01")
    assert found.row.url.endswith("%FE%FF")
    detail = decode_detail(found.row.detail)
    assert set(detail.lossy) == {"url", "method", "host"}
    assert detail.original == {"method": b"GE\x00T\xff", "host": b"h\0ost.example"}
    ((payload,),) = rows(any_database, "SELECT payload FROM websocket_messages")
    assert codecs.unpack(payload) == every


async def test_states_of_bodies(database: str) -> None:
    cases = {
        "none": (events.Body(), tables.BODY_NONE, 0),
        "whole": (events.Body(data=b"abc", size=3), tables.BODY_STORED, 3),
        "first part": (events.Body(data=b"abc", size=10, truncated=True), tables.BODY_TRUNCATED, 10),
        "size only": (events.Body(size=10, sha256=b"h" * 32), tables.BODY_NOT_STORED, 10),
        "chunk missing": (events.Body(size=10, chunks=2), tables.BODY_INCOMPLETE, 10),
    }
    for body, state, size in cases.values():
        empty(database)
        log = Log()
        log.add(a_completed_flow(response=a_response(body=body)))
        await ingest(database, [log.records])
        assert rows(database, "SELECT response_body_state, response_size FROM flows") == [(state, size)]


async def test_a_missing_chunk_leaves_the_first_part_and_its_arrival_completes_it(any_database: str) -> None:
    flow_id = ids.new_id()
    pieces = [bytes([n]) * 500 for n in range(3)]
    chunks = [
        an_event(events.BodyChunk, flow_id=flow_id, side="response", index=n, data=p) for n, p in enumerate(pieces)
    ]
    flow = a_completed_flow(flow_id=flow_id, response=a_response(body=events.Body(size=1500, chunks=3)))
    log = Log()
    log.add(chunks[0], chunks[2], flow)
    other = Log(stream(partition=1))
    other.add(chunks[1])
    await ingest(any_database, [log.records])
    assert await _response_body(any_database, flow_id) == (tables.BODY_INCOMPLETE, pieces[0])
    await ingest(any_database, [other.records])
    assert await _response_body(any_database, flow_id) == (tables.BODY_STORED, b"".join(pieces))
    assert rows(any_database, "SELECT count(*) FROM body_chunks") == [(0,)]
    # The flow changed, so whoever follows the feed sees it again.
    assert rows(any_database, "SELECT count(*) FROM feed JOIN flows USING (batch_id)") == [(1,)]
    assert rows(any_database, "SELECT count(*) FROM feed") == [(2,)]


async def _response_body(url: str, flow_id: bytes) -> tuple[int, bytes]:
    engine = create_engine(url)
    async with engine.connect() as connection:
        found = await load_flow(connection, ids.to_uuid(flow_id))
    await engine.dispose()
    assert found is not None
    return found.response_body.state, found.response_body.data


async def test_a_repeated_body_is_stored_once_a_day(database: str) -> None:
    log = Log()
    log.add(*(a_completed_flow(seq=n, response=a_response(body=b"same" * 100)) for n in range(1, 31)))
    await ingest(database, batches(log.records, 10), fresh_cache=False)
    assert rows(database, "SELECT count(*), count(DISTINCT response_body_key) FROM flows") == [(30, 1)]
    assert rows(database, "SELECT count(*) FROM bodies") == [(1,)]


async def test_the_cache_of_bodies_is_not_believed_after_a_failure(database: str) -> None:
    log = Log()
    log.add(a_completed_flow(), a_completed_flow())
    store = Store(database)
    await store.claim({log.stream})
    await store_records(store, log.records[:1])
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("TRUNCATE bodies")  # as in another database that answers at the same address
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'megido ingest%' AND datname = current_database()"
        )
    stored = None
    while stored is None:
        try:
            stored = await store_records(store, log.records[1:])
        except Unavailable:
            await asyncio.sleep(0.05)
    assert rows(database, "SELECT count(*) FROM bodies") == [(1,)]
    await store.close()


async def test_ids_of_any_day_get_their_partition(any_database: str) -> None:
    def dated(year: int) -> bytes:
        ms = int(datetime(year, 3, 1, tzinfo=UTC).timestamp() * 1000)
        return ms.to_bytes(6) + b"\x70" + ids.new_id()[7:]

    log = Log()
    log.add(*(a_completed_flow(flow_id=dated(year), seq=n + 1) for n, year in enumerate((1999, 2012, 2040, 2199))))
    store = Store(any_database)
    await store.claim({log.stream})
    stored = await store_records(store, log.records)
    assert (stored.flows, stored.letters) == (4, 0)
    # A partition that disappears under a worker which believes in it.
    with psycopg.connect(any_database, autocommit=True) as connection:
        connection.execute("DROP TABLE flows_20120301")
    log.add(a_completed_flow(flow_id=dated(2012), seq=9))
    stored = await store_records(store, log.records[-1:])
    assert (stored.flows, stored.letters) == (1, 0)
    await store.close()


async def test_a_posted_flow_keeps_the_id_that_the_api_gave(database: str) -> None:
    log = Log()
    flow_id = ids.new_id()
    log.add(
        an_event(events.FlowStarted, flow_id=flow_id, request=a_request(), posted_id=4711),
        a_completed_flow(flow_id=flow_id, posted_id=4711),
        a_completed_flow(),
    )
    await ingest(database, batches(log.records, 1))
    found = rows(database, "SELECT id FROM flows ORDER BY flow_id")
    assert found[0] == (4711,)
    assert found[1] != (4711,)


async def test_a_nodes_own_word_on_an_interrupted_flow_outranks_maintenance(database: str) -> None:
    log = Log()
    flow_id = ids.new_id()
    said_for_it = an_event(events.FlowInterrupted, flow_id=flow_id, request=a_request(), seq=0)
    own = an_event(events.FlowInterrupted, flow_id=flow_id, request=a_request(), response=a_response(), seq=8)
    for order in ((said_for_it, own), (own, said_for_it)):
        empty(database)
        log = Log()
        log.add(*order)
        await ingest(database, batches(log.records, 1))
        assert rows(database, "SELECT rank, seq, status FROM flows") == [(2, 8, 200)]
        assert counters(database)[("requests", "")] == 1
        assert [row[2:] for row in contents(database)["accounting"]] == [("stored", 1, 8)]


async def test_a_refused_credential_is_an_error_too(database: str) -> None:
    log = Log()
    attempts = [
        an_event(events.AuthAttempted, auth_id=ids.new_id(), success=good, username="u", failure_reason=why, seq=n)
        for n, (good, why) in enumerate([(True, ""), (False, "bad password")], 1)
    ]
    flood = {"success": False, "failure_reason": "wrong token", "attempts": 41}
    log.add(*attempts, an_event(events.AuthAttempted, auth_id=ids.new_id(), seq=3, **flood))
    await ingest(database, [log.records])
    assert rows(database, "SELECT error_type, error_message, flow_id FROM errors ORDER BY occurred_at, error_id") == [
        ("AUTH_FAILURE", "bad password", None),
        ("AUTH_FAILURE", "wrong token (41 attempts)", None),
    ]
    shown = rows(database, "SELECT failure_reason FROM auth_attempts ORDER BY seq")
    assert shown == [("",), ("bad password",), ("wrong token (41 attempts)",)]
    assert counters(database) == {
        ("auth_attempts", ""): 3,
        ("auth_failures", ""): 2,
        ("errors", ""): 2,
        ("errors_by_type", "AUTH_FAILURE"): 2,
    }
    assert [row[2:] for row in contents(database)["accounting"]] == [("stored", 3, 3)]


async def test_health_is_asked_for_while_streams_are_claimed_on_a_session_of_its_own(database: str) -> None:
    store = Store(database)
    await asyncio.gather(store.ping(), store.claim({stream()}), store.ping())
    sessions = rows(
        database,
        "SELECT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND starts_with(application_name, 'megido ingest') ORDER BY 1",
    )
    assert sessions == [("megido ingest claims",), ("megido ingest health",)]
    await store.close()


def test_the_rows_are_packed_as_the_database_declares_them(any_database: str) -> None:
    for kind in row_types.ALL:
        declared = rows(
            any_database,
            "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
            " WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
            [kind.name],
        )
        names = {"timestamp with time zone": "timestamptz"}
        assert [(name, names.get(of, of)) for name, of in declared] == list(kind.fields), kind.name
