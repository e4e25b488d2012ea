"""Lists select what a naive look at every flow selects, whatever is indexed yet, over days and by every way to find."""

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_api.flows import queries
from megido_api.flows.queries import Filters
from megido_shared import events, ids
from megido_shared.db import search
from megido_shared.db.connect import create_engine
from megido_shared.db.tables import flow_text, flows
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.support import Log, batches, ingest, rows
from tests.integration.ingest.test_indexer import index
from tests.integration.ingest.traffic import an_event

DAYS = 12
_WORDS = ("alpha", "Beta", "ga%ma", "de_ta", "ä")


def _id(rng: random.Random, moment: datetime) -> bytes:
    return ids.floor_id(moment).bytes[:6] + b"\x70" + rng.randbytes(1) + b"\x80" + rng.randbytes(7)


def _flow(rng: random.Random, number: int) -> events.AnyFlow:
    moment = datetime.now(UTC) - timedelta(days=rng.random() * DAYS)
    posted = rng.random() < 0.1  # with a time of its own
    time = moment - timedelta(days=rng.random() * 300) if posted else moment
    agent = [(b"User-Agent", rng.choice((b"curl/8", b"Beta browser")))]
    request = a_request(
        method=rng.choice((b"GET", b"GET", b"POST", b"PROPFIND")), scheme=rng.choice(("https", "http")),
        host=f"{rng.choice(('api', 'www', 'beta'))}.example.com",
        target=f"/{rng.choice(_WORDS)}/{number}".encode(), headers=events.pack_headers(agent),
    )  # fmt: skip
    common: dict[str, Any] = {
        "flow_id": _id(rng, moment), "time_us": int(time.timestamp() * 1e6), "seq": number + 1, "request": request,
        "client": events.Peer(ip=f"10.0.0.{rng.randrange(3)}"), "is_replay": rng.random() < 0.1,
    }  # fmt: skip
    kind = rng.randrange(8)
    if kind == 0:
        return an_event(events.FlowStarted, **(common | {"seq": 0}))  # type: ignore[no-any-return]
    if kind == 1:
        failure = events.Failure(events.ErrorType.TIMEOUT, "late")
        return an_event(events.FlowFailed, **common, failure=failure)  # type: ignore[no-any-return]
    text = f"{rng.choice(_WORDS)} {number}".encode()
    return a_completed_flow(**common, response=a_response(body=events.Body(data=text, size=len(text))))


def _selected(row: dict[str, Any], f: Filters) -> bool:
    text = (f.search or "").lower()
    return (
        (f.method is None or row["method"] == f.method.upper())
        and (f.protocol is None or row["protocol"] == f.protocol.upper())
        and (f.source_ip is None or row["source_ip"] == f.source_ip)
        and (f.is_replay is None or row["is_replay"] == f.is_replay)
        and (not text or any(text in row[name].lower() for name in ("url", "host", "user_agent")))
        and _bounded(row, f)
    )


def _bounded(row: dict[str, Any], f: Filters) -> bool:
    before, after = f.before, f.after
    if isinstance(before, UUID) and row["flow_id"] >= before:
        return False
    if isinstance(before, datetime) and row["started_at"] >= before:
        return False
    if isinstance(after, UUID) and row["flow_id"] <= after:
        return False
    return not (isinstance(after, datetime) and row["started_at"] < after)


def _filters(rng: random.Random, stored: list[dict[str, Any]]) -> Filters:
    def maybe(value: Any, share: float = 0.3) -> Any:
        return value if rng.random() < share else None

    row = rng.choice(stored)
    return Filters(
        method=maybe(rng.choice(("get", "PropFind", "DELETE"))), protocol=maybe(rng.choice(("http", "HTTPS"))),
        source_ip=maybe(f"10.0.0.{rng.randrange(4)}"), is_replay=maybe(rng.random() < 0.5),
        search=maybe(rng.choice((*_WORDS, "BETA", "b", "/1", "a%", "nothing of it")), 0.5),
        before=maybe(rng.choice((row["flow_id"], row["started_at"]))),
        after=maybe(rng.choice((row["flow_id"], row["started_at"]))),
    )  # fmt: skip


@pytest.fixture(params=["not indexed", "half indexed", "indexed"])
async def stored(request: pytest.FixtureRequest, database: str) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    rng = random.Random(8)
    made = [_flow(rng, number) for number in range(160)]
    log = Log()
    log.add(*made)
    parts = list(batches(log.records, 20))
    await ingest(database, parts[:4])
    if request.param != "not indexed":
        await index(database)
    # Rows that are indexed as they were before: some flows end, with other URLs.
    ended = [
        a_completed_flow(
            flow_id=flow.flow_id, time_us=flow.time_us, seq=1000 + n,
            request=a_request(target=b"/alpha/ended", host="api.example.com"), client=flow.client,
        )
        for n, flow in enumerate(made[:80]) if isinstance(flow, events.FlowStarted)
    ]  # fmt: skip
    assert ended
    await ingest(database, [*parts[4:], log.add(*ended)])
    if request.param == "indexed":
        await index(database)
    columns = [column.name for column in flows.columns]
    yield database, [dict(zip(columns, row, strict=True)) for row in rows(database, "SELECT * FROM flows")]


async def _pages(connection: AsyncConnection, filters: Filters, limit: int) -> list[UUID]:
    """All of them, by cursor."""
    found: list[UUID] = []
    cursor: UUID | None = None
    while True:
        page = await queries.page(connection, filters, cursor=cursor, limit=limit, offset=0)
        found += [row.flow_id for row in page.rows]
        if not page.more:
            return found
        cursor = page.rows[-1].flow_id


@pytest.mark.parametrize("walk", [3, 1000])
async def test_pages_and_totals_equal_a_naive_scan(
    stored: tuple[str, list[dict[str, Any]]], walk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "WALK", walk)
    monkeypatch.setattr(search, "_WORTH", 0.5)  # so that what is not looked through at once is sought
    monkeypatch.setattr(search, "_CANDIDATES", 10)
    url, present = stored
    rng = random.Random(walk)
    engine = create_engine(url)
    hits = 0
    async with engine.connect() as connection:
        for _ in range(150):
            filters = _filters(rng, present)
            expected = sorted((row["flow_id"] for row in present if _selected(row, filters)), reverse=True)
            hits += len(expected)
            limit = rng.choice((1, 2, 5, 200))
            if limit * 20 >= len(expected):
                assert (filters, await _pages(connection, filters, limit)) == (filters, expected)
            offset = rng.randrange(20)
            page = await queries.page(connection, filters, cursor=None, limit=limit, offset=offset)
            assert [row.flow_id for row in page.rows] == expected[offset : offset + limit]
            assert page.more == (len(expected) > offset + limit)
            assert await queries.total(connection, filters) == paging.Total(len(expected), exact=True)
    await engine.dispose()
    assert hits > 500


async def test_an_index_that_is_far_behind(
    stored: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More batches than a statement has parameters: everything is found all the same, and the total is a part."""
    monkeypatch.setattr(search, "WALK", 3)
    monkeypatch.setattr(search, "_WORTH", 0.5)
    monkeypatch.setattr(search, "_LONG_WALK", 20)
    url, present = stored
    filters = Filters(search="beta")
    expected = sorted((row["flow_id"] for row in present if _selected(row, filters)), reverse=True)
    assert len(expected) > 40
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            "INSERT INTO feed (batch_id, committed_at) SELECT -n, now() FROM generate_series(1, 70000) AS n"
        )
    async with engine.connect() as connection:
        assert await _pages(connection, filters, 5) == expected
        total = await queries.total(connection, filters)
        assert not total.exact
        newest = sorted((row["flow_id"] for row in present), reverse=True)[:20]
        assert len(set(newest) & set(expected)) <= total.count <= len(expected)
        # Not far behind: one parameter holds them all.
        monkeypatch.setattr(search, "FAR_BEHIND", 100_000)
        assert await _pages(connection, filters, 50) == expected
        assert await queries.total(connection, filters) == paging.Total(len(expected), exact=True)
    await engine.dispose()


async def test_bodies_and_headers_are_found_as_far_as_they_are_indexed(
    stored: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "WALK", 3)
    url, _ = stored
    texts = rows(url, "SELECT flow_id, headers, coalesce(response_body, '') FROM flow_text ORDER BY 1 DESC")
    engine = create_engine(url)
    async with engine.connect() as connection:
        for column, place in ((flow_text.c.headers, 1), (flow_text.c.response_body, 2)):
            for word in ("alpha", "CURL", "t", "nothing"):
                wanted = search.Search(text=column.ilike(paging.contains(word), escape="\\"))
                expected = [row[0] for row in texts if word.lower() in row[place].lower()]
                for limit in (1, 7, 500):
                    found = await search.newest(connection, queries.LISTED, wanted, limit)
                    assert [row.flow_id for row in found] == expected[:limit]
                assert await search.count(connection, wanted, 1000) == search.Count(len(expected), exact=True)
                if expected:
                    older = search.Search(text=wanted.text, before=expected[0], where=(flows.c.rank >= 2,))
                    ended = {row[0] for row in rows(url, "SELECT flow_id FROM flows WHERE rank >= 2")}
                    found = await search.newest(connection, queries.LISTED, older, 500)
                    assert [row.flow_id for row in found] == [one for one in expected[1:] if one in ended]
    await engine.dispose()
