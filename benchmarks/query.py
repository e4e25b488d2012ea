"""How fast a million flows are searched, by the very code that the API runs: pages of 100, their totals, statistics.

Each query of the mix runs many times, in turns with the others; the figures are the client's, over one connection, in
milliseconds. `cpu_ms` is what client and server process computed for it, the mean. `yardstick_*` is the newest page
without a filter: what everything costs on this machine at this moment.
The plans of the main queries go to `docs/query-plans.md` (`--plans`).
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks import query_cost, query_plans
from benchmarks.query_fill import BODY, URL, Filled, fill
from benchmarks.query_index import Indexed, index
from benchmarks.report import finish, say
from megido_api.flows import queries as flow_queries
from megido_api.flows.queries import Filters
from megido_api.stats import collecting, summary
from megido_shared.datadir import DataDir
from megido_shared.db import search
from megido_shared.db.connect import conninfo, create_engine
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from megido_shared.db.tables import flow_text, flows

PAGE = 100
SETTINGS = {"shared_buffers": "2GB", "max_wal_size": "8GB", "effective_cache_size": "8GB"}
_c = flows.c

type Ask = Callable[[], Awaitable[int]]


@dataclass(slots=True)
class Query:
    """`times` and `cpu` (of client and server together) in ms, a value an asking; `rows` of the last answer, so that a
    query that finds nothing shows."""

    ask: Ask
    times: list[float]
    cpu: list[float]
    rows: int = 0


class Mix:
    """The queries by name, over one connection."""

    def __init__(self, connection: AsyncConnection, hosts: list[str], deep: UUID, once: str) -> None:
        self._connection = connection
        self._hosts = hosts
        self.queries: dict[str, Query] = {}
        self._add("yardstick", self._page(Filters()))
        self._two_filters()
        for kind, word in URL.items():
            self._add(f"url {kind}", self._page(Filters(search=word)))
        for kind, word in (BODY | {"once": once}).items():
            self._add(f"body {kind}", self._body(word))
        self._add("keyset 1", self._page(Filters()))
        self._add("keyset deep", self._page(Filters(), deep))
        self._add("count all", self._total(Filters()))
        self._add("count method", self._total(Filters(method="GET")))
        self._add("count status", self._count(_c.status == 404))
        self._add("count two", self._count(_c.host == hosts[8], _c.status == 404))
        self._add("stats all", self._stats(None))
        self._add("stats hours", self._stats("hour"))

    def _two_filters(self) -> None:
        h = self._hosts
        for name, conditions in {
            "method + status, common": (_c.method == "GET", _c.status == 200),
            "method + status, rare": (_c.method == "PUT", _c.status == 503),
            "host + status, common": (_c.host == h[0], _c.status == 200),
            "host common + status rare": (_c.host == h[0], _c.status == 503),
            "host + status, between": (_c.host == h[8], _c.status == 404),
            "host rare + status": (_c.host == h[300], _c.status == 404),
            "application + host": (_c.source_app == "crm", _c.host == h[8]),
            "application rare + method": (_c.source_app == "scanner", _c.method == "PUT"),
            "address + status": (_c.source_ip == "10.0.0.3", _c.status == 500),
            "error + host": (_c.error_type == "TIMEOUT", _c.host == h[0]),
            "nothing": (_c.source_ip == "192.0.2.1", _c.status == 200),
        }.items():
            self._add(f"two: {name}", self._found(search.Search(where=conditions)))

    def _add(self, name: str, ask: Ask) -> None:
        self.queries[name] = Query(ask, [], [])

    def _page(self, filters: Filters, cursor: UUID | None = None) -> Ask:
        async def ask() -> int:
            page = await flow_queries.page(self._connection, filters, cursor=cursor, limit=PAGE, offset=0)
            return len(page.rows)

        return ask

    def _found(self, wanted: search.Search) -> Ask:
        async def ask() -> int:
            return len(await search.newest(self._connection, flow_queries.LISTED, wanted, PAGE + 1))

        return ask

    def _body(self, word: str) -> Ask:
        return self._found(search.Search(text=flow_text.c.response_body.ilike(f"%{word}%")))

    def _total(self, filters: Filters) -> Ask:
        async def ask() -> int:
            return (await flow_queries.total(self._connection, filters)).count

        return ask

    def _count(self, *conditions: Any) -> Ask:
        async def ask() -> int:
            return (await search.count(self._connection, search.Search(where=conditions), 10_001)).number

        return ask

    def _stats(self, bucket: str | None) -> Ask:
        async def ask() -> int:
            now = datetime.now(UTC)
            found = await collecting.collect(self._connection, collecting.Wanted(bucket=bucket), now)
            answer = summary.answer(found, bucket, now)
            return int(answer["total_requests"])

        return ask


async def measure(url: str, rounds: int) -> dict[str, Query]:
    """Every query `rounds` times, in an order that is new each time."""
    rng = random.Random(1)
    engine = create_engine(url, statement_timeout_ms=30_000, pool_size=1)
    try:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            mix = await _mix(connection)
            pid = (await connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
            for number in range(rounds + 3):
                for name in rng.sample(list(mix.queries), len(mix.queries)):
                    query = mix.queries[name]
                    begun, computed = time.perf_counter(), _computed_ms(pid)
                    query.rows = await query.ask()
                    if number >= 3:  # the first ones warm up
                        query.times.append((time.perf_counter() - begun) * 1000)
                        query.cpu.append(_computed_ms(pid) - computed)
                if number % 20 == 0:
                    say(f"round {number} of {rounds + 3}")
            return mix.queries
    finally:
        await engine.dispose()


def _computed_ms(pid: int) -> float:
    """CPU time of this process and of the server's process that serves it."""
    server_ns = int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0])
    return time.process_time() * 1000 + server_ns / 1e6


async def _mix(connection: AsyncConnection) -> Mix:
    hosts = await connection.exec_driver_sql("SELECT host FROM flows GROUP BY 1 ORDER BY count(*) DESC, 1")
    deep = await connection.exec_driver_sql(
        "SELECT flow_id FROM flows ORDER BY flow_id DESC OFFSET (SELECT least(500000, count(*) / 2) FROM flows) LIMIT 1"
    )
    once = await connection.exec_driver_sql(  # random digits of one body, whatever part of them is indexed
        """SELECT substring(response_body FROM '"([0-9a-f]{16})"') FROM flow_text WHERE response_body IS NOT NULL
           ORDER BY flow_id LIMIT 1"""
    )
    return Mix(connection, [row.host for row in hosts], deep.scalar_one(), once.scalar_one())


def p95(times: Collection[float]) -> float:
    return sorted(times)[int(len(times) * 0.95)]


def figures(queries: Mapping[str, Query]) -> dict[str, float]:
    """The summary: over the mix of its kind where a kind has one."""

    def over(prefix: str) -> list[float]:
        return [time for name, query in queries.items() if name.startswith(prefix) for time in query.times]

    def worst(prefix: str) -> float:
        return max(p95(query.times) for name, query in queries.items() if name.startswith(prefix))

    return {
        "newest_p95_ms": round(worst("two: "), 2),
        "newest_p50_ms": round(median(over("two: ")), 2),
        "url_substring_p95_ms": round(p95(over("url ")), 2),
        "body_search_p95_ms": round(p95(over("body ")), 2),
        "count_p95_ms": round(p95(over("count ")), 2),
        "stats_p95_ms": round(worst("stats "), 2),
        "keyset_depth_ratio": round(median(queries["keyset deep"].times) / median(queries["keyset 1"].times), 3),
        "yardstick_p50_ms": round(median(queries["yardstick"].times), 2),
        "yardstick_p95_ms": round(p95(queries["yardstick"].times), 2),
    }


_SIZE = """
SELECT (pg_total_relation_size(%(table)s::regclass) + coalesce(sum(pg_total_relation_size(relid)), 0))::bigint
FROM pg_partition_tree(%(table)s::regclass) WHERE isleaf
"""


def sizes(url: str) -> dict[str, int]:
    """Bytes on disk, indexes and TOAST included."""
    with psycopg.connect(conninfo(url)) as connection:
        found = {}
        for table in ("flows", "bodies", "flow_lines", "flow_text", "rollups"):
            row = connection.execute(_SIZE, {"table": table}).fetchone()
            assert row is not None
            found[table] = int(row[0])
        return found


def _counted(url: str, query: str) -> int:
    with psycopg.connect(conninfo(url)) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])


def prepared(url: str, given: argparse.Namespace) -> tuple[Filled | None, Indexed | None]:
    """Fills what is not filled yet (a kept data directory)."""
    migrate(url)
    filled = indexed = None
    if not _counted(url, "SELECT count(*) FROM feed"):
        filled = fill(url, given.flows)
        say(f"{given.flows:,} flows stored in {filled.seconds:.0f} s")
    if not _counted(url, "SELECT count(*) FROM feed_cursors"):
        indexed = index(url, given.texts)
    return filled, indexed


def main(argv: Collection[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench-query", description=__doc__)
    parser.add_argument("--flows", type=int, default=1_000_000, help="default %(default)s; about 8 GB with their texts")
    parser.add_argument("--texts", type=int, default=0, help="of so many the bodies are indexed (default: of all)")
    parser.add_argument("--rounds", type=int, default=100, help="of every query (default %(default)s)")
    parser.add_argument("--keep", default="", metavar="DIR", help="a data directory to fill once and use again")
    parser.add_argument("--no-cost", dest="cost", action="store_false", help="leave the cost to the insert path out")
    parser.add_argument("--plans", action="store_true", help="write docs/query-plans.md")
    given = parser.parse_args(None if argv is None else list(argv))
    with ExitStack() as stack:
        root = given.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="megido-bench-"))
        server = EmbeddedPostgres(DataDir(Path(root) / "data").ensure(), durable=False, settings=SETTINGS)
        url = server.start()
        try:
            filled, indexed = prepared(url, given)
            queries = asyncio.run(measure(url, given.rounds))
            if given.plans:
                query_plans.write(url)
            cost = _insert_cost() if given.cost else {}
            report(url, queries, filled, indexed, cost)
        finally:
            server.stop()


def _insert_cost() -> dict[str, float]:
    """In a server of its own, which syncs."""
    with tempfile.TemporaryDirectory(prefix="megido-bench-") as root:
        server = EmbeddedPostgres(DataDir(Path(root) / "data").ensure())
        try:
            url = server.start()
            migrate(url)
            return query_cost.insert_ratio(url)
        finally:
            server.stop()


def report(
    url: str,
    queries: Mapping[str, Query],
    filled: Filled | None,
    indexed: Indexed | None,
    cost: Mapping[str, float],
) -> None:
    for name, query in queries.items():
        say(
            f"{name:36} p50 {median(query.times):8.2f}  p95 {p95(query.times):8.2f}  cpu {mean(query.cpu):8.2f} ms"
            f"  ({query.rows} rows)"
        )
    total = _counted(url, "SELECT count(*) FROM flows")
    texts = _counted(url, "SELECT count(*) FROM flow_text")
    disk = sizes(url)
    extra: dict[str, Any] = {"insert_rate_ratio": dict(cost)} if cost else {}
    if filled is not None:
        extra["record_bytes"] = round(filled.record_bytes / total)
    if indexed is not None:
        extra |= {"texts_per_s": round(indexed.per_s), "build_s": round(indexed.build_s)}
    finish(
        "query",
        {"flows": total, **figures(queries)},
        detail={
            "flows_with_text": texts,
            "bytes_per_flow": {
                name: round(size / max(1, texts if name == "flow_text" else total)) for name, size in disk.items()
            },
            "json_bytes_per_flow": query_plans.json_bytes(url),
            **extra,
            "queries": {
                name: {
                    "p50_ms": round(median(q.times), 2),
                    "p95_ms": round(p95(q.times), 2),
                    "cpu_ms": round(mean(q.cpu), 2),
                    "rows": q.rows,
                }
                for name, q in queries.items()
            },
            "load_average": round(os.getloadavg()[1], 1),
            "postgres_settings": SETTINGS,
        },
        packages=("psycopg", "sqlalchemy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
